"""A model to talk to, on a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from portmoe.accelerator import get_accelerator
from portmoe.accelerator.discovery import AUTO
from portmoe.chat.source import Source
from portmoe.costs.parameters import is_exact
from portmoe.errors import BackendError
from portmoe.generation.decode import NextLogits, answering
from portmoe.launch.ranks import detect
from portmoe.model.decoder import Decoder
from portmoe.model.precision import compute_dtype
from portmoe.parallel.layout import Layout
from portmoe.training.operations import choose_operations


@contextmanager
def opened(source: Source, backend: str = AUTO) -> Iterator[tuple[NextLogits, str]]:
    """Load the model; yields what ``generate`` is given its logits by, and where it computes.

    Weights are kept in ``model.dtype``, those that are float32 in every dtype in that.

    Raises:
        ConfigError: the weights are of another model, or no backend has this name.
        BackendError: the backend cannot be used, or its device has no room.
        TrainingError: a file cannot be read.
    """
    accelerator = get_accelerator(backend)
    device = accelerator.open(detect("local").local_rank)
    config = source.config
    layout = Layout.plan(config, 1)
    ops = choose_operations(config, layout, accelerator, device, 0, lambda value: value, lambda _: None)
    with torch.device("meta"):
        decoder = Decoder(config, ops)
    dtype = compute_dtype(config.model)
    for module in decoder.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(torch.float32 if is_exact(module) else dtype)
    try:
        decoder.to_empty(device=device)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise BackendError(f"{device} has no room for the model: {error!s:.200}") from error
        raise
    source.load(dict(decoder.named_parameters()))

    def next_logits(batch):  # noqa: ANN001, ANN202 (a NextLogits)
        batch = batch.to(device)
        return decoder(batch.tokens_T, batch)

    with answering(decoder):
        yield next_logits, f"{accelerator.device.name()}, {config.model.dtype}"
