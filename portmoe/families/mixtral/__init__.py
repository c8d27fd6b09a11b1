"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): grouped heads, and experts in every layer."""
