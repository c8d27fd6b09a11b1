"""The backends of this repository. Each is found through its entry point, like any other."""
