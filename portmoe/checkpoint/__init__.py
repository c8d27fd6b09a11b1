"""Checkpoints: sharded, whole or not there, readable by any layout.

``folder`` names them, ``storage`` writes and reads the files, ``store`` saves and resumes a run.
"""
