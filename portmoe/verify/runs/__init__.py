"""Runs held against each other and against a recorded one, behind ``portmoe compare``."""
