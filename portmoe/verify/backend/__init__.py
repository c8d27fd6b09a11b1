"""Conformance of one backend: every operation, its collectives and memory, behind ``portmoe validate``."""
