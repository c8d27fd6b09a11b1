"""Implementations in torch's own operators, for any device: a file an operation, all of them in ``ops``."""
