"""The rotary embedding's tables."""

import math

import torch

from portmoe.families.architecture import Rotary, Yarn


def rotary_tables(positions_T: torch.Tensor, rotary: Rotary, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [T,R], float32, of position · base^(−r/R), R = ``width`` / 2.

    Angles are products of float32 numbers, whatever the model's dtype.
    """
    # Frequencies come from the host: every device multiplies by the same numbers. The copy does not wait.
    frequency_R = torch.tensor(frequencies(rotary, width), dtype=torch.float32)
    angle_TR = positions_T.float()[:, None] * frequency_R.to(positions_T.device, non_blocking=True)
    if rotary.magnitude == 1.0:
        return angle_TR.cos(), angle_TR.sin()
    return angle_TR.cos() * rotary.magnitude, angle_TR.sin() * rotary.magnitude


def frequencies(rotary: Rotary, width: int) -> list[float]:
    """Radians a position of each of the ``width`` / 2 pairs, the fastest first."""
    count = width // 2
    plain = [rotary.base ** (-r / count) for r in range(count)]
    if rotary.yarn is None:
        return plain
    low, high = _mixed_pairs(rotary.base, rotary.yarn, width)
    mixed = []
    for r, frequency in enumerate(plain):
        slowed = min(max((r - low) / (high - low), 0.0), 1.0)
        mixed.append(frequency * (1 - slowed) + frequency / rotary.yarn.factor * slowed)
    return mixed


def _mixed_pairs(base: float, yarn: Yarn, width: int) -> tuple[float, float]:
    """The pairs between which frequencies go over from unchanged to slowed (Peng et al. 2023, eq. 18–20)."""

    def pair(rotations: float) -> float:
        """The pair that turns so often within the original context."""
        return width * math.log(yarn.original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(yarn.fast)), 0), min(math.ceil(pair(yarn.slow)), width - 1)
    return low, high if high > low else low + 0.001
