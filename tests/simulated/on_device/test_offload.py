"""Inputs of recomputed layers that wait in host memory: less on the device, and the same bits."""

import torch

from portmoe.accelerator import get_accelerator
from portmoe.config import Config
from portmoe.data.batch import Batch
from portmoe.model import Decoder
from portmoe.ops import Segments

NPU, TOKENS, HIDDEN, LAYERS = torch.device("npu", 0), 256, 64, 6


def passes(offload):
    """Loss and gradients, and how many bytes the forward pass left on the device."""
    sizes = {"dtype": "float32", "hidden_size": HIDDEN, "num_attention_heads": 2, "num_layers": LAYERS}
    sizes |= {"vocab_size": 64, "multiple_of": 8, "checkpoint": True, "checkpoint_offload": offload}
    config = Config.model_validate({"model": sizes, "data": {"seq_len": TOKENS}})
    model, memory = Decoder(config).to(NPU), get_accelerator("npu").memory
    tokens_T = torch.randint(1, 64, (TOKENS,), generator=torch.Generator().manual_seed(5))
    labels_T, positions_T = tokens_T.roll(-1), torch.arange(TOKENS)
    tensors = (tokens_T, labels_T, positions_T, torch.zeros_like(tokens_T))
    batch = Batch(*tensors, segments=Segments((0, TOKENS)), index=0).to(NPU)
    before = memory.allocated()
    output = model(batch.tokens_T, batch)
    left = memory.allocated() - before
    (output.loss_T.mean() + output.aux_loss).backward()
    return [output.loss_T.detach().cpu(), *(p.grad.cpu() for p in model.parameters())], left


def test_less_stays_on_the_device_and_the_numbers_are_the_same():
    (plain, kept), (again, left) = passes(False), passes(True)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
    assert kept - left >= (LAYERS - 1) * TOKENS * HIDDEN * 4
