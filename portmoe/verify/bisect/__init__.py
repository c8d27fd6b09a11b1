"""The first operation of a training step that a backend computes wrong, behind ``portmoe bisect``."""
