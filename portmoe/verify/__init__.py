"""Verdicts, a folder each, that come to ``portmoe.result.Result`` and one page of ``portmoe.record.page``.

``machine``: can it train? ``backend``: does it compute what the contracts say? ``bisect``: which operation is
the first that does not? ``runs``: are two runs the same run?
"""
