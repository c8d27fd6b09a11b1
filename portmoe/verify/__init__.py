"""Verdicts, a folder each: ``machine`` (can it train?), ``backend`` (does it compute what the contracts say?),
``bisect`` (which operation is the first that does not?) and ``runs`` (are two runs the same run?).

A check comes to a ``portmoe.result.Result``; every report is one page of ``portmoe.record.page``.
"""
