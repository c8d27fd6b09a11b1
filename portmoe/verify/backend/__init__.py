"""Does a backend compute what the contracts say? The checks behind ``portmoe validate``.

``validate`` runs them in order: ``conformance`` of every implementation of every operation against float64
(``cases`` are the arguments, ``calls`` makes a call and keeps its results), the ``collectives`` between
processes, the memory ``pool``, and the training run of ``verify.runs``. ``reports`` shows the outcome.
"""
