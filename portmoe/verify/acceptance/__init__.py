"""Does a run meet a benchmark's rules? What ``portmoe report`` files for whoever has to decide.

``rules`` holds the run's config against the benchmark's, key by key; ``findings`` what the run recorded
against the rules and against itself; ``speed`` has the figures of a stated window; ``report`` is the page and
the JSON of it.
"""
