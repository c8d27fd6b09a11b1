"""One sample, and what packing asks of whoever has samples."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

DATA_TYPES = ("en", "cn", "code")  # the benchmark's, of data that has no other names


@dataclass(frozen=True, eq=False)
class Sample:
    """The tokens of one sample, int64 and not negative, and which of them are learned as labels, bool."""

    tokens_T: np.ndarray
    learned_T: np.ndarray

    @classmethod
    def from_signed(cls, signed_T: np.ndarray) -> "Sample":
        """Read tokens as the benchmark's own data mean them.

        A negative token is read as its absolute value and is not learned, and neither is token 0. Source:
        the benchmark. A source of another tokenizer, where 0 is a token like any other, says itself which
        tokens are learned.
        """
        return cls(np.abs(signed_T), signed_T > 0)

    def labels(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """What the tokens begin … end − 1 are to be followed by, and where that is a label.

        It is the next token, wherever a piece ends between the two; the last token of a sample has none, and
        neither has one before a token that is not learned.
        """
        labels, labelled = self.tokens_T[begin + 1 : end + 1], self.learned_T[begin + 1 : end + 1]
        if end == len(self.tokens_T):
            return np.append(labels, 0), np.append(labelled, False)
        return labels, labelled


class Samples(Protocol):
    """What packing needs of a data set."""

    type_id: int  # index into the names of the data, see ``opened.type_names``
    lengths: np.ndarray  # int64, tokens per sample, each at least 1

    def sample(self, index: int) -> Sample:
        """Return one sample, of ``lengths[index]`` tokens."""
        ...
