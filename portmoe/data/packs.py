"""Which packs a config asks for, and whether they fit the model and the ranks.

Imports numpy but not torch, so that a dry run and the checks of a config stay quick.
"""

from collections.abc import Sequence
from typing import Any

from portmoe.config import Config
from portmoe.config.section import LARGEST_SIZE
from portmoe.data.fingerprint import fingerprint
from portmoe.data.packing import Packing, PackSequence
from portmoe.data.row_packs import RowPacks
from portmoe.data.sources.dummy import DummyDataset
from portmoe.data.sources.opened import Split, folders, open_samples
from portmoe.data.sources.sample import Samples
from portmoe.data.tokenizing.cache import Told, quiet
from portmoe.errors import ConfigError

SAMPLES_PER_RANK = 500  # of the dummy data, fixed by the benchmark


Packs = PackSequence | RowPacks


def open_packs(
    config: Config, size: int, micro_num: int, split: Split = "train", told: Told = quiet
) -> Packs:
    """Open the data of a split for ``size`` data-parallel ranks with ``micro_num`` packs each per step.

    ``told`` hears how far the tokenizing is, where there is any.

    Raises ``ConfigError`` where a folder cannot be used, where the vocabulary is too small for the dummy
    data, or where there is nothing to take (with the benchmark's packing: less than fills one step).
    """
    data = config.data
    folder = data.train_folder if split == "train" else data.valid_folder
    if folder is None:
        # What a model is validated with does not depend on the layout.
        samples = [_open_dummy(config, size if split == "train" else 1)]
        check_vocabulary(config, samples[0].max_token, "the dummy data")
    else:
        samples = open_samples(config, split, told).samples
    packs = packed(config, samples)
    pack_len = data.micro_bsz * data.seq_len
    whole_steps = split == "train" and data.packing == "benchmark"
    needed = micro_num * size if whole_steps else 1  # else rows follow each other, and a validation takes all
    if len(packs) >= needed:
        return packs
    what = f"one step takes {needed} packs (micro_num {micro_num} · data-parallel size {size})"
    message = (
        f"{what if whole_steps else f'the {split} split needs 1 pack or more'} of {pack_len} "
        f"tokens (data.micro_bsz={data.micro_bsz} · data.seq_len={data.seq_len}), "
        f"and there are {len(packs)}: "
    )
    if folder is not None:
        raise ConfigError(
            message
            + f"data.{split}_folder={folder!r} holds {packs.num_tokens} tokens in samples of at least "
            f"data.min_length={data.min_length}; add data or lower one of these sizes"
        )
    enough = _enough_samples(config, len(samples[0]), needed * pack_len)
    fix = f"set data.num_samples to {enough} or more" if enough else "lower one of these sizes"
    raise ConfigError(message + f"data.num_samples={len(samples[0])} is too small; {fix}")


def packed(config: Config, samples: Sequence[Samples]) -> Packs:
    """Lay the samples of some data sets out as ``data.packing`` says."""
    data, seed = config.data, config.run.seed
    if data.packing == "benchmark":
        pack_len = data.micro_bsz * data.seq_len
        return PackSequence([Packing(one, data.seq_len, pack_len) for one in samples], data.micro_bsz, seed)
    return RowPacks(samples, data.packing, data.seq_len, data.micro_bsz, data.use_varlen_attn, seed)


def split_micro_num(config: Config, micro_num: int, split: Split) -> int:
    """Return the packs a rank takes per step of a split, given those it takes per training step."""
    if split == "train" or config.data.valid_micro_num is None:
        return micro_num
    if config.data.valid_micro_num == 0:
        raise ConfigError(
            "data.valid_micro_num=0 leaves nothing to validate with; "
            "set it to 1 or more, or data.valid_every to 0"
        )
    return config.data.valid_micro_num


def check_data(config: Config, size: int, micro_num: int, told: Told = quiet) -> dict[str, dict[str, Any]]:
    """Return what the training data is, and the validation data if used, see ``fingerprint``.

    Raises the ``ConfigError`` that opening them would.
    """
    opened = open_splits(config, size, micro_num, told)
    return {split: fingerprint(packs) for split, packs in opened.items()}


def open_splits(config: Config, size: int, micro_num: int, told: Told = quiet) -> dict[Split, Packs]:
    """Open the training data, and the validation data if used, as ``open_packs`` does.

    ``micro_num`` is that of a training step.
    """
    return {
        split: open_packs(config, size, split_micro_num(config, micro_num, split), split, told)
        for split in _splits(config)
    }


def bad_samples(config: Config) -> list[str]:
    """What of the data was left out or cut, and what there is to know of it, a text a split."""
    said = (open_samples(config, split).said for split in _splits(config) if folders(config, split))
    return ["\n".join(lines) for lines in said if lines]


def _splits(config: Config) -> tuple[Split, ...]:
    return ("train", "valid") if config.data.valid_every else ("train",)


def check_vocabulary(config: Config, largest: int, where: str) -> None:
    """Raise ``ConfigError`` unless ``largest``, the largest token of ``where``, has an embedding."""
    model = config.architecture
    key, vocabulary = model.keys["vocabulary"], model.vocabulary
    if largest >= vocabulary:
        raise ConfigError(
            f"{key}={vocabulary} is too small: the largest token of {where} is {largest}; "
            f"set {key} to {largest + 1} or more"
        )


def _open_dummy(config: Config, size: int) -> DummyDataset:
    num_samples = config.data.num_samples
    if num_samples is None:
        num_samples = SAMPLES_PER_RANK * size
        if num_samples > LARGEST_SIZE:
            raise ConfigError(
                f"data.num_samples=null means {SAMPLES_PER_RANK} samples for each of {size} "
                f"data-parallel ranks, which is over {LARGEST_SIZE}; set data.num_samples to a smaller number"
            )
    return DummyDataset(num_samples, config.data.seq_len, config.data.fixed_random_dataset_seqlen)


def _enough_samples(config: Config, too_few: int, num_tokens: int) -> int | None:
    """Return the fewest dummy samples that hold ``num_tokens``; None where ``LARGEST_SIZE`` do not."""
    seq_len, fixed_length = config.data.seq_len, config.data.fixed_random_dataset_seqlen
    least = -(-num_tokens // seq_len)  # a sample has at most seq_len tokens, and exactly that many if fixed
    if fixed_length or least > LARGEST_SIZE:
        return least if least <= LARGEST_SIZE else None

    def enough(num_samples: int) -> bool:
        return DummyDataset(num_samples, seq_len, fixed_length).lengths.sum() >= num_tokens

    low, high = too_few, least
    while not enough(high):
        low, high = high, 2 * high
        if high > LARGEST_SIZE:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
