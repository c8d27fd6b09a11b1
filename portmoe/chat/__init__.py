"""Talking to a model that was trained or downloaded: on one process, with a device of any backend."""
