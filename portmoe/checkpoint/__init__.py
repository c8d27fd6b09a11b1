"""Checkpoints: sharded, atomic, readable by any layout."""
