"""Which operation of a training step is the first that a backend computes wrong? Behind ``portmoe bisect``.

``bisect`` walks the recorded calls of one step, ``answers`` judges one call made again on the backend,
``whole_model`` the step as a whole; ``bisect_report`` shows the outcome.
"""
