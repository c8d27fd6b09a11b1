"""Is a recorded step what this backend computes from the same state? Behind ``portmoe replay``.

``recorded`` reads what a run left behind and makes the config of the replay, ``recompute`` makes the steps
again, ``judge`` holds them to the record, ``report`` shows the outcome. One step from one state cannot be
chaotic: the bands are tight, at any stage of training.
"""
