"""What one step measured: summed on the device, brought to the host once, combined over the ranks."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from portmoe.data import Batch
from portmoe.model.decoder import DecoderOutput, StageOutput
from portmoe.ops.cross_entropy import IGNORED
from portmoe.parallel.layout import Layout
from portmoe.record.log_line import StepTotals

CRC32S = 2**32  # so many there are


class StepMetrics:
    """Collects the micro-batches of one step on one rank.

    Args:
        batches: all of them; the ranks of a pipeline have the same ones.
    """

    def __init__(self, experts: int, batches: Sequence[Batch]) -> None:
        self._experts = experts
        self._types = batches[0].types
        self._micro_num = len(batches)
        self._sums: list[torch.Tensor] = []
        self._segments = [batch.num_segments for batch in batches]
        self._longest = max(batch.longest_segment for batch in batches)
        self._crc32 = sum(batch.crc32 for batch in batches) % CRC32S
        self._padding = sum(batch.padding for batch in batches)

    def add(self, batch: Batch, output: DecoderOutput | StageOutput, loss: torch.Tensor | None) -> None:
        """Record one micro-batch. Launches device work and does not wait for it.

        A stage without the head knows only its own layers' assignments, and has no ``loss``.
        """
        types = len(self._types)
        if loss is None:
            of_head = torch.zeros(3 + 3 * types, device=output.x_TH.device)
        else:
            labelled_T = (batch.labels_T != IGNORED).float()
            correct_T = output.correct_T.float() * labelled_T
            per_type = torch.stack((labelled_T, correct_T, output.loss_T.detach()))
            by_type = torch.zeros(3, types, device=loss.device).index_add_(1, batch.types_T, per_type)
            losses = torch.stack((loss.detach(), output.aux_loss.detach(), output.z_loss.detach())).float()
            of_head = torch.cat((losses, by_type.flatten()))
        counts = (output.assigned_LE.sum(0).float(), output.kept_LE.sum(0).float())
        self._sums.append(torch.cat((of_head, *counts)))

    def reduce(self, stop_signal: int, group: dist.ProcessGroup, layout: Layout) -> StepTotals:
        """Combine over all ranks: one transfer to the host and one collective.

        ``stop_signal``, the number of the signal that asked a rank to stop or 0, is seen by all, so that they
        stop after the same step and for the same reason.

        Args:
            group: a CPU process group of all ranks.
            layout: which of them see different micro-batches, and which the same.
        """
        sums = torch.stack(self._sums).cpu().double().sum(0)
        marks = [sum(self._segments), self._longest, max(self._segments), min(self._segments), stop_signal]
        marks += [self._crc32, self._padding]
        mine = torch.cat((sums, torch.tensor(marks, dtype=torch.float64)))
        ranks = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(ranks, mine, group=group)
        everyone = torch.stack(ranks)
        micro_batches = self._micro_num * layout.data
        alike = layout.world // layout.data  # ranks that have the same micro-batches
        # The tensor ranks, which are neighbours, measured the same.
        sums = everyone[:: layout.tensor, : len(sums)].sum(0)
        return self._totals(sums, everyone[:, len(mine) - len(marks) :], micro_batches, alike)

    def _totals(
        self, sums: torch.Tensor, marks_RM: torch.Tensor, micro_batches: int, alike: int
    ) -> StepTotals:
        types, experts = len(self._types), self._experts
        scalars, tokens, correct, losses, assigned, kept = sums.split(
            (3, types, types, types, experts, experts)
        )
        loss, aux_loss, z_loss = (scalars / micro_batches).tolist()
        if not tokens.any():
            loss = math.nan  # a mean of nothing, and 0 by its arithmetic only
        return StepTotals(
            types=self._types,
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            tokens=[int(n) for n in tokens],
            correct=[int(n) for n in correct],
            loss_sums=losses.tolist(),
            assigned=[int(n) for n in assigned],
            kept=[int(n) for n in kept],
            segments=int(marks_RM[0, 0]),
            largest_length=int(marks_RM[:, 1].max()),
            largest_batch=int(marks_RM[:, 2].max()),
            smallest_batch=int(marks_RM[:, 3].min()),
            stop_signal=int(marks_RM[:, 4].max()),
            data_crc32=int(marks_RM[:, 5].sum()) // alike % CRC32S,
            padding=int(marks_RM[:, 6].sum()) // alike,
        )
