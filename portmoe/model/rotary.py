"""The rotary embedding's tables."""

import torch

from portmoe.families.architecture import Rotary


def rotary_tables(positions_T: torch.Tensor, rotary: Rotary, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [T,R], float32, of position · base^(−r/R), R = ``width`` / 2.

    Angles are products of float32 numbers, whatever the model's dtype.
    """
    count = width // 2
    # Frequencies come from the host: every device multiplies by the same numbers. The copy does not wait.
    frequency_R = torch.tensor([rotary.base ** (-r / count) for r in range(count)], dtype=torch.float32)
    angle_TR = positions_T.float()[:, None] * frequency_R.to(positions_T.device, non_blocking=True)
    return angle_TR.cos(), angle_TR.sin()
