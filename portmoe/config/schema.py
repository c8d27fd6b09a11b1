"""The typed config: the benchmark's sections and key names, plus the few keys portmoe adds.

Every section is strict: unknown keys and wrong types are refused. What is known of a key beside its type
stands with it, see ``keys.Key``. Reading files and turning violations into messages is ``read``'s work;
sizes that depend on the number of ranks are ``parallel.layout``'s. This module imports neither torch nor
numpy, so that a config mistake is reported at once.
"""

from pydantic import model_validator

from portmoe.config.checks import contradictions
from portmoe.config.tree import Tree


class Config(Tree):
    """One training run, everything but the number of ranks and the backend."""

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        if problems := list(contradictions(self)):
            raise ValueError("\n".join(problems))
        return self
