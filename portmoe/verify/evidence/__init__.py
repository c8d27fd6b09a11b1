"""Is a run directory what a run has written? Behind ``portmoe verify``.

``directory`` reads it, ``chain`` holds the files to the hashes written with them, ``steps`` recomputes what
needs no device, ``data`` the batches, ``checkpoints`` holds what was saved to its checksums and to the steps;
``verify`` puts it together and ``report`` shows it.
"""
