"""Triton kernels, and libraries of them, that more than one vendor's backend offers."""
