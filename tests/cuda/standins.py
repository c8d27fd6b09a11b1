"""Stand-ins for tutel and liger-kernel: the documented arguments, checked, and plain torch inside.

They show that the calls are made as documented and give the contract's results; they show nothing about the
packages themselves.
"""

import sys
from types import ModuleType

import torch


def install(monkeypatch, name, **attributes):
    """Make ``import name`` find a module with these attributes."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
        if depth > 1:
            parent = sys.modules[".".join(parts[: depth - 1])]
            setattr(parent, parts[depth - 1], sys.modules[".".join(parts[:depth])])
    vars(sys.modules[name]).update(attributes)


def fast_cumsum_sub_one(data, dim=0):
    """The kernel reads int32 in memory order, whatever the strides say."""
    assert data.dim() == 2
    assert dim == 0
    assert data.dtype == torch.int32
    assert data.is_contiguous()
    return (data.cumsum(0) - 1).to(torch.int32)


class FastDispatcher:
    """tutel.moe.fast_dispatcher, with locations at or past the capacity dropped."""

    def __init__(self, num_global_experts, capacity, model_dim, dispatch_dtype):
        self.experts, self.capacity, self.hidden = num_global_experts, capacity, model_dim
        self.dtype = dispatch_dtype

    def update(self, indices_, locations_, gates_, capacity=None, is_postscore=True):
        assert is_postscore
        assert capacity > 0
        self.capacity = capacity
        for index, location, gate in zip(indices_, locations_, gates_, strict=True):
            assert index.dtype == location.dtype == torch.int32
            assert index.shape == location.shape == gate.shape
            assert index.is_contiguous()
            assert location.is_contiguous()
            assert gate.is_contiguous()
            assert (index == 0).all()
        rows = [index * capacity + location for index, location in zip(indices_, locations_, strict=True)]
        self.rows_KS = torch.stack(rows).to(torch.int64)
        self.kept_KS = torch.stack(locations_) < capacity
        self.gates = gates_

    def _one_hot(self):
        """[K,S,R] float32."""
        spots = self.rows_KS[..., None] == torch.arange(self.experts * self.capacity)
        return (spots & self.kept_KS[..., None]).to(self.dtype)

    def encode(self, data):
        self._check(data)
        return torch.einsum("ksr,sh->rh", self._one_hot(), data)

    def decode(self, data):
        self._check(data)
        out = torch.zeros(self.rows_KS.shape[1], self.hidden)
        for rows, kept, gate in zip(self.rows_KS, self.kept_KS, self.gates, strict=True):
            read = data.index_select(0, rows.clamp(max=len(data) - 1))  # dropped rows are not read
            out = out + torch.where(kept[:, None], gate[:, None] * read, 0.0)
        return out

    def _check(self, data):
        assert data.dtype == self.dtype == torch.float32
        assert data.is_contiguous()
        assert data.shape[1] == self.hidden


class LigerRMSNormFunction:
    """liger_kernel.ops.rms_norm's function for casting_mode "gemma": float32 throughout."""

    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert (offset, casting_mode, in_place, row_mode) == (0.0, "gemma", False, None)
        assert W.shape == X.shape[-1:]
        assert X.numel()
        wide = X.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * W.float()).to(X.dtype)
