"""The chunked cross entropy in slices that stay in the cache, with compiled kernels for a slice's logits."""

import torch

from portmoe.backends.cpu.compiler import addresses, kernel, require, supports
from portmoe.backends.cpu.products import factor
from portmoe.backends.torch.cross_entropy import TORCH, ChunkedCrossEntropy
from portmoe.ops.cross_entropy import CUT_VOCABULARY, Statistics, Targets
from portmoe.ops.operation import Implementation

SLICE_LOGITS = 2**21  # of one slice: 8 MiB in float32


class Kernels:
    """``Arithmetic`` by the kernels of cross_entropy.c."""

    def add(
        self,
        statistics: Statistics,
        logits_TS: torch.Tensor,
        labels_T: torch.Tensor,
        start: int,
        smoothed: bool,
    ) -> None:
        s = statistics
        tensors = (
            logits_TS,
            labels_T.contiguous(),
            s.largest_T,
            s.predicted_T,
            s.exp_sum_T,
            s.logit_sum_T,
            s.target_T,
        )
        function, threads = kernel("cross_entropy_statistics", logits_TS.dtype), torch.get_num_threads()
        function(*logits_TS.shape, start, smoothed, *addresses(*tensors), threads)

    def gradients(
        self, logits_TS: torch.Tensor, start: int, targets: Targets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_TS, grad_T = torch.empty_like(logits_TS), targets.grad_T.contiguous()
        tensors = (logits_TS, targets.labels_T.contiguous(), targets.log_sum_T, grad_T, grad_TS)
        numbers = (*logits_TS.shape, start, targets.smoothing, targets.uniform)
        threads = torch.get_num_threads()
        if logits_TS.dtype == torch.float32:
            require().cross_entropy_gradients_float32(*numbers, *addresses(*tensors), threads)
            return grad_TS, grad_TS.t()
        grad_ST = logits_TS.new_empty(logits_TS.shape[::-1])
        require().cross_entropy_gradients_bfloat16(*numbers, *addresses(*tensors, grad_ST), threads)
        return grad_TS, grad_ST


ALL = (
    Implementation(
        "cross_entropy",
        "compiled",
        ChunkedCrossEntropy(Kernels(), SLICE_LOGITS, factor),
        supports,
        handles=(CUT_VOCABULARY,),
    ),
    Implementation(
        "cross_entropy",
        "chunked",
        ChunkedCrossEntropy(TORCH, SLICE_LOGITS, factor),
        handles=(CUT_VOCABULARY,),
    ),
)
