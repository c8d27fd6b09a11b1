"""What a config's data come to before anything is trained: samples as the model sees them, lengths, packs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from portmoe.config import Config
from portmoe.data.length import PackSummary, summary
from portmoe.data.packs import packed
from portmoe.data.sources.opened import folders, open_samples, type_names
from portmoe.data.sources.sample import Sample, Samples
from portmoe.data.text.tokenizer import FromFile, open_tokenizer
from portmoe.data.tokenizing.cache import Told, quiet
from portmoe.errors import ConfigError
from portmoe.parallel.layout import Layout

MOST_READ = 20_000  # samples whose tokens are read to count the learned ones
BINS = 12  # of the histogram of lengths

Run = tuple[str, bool]  # text, and whether its tokens are learned


@dataclass(frozen=True)
class Shown:
    """A sample to look at: where it comes from, and its text in runs that are learned or not."""

    place: str
    tokens: int
    runs: list[Run]


@dataclass(frozen=True)
class Preview:
    """What the training data of a config are.

    Attributes:
        sources: by name, how many samples and tokens each has.
        learned: the share of the tokens that are learned, over ``read`` samples.
        edges, counts: how many samples have from edges[i] to edges[i+1] − 1 tokens.
        said: what was left out or cut, and what there is to know, in lines.
        ranks: what the steps are counted for.
    """

    sources: dict[str, tuple[int, int]]
    learned: float
    read: int
    edges: list[int]
    counts: list[int]
    packing: str
    packs: PackSummary
    said: tuple[str, ...]
    shown: list[Shown]
    ranks: int


def preview(config: Config, ranks: int, samples: int, told: Told = quiet) -> Preview:
    """Open the training data as training would; ``samples`` of them, spread over the data, are shown.

    Raises:
        ConfigError: there is no data but the dummy data, or it cannot be used.
        BackendError: a package is missing.
    """
    if not folders(config, "train"):
        raise ConfigError(
            "data.train_folder is null: the benchmark's dummy data are numbers; set it to a folder or "
            "file of conversations or text"
        )
    layout = Layout.plan(config, ranks)
    opened = open_samples(config, "train", told)
    names = type_names(config, "train")
    lengths = np.concatenate([one.lengths for one in opened.samples])
    places = [(one, index) for one in opened.samples for index in _spread(len(one.lengths), MOST_READ)]
    read = [one.sample(index) for one, index in places]
    learned = sum(int(sample.learned_T[1:].sum()) for sample in read)
    all_read = sum(len(sample.tokens_T) for sample in read)
    width = -(-(int(lengths.max()) + 1) // BINS)
    edges = np.arange(0, int(lengths.max()) + 1 + width, width)
    counts, _ = np.histogram(lengths, edges)
    sources: dict[str, tuple[int, int]] = {}
    for one in opened.samples:
        before = sources.get(names[one.type_id], (0, 0))
        sources[names[one.type_id]] = (before[0] + len(one.lengths), before[1] + int(one.lengths.sum()))
    shown = [places[number] for number in _spread(len(places), samples)]
    decode = _decoder(config)
    return Preview(
        sources=sources,
        learned=learned / max(all_read, 1),
        read=len(read),
        edges=edges.tolist(),
        counts=counts.tolist(),
        packing=config.data.packing,
        packs=summary(config, packed(config, opened.samples), layout.data, layout.micro_num),
        said=opened.said,
        shown=[_shown(one, index, decode) for one, index in shown],
        ranks=ranks,
    )


def _spread(count: int, wanted: int) -> list[int]:
    """Numbers below ``count``, at most ``wanted``, evenly spread."""
    wanted = min(count, wanted)
    return [count * number // wanted for number in range(wanted)]


def _decoder(config: Config) -> Callable[[list[int]], str]:
    """What makes text of tokens; of tokens whose tokenizer is not known, their numbers."""
    name = config.data.tokenizer or config.model.from_pretrained
    if name is None:
        return lambda ids: " ".join(map(str, ids)) + " "
    tokenizer = open_tokenizer(name, "data.tokenizer")
    if isinstance(tokenizer, FromFile):
        return lambda ids: tokenizer.fast.decode(ids, skip_special_tokens=False)
    return lambda ids: bytes(token - 3 for token in ids if token >= 3).decode("utf-8", "replace")


def _shown(samples: Samples, index: int, decode: Callable[[list[int]], str]) -> Shown:
    sample = samples.sample(index)
    place = getattr(samples, "place", None)
    return Shown(
        place=place(index) if place else f"sample {index + 1}",
        tokens=len(sample.tokens_T),
        runs=list(_runs(sample, decode)),
    )


def _runs(sample: Sample, decode: Callable[[list[int]], str]) -> Iterator[Run]:
    """Tokens in a row that are all learned, or all not; text as it stands behind what comes before."""
    learned_T, ids, text = sample.learned_T, sample.tokens_T.tolist(), ""
    for last in [*(np.flatnonzero(learned_T[1:] != learned_T[:-1]) + 1).tolist(), len(ids)]:
        whole = decode(ids[:last])
        yield whole[len(text) :], bool(learned_T[last - 1])
        text = whole
