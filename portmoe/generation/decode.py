"""Decoding: from prompts to the tokens that follow, greedy or by temperature.

Prompts are packed like samples, one segment each, so that a layout which can run a micro-batch forward can
generate. Nothing is kept from one token to the next: a pass computes all tokens anew, which costs little
beside reading, or gathering, all weights as long as prompts and answers are some hundred tokens long.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import nn

from portmoe.data.batch import Batch
from portmoe.model.moe import MoE
from portmoe.ops.attention import Segments
from portmoe.ops.cross_entropy import IGNORED

NextLogits = Callable[[Batch], torch.Tensor]  # a batch with ``asked_B`` → float32 [B,V]


@dataclass(frozen=True)
class Decoding:
    """How to go on.

    Attributes:
        most: tokens of an answer.
        ends: tokens that end an answer; the one that did is its last.
        temperature: 0: always the likeliest token; else one drawn from softmax(logits / temperature).
        seed: of the draws, which are the CPU's: the same on every device for the same logits.
    """

    most: int
    ends: Collection[int] = ()
    temperature: float = 0.0
    seed: int = 0


def generate(
    next_logits: NextLogits,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    multiple: int = 1,
    agreed: Callable[[list[int]], list[int]] = lambda tokens: tokens,
) -> Iterator[dict[int, int]]:
    """Yield the next token of every prompt that has not ended, by the prompt's number, until all have.

    Args:
        prompts: tokens; none is empty.
        multiple: of tokens a batch must have, the rest being padding: what a layout splits it by.
        agreed: what all ranks take of the tokens chosen here: their logits may differ in the last place.

    Raises:
        ValueError: a prompt is empty.
    """
    if not all(prompts):
        raise ValueError("a prompt without a token has nothing to go on from")
    texts = {number: list(prompt) for number, prompt in enumerate(prompts)}
    generator = torch.Generator().manual_seed(decoding.seed)
    for _ in range(decoding.most):
        if not texts:
            return
        logits_BV = next_logits(packed(list(texts.values()), multiple))
        chosen = dict(zip(texts, agreed(_choose(logits_BV, decoding, generator)), strict=True))
        for number, token in chosen.items():
            texts[number].append(token)
            if token in decoding.ends:
                del texts[number]
        yield chosen


def answers(
    next_logits: NextLogits,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    multiple: int = 1,
    agreed: Callable[[list[int]], list[int]] = lambda tokens: tokens,
) -> list[list[int]]:
    """The whole answer to every prompt, with the token that ended it; see ``generate``."""
    found: list[list[int]] = [[] for _ in prompts]
    for chosen in generate(next_logits, prompts, decoding, multiple, agreed):
        for number, token in chosen.items():
            found[number].append(token)
    return found


def packed(texts: Sequence[Sequence[int]], multiple: int = 1) -> Batch:
    """A batch that asks for what follows each text."""
    lengths = [len(text) for text in texts]
    asked_B = torch.tensor(list(accumulate(lengths))) - 1
    padding = -sum(lengths) % multiple
    if padding:
        texts, lengths = [*texts, [0] * padding], [*lengths, padding]
    tokens_T = torch.tensor([token for text in texts for token in text])
    return Batch(
        tokens_T=tokens_T,
        labels_T=torch.full_like(tokens_T, IGNORED),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        types_T=torch.zeros_like(tokens_T),
        segments=Segments((0, *accumulate(lengths)), padded=bool(padding)),
        index=0,
        asked_B=asked_B,
    )


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Set ``model`` to evaluation, without gradients, and with room for every choice in its experts' buffers.

    What a token is answered with then does not depend on the tokens beside it.
    """
    gates = {module: module.gate for module in model.modules() if isinstance(module, MoE)}
    trained = model.training
    for module, gate in gates.items():
        if not gate.dropless:  # a capacity of as many rows as there are tokens
            module.gate = replace(gate, eval_capacity_factor=module.sizes.count / gate.top_k)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(trained)
        for module, gate in gates.items():
            module.gate = gate


def _choose(logits_BV: torch.Tensor, decoding: Decoding, generator: torch.Generator) -> list[int]:
    if decoding.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    scores_BV = logits_BV.double().cpu() / decoding.temperature
    return torch.multinomial(scores_BV.softmax(-1), 1, generator=generator).flatten().tolist()
