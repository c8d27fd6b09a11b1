"""The step loop and what surrounds it."""
