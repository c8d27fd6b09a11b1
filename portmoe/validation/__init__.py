"""Showing that a backend computes what the others compute: conformance, a reference run, comparisons."""
