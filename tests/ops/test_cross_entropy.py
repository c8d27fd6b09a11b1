"""cross_entropy, every implementation, against its definition token by token in float64."""

import copy
from functools import partial

import pytest
import torch

from portmoe.backends.cpu import compiler
from portmoe.backends.cpu import cross_entropy as compiled_cross_entropy
from portmoe.backends.torch import cross_entropy as chunked
from portmoe.ops import cross_entropy
from portmoe.ops.cross_entropy import CutVocabulary, Statistics, merged

FUNCTIONS = {"reference": cross_entropy, "chunked": chunked.ChunkedCrossEntropy()}
if not isinstance(compiler.kernels(), str):  # there is a compiler
    FUNCTIONS["compiled"] = compiled_cross_entropy.ALL[0].function


def definition(x, weight, labels, smoothing):
    losses, classes = [], weight.shape[0]
    for row, label in zip(x, labels.tolist(), strict=True):
        logits = weight @ row
        log_p = logits - logits.max() - (logits - logits.max()).exp().sum().log()
        target = smoothing / classes + (1 - smoothing) * (torch.arange(classes) == label)
        losses.append(-(log_p * target).sum() if label >= 0 else row.sum() * 0)
    return torch.stack(losses)


def case(tokens=9, hidden=8, classes=29, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens * classes)
    x_TH = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weight_VH = torch.randn(classes, hidden, generator=generator).to(dtype).requires_grad_()
    labels_T = torch.randint(classes, (tokens,), generator=generator)
    labels_T[::4] = -100
    return x_TH, weight_VH, labels_T, torch.randn(tokens, generator=generator)


@pytest.fixture(
    params=[(1, 40), (37, 0), (37, 30), (67 * 64, 67 * 64), (10**6, 10**6)],
    ids=lambda p: "slice of {} logits, {} kept".format(*p),
)
def slice_elements(request, monkeypatch):
    for function in FUNCTIONS.values():
        if isinstance(function, chunked.ChunkedCrossEntropy):
            monkeypatch.setattr(function, "slice_logits", request.param[0])
    monkeypatch.setattr(chunked, "KEPT_LOGITS", request.param[1])


@pytest.mark.usefixtures("slice_elements")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("sizes", [{}, {"tokens": 67, "classes": 101}], ids=["few", "more"])
def test_forward_and_gradients(function, smoothing, dtype, tolerance, sizes):
    x_TH, weight_VH, labels_T, grad_T = case(dtype=dtype, **sizes)
    loss_T, correct_T = function(x_TH, weight_VH, labels_T, smoothing)
    assert loss_T.dtype == torch.float32
    assert correct_T.dtype == torch.bool
    doubles = [t.detach().double().requires_grad_() for t in (x_TH, weight_VH)]
    expected = definition(*doubles, labels_T, smoothing)
    torch.testing.assert_close(loss_T.double(), expected, rtol=tolerance, atol=tolerance)
    assert (loss_T[labels_T == -100] == 0).all()
    ours = torch.autograd.grad(loss_T, (x_TH, weight_VH), grad_T)
    theirs = torch.autograd.grad(expected, doubles, grad_T.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def of_ranks(function, x_TH, weight_VH, labels_T, smoothing, ranks):
    """Each rank's results, its classes being one of ``ranks`` equal runs of all."""
    parts = weight_VH.chunk(ranks)
    assert len({len(part) for part in parts}) == 1
    seen = {}

    def call(rank, combine):
        cut = CutVocabulary(rank * len(parts[0]), len(weight_VH), combine)
        return function(x_TH, parts[rank], labels_T, smoothing, cut)

    def sent(rank, mine):
        seen[rank] = copy.deepcopy(mine)
        return mine

    for rank in range(ranks):
        call(rank, partial(sent, rank))
    together = [torch.stack([vars(seen[rank])[name] for rank in range(ranks)]) for name in vars(seen[0])]
    return [call(rank, lambda mine: merged(Statistics(*together))) for rank in range(ranks)]


@pytest.mark.usefixtures("slice_elements")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_vocabulary_that_is_cut(function, smoothing, dtype, tolerance, ranks):
    x_TH, weight_VH, labels_T, grad_T = case(tokens=67, classes=4 * 25, dtype=dtype)
    doubles = [t.detach().double().requires_grad_() for t in (x_TH, weight_VH)]
    expected = definition(*doubles, labels_T, smoothing)
    grad_x_TH, grad_weight_VH = torch.autograd.grad(expected, doubles, grad_T.double())
    predicted_T = (x_TH @ weight_VH.t()).argmax(dim=1)
    summed_TH, rows_VH = torch.zeros_like(doubles[0]), []
    for loss_T, correct_T in of_ranks(function, x_TH, weight_VH, labels_T, smoothing, ranks):
        torch.testing.assert_close(loss_T.double(), expected, rtol=tolerance, atol=tolerance)
        assert (loss_T[labels_T == -100] == 0).all()
        if dtype == torch.float32:
            assert torch.equal(correct_T, predicted_T == labels_T)
        part_TH, part_VH = torch.autograd.grad(loss_T, (x_TH, weight_VH), grad_T)
        summed_TH += part_TH.double()
        rows_VH.append(part_VH.double())
    torch.testing.assert_close(summed_TH, grad_x_TH, rtol=tolerance, atol=tolerance * ranks)
    torch.testing.assert_close(sum(rows_VH), grad_weight_VH, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_of_equal_logits_on_two_ranks_the_lower_class_is_predicted(function):
    x_TH, weight_VH = torch.ones(4, 1), torch.tensor([[0.0], [2.0], [2.0], [1.0]])
    for _, correct_T in of_ranks(function, x_TH, weight_VH, torch.tensor([1, 2, 0, -100]), 0.0, 2):
        assert correct_T.tolist() == [True, False, False, False]


@pytest.mark.usefixtures("slice_elements")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_correct_is_the_first_class_of_highest_logit(function):
    x_TH = torch.tensor([[1.0], [1.0], [1.0], [-1.0], [1.0]])
    weight_VH = torch.tensor([[0.0], [2.0], [2.0], [1.0]])
    labels_T = torch.tensor([1, 2, 0, 0, -100])
    _, correct_T = function(x_TH, weight_VH, labels_T, 0.0)
    assert correct_T.tolist() == [True, False, False, True, False]


@pytest.mark.usefixtures("slice_elements")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_large_logits_and_ignored_tokens(function):
    x_TH = torch.tensor([[300.0], [-300.0], [300.0]], requires_grad=True)
    weight_VH = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss_T, _ = function(x_TH, weight_VH, torch.tensor([1, 1, -100]), 0.0)
    assert loss_T.tolist() == [600.0, 0.0, 0.0]
    loss_T.sum().backward()
    assert x_TH.grad.flatten().tolist() == [2.0, 0.0, 0.0]
    assert weight_VH.grad.flatten().tolist() == [300.0, -300.0, 0.0]


@pytest.mark.usefixtures("slice_elements")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_no_tokens_and_only_one_gradient_wanted(function):
    x_TH, weight_VH, labels_T, grad_T = case()
    loss_T, correct_T = function(x_TH[:0], weight_VH, labels_T[:0], 0.0)
    assert loss_T.shape == correct_T.shape == (0,)
    (grad_VH,) = torch.autograd.grad(loss_T.sum(), weight_VH)
    assert (grad_VH == 0).all()
    for wanted, frozen in [(0, 1), (1, 0)]:
        leaves = [x_TH.detach(), weight_VH.detach()]
        leaves[wanted].requires_grad_()
        loss_T, _ = function(*leaves, labels_T, 0.0)
        (loss_T * grad_T).sum().backward()
        assert leaves[wanted].grad.abs().sum() > 0
        assert leaves[frozen].grad is None


def test_chunked_never_computes_more_than_a_slice_and_keeps_the_first_ones(monkeypatch):
    widths = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(chunked, "KEPT_LOGITS", 9 * 19)
    monkeypatch.setattr(chunked.F, "linear", lambda x, w: widths.append(len(w)) or linear(x, w))
    x_TH, weight_VH, labels_T, grad_T = case()
    loss_T, _ = chunked.ChunkedCrossEntropy(slice_logits=9 * 10)(x_TH, weight_VH, labels_T, 0.0)
    (loss_T * grad_T).sum().backward()
    assert widths == [10, 10, 9, 10, 9]
