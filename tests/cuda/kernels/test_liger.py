"""liger-kernel's own cross entropy. Triton's interpreter cannot run its norm: see the stand-ins."""

import agreement
import pytest
import torch

pytest.importorskip("liger_kernel")

from portmoe.backends.triton import liger
from portmoe.ops import OPERATIONS

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_its_cross_entropy_computes_the_same(dtype):
    shapes = agreement.workload(dtype, DEVICE, tokens=12, seq_len=4)
    assert liger.CROSS_ENTROPY.supports(shapes) is None
    agreement.assert_agrees(liger.cross_entropy, OPERATIONS["cross_entropy"], shapes)


def test_it_says_which_tokens_are_right():
    hidden = torch.eye(4, 8, device=DEVICE)
    labels = torch.tensor([0, 1, 3, -100], device=DEVICE)
    loss, correct = liger.cross_entropy(hidden, torch.eye(5, 8, device=DEVICE), labels, 0.0)
    assert correct.tolist() == [True, True, False, False]
    assert loss[3] == 0
    # Two highest logits: the reference takes the first class.
    tied = torch.zeros(2, 8, device=DEVICE)
    labels = torch.tensor([0, 1], device=DEVICE)
    assert liger.cross_entropy(tied, torch.zeros(3, 8, device=DEVICE), labels, 0.0)[1].tolist() == [
        True,
        False,
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its norm does not run in Triton's interpreter")
def test_its_norm_computes_the_same():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        agreement.assert_agrees(liger.rms_norm, OPERATIONS["rms_norm"], agreement.workload(dtype, DEVICE))
