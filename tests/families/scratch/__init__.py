"""A family that exists in the tests only."""
