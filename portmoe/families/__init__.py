"""The model families: one folder each, which turns the keys of a config into an ``Architecture``.

Nothing outside this room knows a family. ``registry`` finds them by listing the folder.
"""
