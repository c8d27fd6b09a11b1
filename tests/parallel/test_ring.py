"""Attention around a ring of ranks, against one process in float64, and how evenly the work lies."""

import random
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from portmoe.families import architecture as arch
from portmoe.model.attention import Attention
from portmoe.model.latent_attention import LatentAttention
from portmoe.model.reference_table import reference_table
from portmoe.model.rotary import rotary_tables
from portmoe.ops import Segments, attention
from portmoe.parallel.ring import Ring, piece_of
from portmoe.parallel.sequence import OwnTokens

# replicas, ring, heads
MESHES = [(2, 2, 1), (1, 4, 1), (1, 2, 2)]
TOKENS = 32
PACKS = [(0, 32), (0, 1, 2, 5, 12, 31, 32), (0, 3, 6, 9, 12, 15, 18, 32), tuple(range(33))]
# heads, heads of keys, widths of keys and of values
SIZES = {
    "as many": (2, 2, 6, 6),
    "grouped": (6, 2, 4, 4),
    "one key head": (4, 1, 4, 4),
    "wider": (2, 2, 6, 3),
}
ROTARY = arch.Rotary(10000.0)
LAYERS = {
    "grouped": arch.Attention(
        heads=8,
        kv_heads=4,
        head_dim=4,
        value_dim=4,
        bias=True,
        out_bias=False,
        rotary=ROTARY,
        norm_epsilon=1e-5,
    ),
    "latent": arch.LatentAttention(
        heads=4,
        query_rank=5,
        latent_rank=6,
        plain_dim=4,
        turned_dim=2,
        value_dim=3,
        rotary=ROTARY,
        scale=0.4,
        norm_epsilon=1e-6,
    ),
}


def sample_by_sample(q, k, v, offsets, scale):
    """Each query with the keys of its sample that are not behind it."""
    out, shared = [], q.shape[1] // k.shape[1]
    for start, end in pairwise(offsets):
        keys, values = (x[start:end].repeat_interleave(shared, 1) for x in (k, v))
        scores_NQK = torch.einsum("qnd,knd->nqk", q[start:end], keys) * scale
        behind = torch.ones(end - start, end - start).triu(1).bool()
        weights = scores_NQK.masked_fill(behind, -torch.inf).softmax(-1)
        out.append(torch.einsum("nqk,knw->qnw", weights, values))
    return torch.cat(out)


def worst(found, expected):
    """The largest error beside the largest number."""
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max())
        for a, b in zip(found, expected, strict=True)
    )


def of_the_operation(ring, sizes, offsets):
    """The largest error of this rank's results and gradients."""
    heads, groups, width, values = SIZES[sizes]
    generator = torch.Generator().manual_seed(len(offsets))
    shapes = (heads, width), (groups, width), (groups, values), (heads, values)
    *whole, grad = (torch.randn(TOKENS, *s, generator=generator, dtype=torch.double) for s in shapes)
    leaves = [t.clone().requires_grad_() for t in whole]
    own = [t[ring.rank :: ring.ranks].clone().requires_grad_() for t in whole]
    expected = sample_by_sample(*leaves, offsets, 0.3)
    found = ring.attend(attention, *own, Segments(offsets), 0.3)
    theirs = torch.autograd.grad(expected, leaves, grad)
    ours = torch.autograd.grad(found, own, grad[ring.rank :: ring.ranks])
    return worst([found, *ours], [t[ring.rank :: ring.ranks] for t in (expected, *theirs)])


def of_the_layer(tokens, name, offsets):
    """The same of a whole attention layer, whose weights' gradients are sums over the ranks."""
    sizes, generator = LAYERS[name], torch.Generator().manual_seed(7)
    kind = LatentAttention if name == "latent" else Attention
    whole = kind(6, sizes, True, reference_table()).double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    split = kind(6, sizes, True, reference_table()).double()
    split.load_state_dict(whole.state_dict())
    split.tokens = tokens
    lengths = [end - start for start, end in pairwise(offsets)]
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    x_TH, grad_TH = torch.randn(2, TOKENS, 6, generator=generator, dtype=torch.double)
    tables = [t.double() for t in rotary_tables(positions_T, sizes.rotary, sizes.rotary_dim)]
    x_TH.requires_grad_()
    expected = whole(x_TH, *tables, Segments(offsets))
    theirs = torch.autograd.grad(expected, [x_TH, *whole.parameters()], grad_TH)
    own_tH = tokens.own(x_TH.detach()).clone().requires_grad_()
    found = split(own_tH, *map(tokens.attended, tables), Segments(offsets))
    ours = torch.autograd.grad(found, [own_tH, *split.parameters()], tokens.own(grad_TH).contiguous())
    for gradient in ours[1:]:
        dist.all_reduce(gradient, group=tokens.group)
    gathered = tokens.gather(found.detach())
    return worst([gathered, *ours], [expected, tokens.own(theirs[0]), *theirs[1:]])


def errors() -> dict[tuple, float]:
    """On a rank: the largest error of every case."""
    dist.init_process_group("gloo")
    try:
        found = {}
        for shape in MESHES:
            mesh = init_device_mesh(
                "cpu", (shape[0], shape[1] * shape[2]), mesh_dim_names=("data", "sequence")
            )
            parts = mesh["sequence"]._unflatten(0, shape[1:], ("ring", "heads"))
            ring = Ring(parts["ring"].get_group(), shape[1], parts["ring"].get_local_rank())
            tokens = OwnTokens(mesh["sequence"], parts["heads"], parts["ring"] if shape[1] > 1 else None)
            tokens.group = mesh["sequence"].get_group()
            for offsets in PACKS:
                if shape[2] == 1:
                    for name in SIZES:
                        found[shape, "operation", name, offsets] = of_the_operation(ring, name, offsets)
                for name in LAYERS:
                    found[shape, "layer", name, offsets] = of_the_layer(tokens, name, offsets)
        return found
    finally:
        dist.destroy_process_group()


def test_the_numbers_of_one_process(world):
    for found in world(4).call(errors):
        assert len(found) == 2 * len(PACKS) * len(SIZES) + len(MESHES) * len(PACKS) * len(LAYERS)
        for case, error in found.items():  # in a layer norms and the rotary embedding are float32
            assert error < (1e-12 if case[1] == "operation" else 2e-6), case


def seen(segments, ranks, query, key):
    """Which pairs of the pack the piece of two ranks holds, by the definition of causal attention in it."""
    piece = piece_of(segments, ranks, query, key)
    places = range(query, segments.total, ranks), range(key, segments.total, ranks)
    if piece.queries_P is not None:
        places = [[all_of[p] for p in chosen] for all_of, chosen in zip(places, piece[1:], strict=True)]
    return {
        (places[0][q], places[1][k])
        for start, end in pairwise(piece.segments.offsets)
        for q in range(start, end)
        for k in range(start, q + 1)
    }


def random_pack(tokens, longest, draw):
    """Ends of samples of 1 … ``longest`` tokens that fill the pack."""
    offsets = [0]
    while offsets[-1] < tokens:
        offsets.append(min(tokens, offsets[-1] + draw.randint(1, longest)))
    return Segments(tuple(offsets))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_pieces_are_every_pair_of_a_sample_once(ranks):
    draw = random.Random(ranks)
    for longest in (1, 2, 5, 11, 24, 24):
        pack = random_pack(24, longest, draw)
        expected = {(q, k) for a, b in pairwise(pack.offsets) for q in range(a, b) for k in range(a, q + 1)}
        found = [seen(pack, ranks, query, key) for query in range(ranks) for key in range(ranks)]
        assert set.union(*found) == expected
        assert sum(map(len, found)) == len(expected)


def chunks_from_both_ends(pack, ranks):
    """Pairs of each rank, were it given the chunks r and 2R − 1 − r of the pack, the zigzag."""
    starts = [start for start, end in pairwise(pack.offsets) for _ in range(start, end)]
    of_chunk = [
        sum(
            t - starts[t] + 1
            for t in range(c * pack.total // (2 * ranks), (c + 1) * pack.total // (2 * ranks))
        )
        for c in range(2 * ranks)
    ]
    return [of_chunk[rank] + of_chunk[-1 - rank] for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_rank_has_the_same_work_in_every_turn(ranks):
    draw, tokens = random.Random(ranks), 8192
    packs = [random_pack(tokens, longest, draw) for longest in (tokens, 3000, 700, 200)]
    for pack in (Segments((0, tokens)), *packs):
        for turn in range(ranks):
            pairs = [piece_of(pack, ranks, rank, (rank - turn) % ranks).pairs for rank in range(ranks)]
            assert max(pairs) < 1.04 * min(pairs), pack
    # which two chunks from both ends of a pack give where one sample fills it, and not where it does not
    whole, half = (
        Segments((0, tokens)),
        Segments((*range(0, tokens // 2, 64), *range(tokens // 2, tokens + 1, tokens // 2))),
    )
    of_whole, of_half = (chunks_from_both_ends(pack, ranks) for pack in (whole, half))
    assert max(of_whole) < 1.04 * min(of_whole)
    assert max(of_half) > 1.5 * min(of_half)
