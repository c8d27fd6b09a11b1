"""Weights of a folder of the hub into a rank's shards: only the bytes it keeps, and no tensor whole."""

from collections.abc import Mapping

import torch

from portmoe.checkpoint.arrays import Files
from portmoe.checkpoint.hub_files import HubFolder
from portmoe.checkpoint.hub_layout import Part, local, pieces
from portmoe.errors import TrainingError
from portmoe.families.hub import Made


@torch.no_grad()
def fill(parameters: Mapping[str, torch.Tensor], made: Mapping[str, Made], folder: HubFolder) -> None:
    """Fill this rank's part of ``parameters``, by name, plain or DTensors, in place.

    16-bit numbers are kept exactly in float32. The folder has been held to the model before.

    Raises:
        TrainingError: a file cannot be read to its end. Parameters may be half filled.
    """
    with Files() as files:
        for name, parameter in parameters.items():
            here = local(parameter.detach())
            for piece in pieces(made[name], parameter.shape, Part.of(parameter)):
                try:
                    folder.tensors[piece.tensor].read(files, piece.there, here[piece.here])
                except OSError as error:
                    raise TrainingError(f"{folder.path}: {piece.tensor!r} cannot be read: {error}") from error
