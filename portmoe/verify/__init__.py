"""Verdicts: this machine, a backend's operations, the first wrong operation, two runs."""
