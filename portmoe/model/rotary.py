"""The rotary embedding's tables."""

import torch

from portmoe.config.section import ModelSection


def rotary_tables(positions_T: torch.Tensor, model: ModelSection) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [T,R], float32, of position · base^(−r/R), R = head dimension / 2.

    Angles are products of float32 numbers, whatever the model's dtype.
    """
    count = model.head_dim // 2
    # Frequencies come from the host: every device multiplies by the same numbers. The copy does not wait.
    frequency_R = torch.tensor([model.rope_base ** (-r / count) for r in range(count)], dtype=torch.float32)
    angle_TR = positions_T.float()[:, None] * frequency_R.to(positions_T.device, non_blocking=True)
    return angle_TR.cos(), angle_TR.sin()
