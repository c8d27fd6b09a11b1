"""The arrays that one micro-batch is made of."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Pack:
    """The arrays of one micro-batch; segment i is offsets[i] … offsets[i+1]. int64 but ``labelled_T``, bool.

    ``labels_T`` is meant only where ``labelled_T`` is true. The last ``padded`` segments are padding.
    """

    tokens_T: np.ndarray
    labels_T: np.ndarray
    labelled_T: np.ndarray
    positions_T: np.ndarray
    types_T: np.ndarray
    offsets: tuple[int, ...]
    padded: int = 0
