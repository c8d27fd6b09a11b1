"""Carrying an InternEvo config, a Python file, over without executing it."""
