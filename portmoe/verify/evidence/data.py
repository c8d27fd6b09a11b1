"""The batches of recorded steps, drawn again from the data where it lies here."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from portmoe.config import Config
from portmoe.data import Batch, DataStream, open_data
from portmoe.data.fingerprint import described
from portmoe.data.packs import check_data
from portmoe.errors import ConfigError
from portmoe.ops.cross_entropy import IGNORED
from portmoe.result import Result
from portmoe.training.metrics import CRC32S
from portmoe.verify.evidence.chain import Walk
from portmoe.verify.evidence.directory import Directory
from portmoe.verify.evidence.steps import tokens_per_step

PART = "data"
# Of what is drawn again, spread over the run.
MOST_STEPS, MOST_TOKENS = 200, 2**25
FEWEST_STEPS = 8


def check_batches(directory: Directory, walked: Walk) -> Iterator[Result]:
    """Draw the global batches of some steps again and hold their checksums and counts to the record."""
    config, fingerprint = directory.config, directory.environment.get("data")
    records = [record for _, record in directory.records]
    if config is None or not records:
        return
    if not fingerprint or "data_crc32" not in records[0]:
        yield _skipped("the run does not say what its data was")
        return
    # Of the last start: an earlier one may have had other data, where ckpt.allow_changed_data lets it.
    since = walked.starts[-1].first_step if walked.starts and config.ckpt.allow_changed_data else 0
    lines = [(line, record) for line, record in directory.records if record["step"] >= since]
    micro_num, rest = divmod(tokens_per_step(records), config.data.micro_bsz * config.data.seq_len)
    if rest or not micro_num:
        return  # said where tokens are counted
    here = _as_recorded(config, fingerprint)
    try:
        found = check_data(here, 1, micro_num)["train"]
        stream = open_data(here, rank=0, size=1, micro_num=micro_num)
    except ConfigError as error:
        yield _skipped(f"the data is not here: {error}")
        return
    with stream:
        if found != fingerprint["train"]:
            there = described(fingerprint["train"])
            yield _skipped(f"the data here is other data: {described(found)}, and the run had {there}")
            return
        unlike = 0
        most = max(FEWEST_STEPS, min(MOST_STEPS, MOST_TOKENS // tokens_per_step(records)))
        chosen = lines[:: max(1, -(-len(lines) // most))]
        for line, record in chosen:
            if apart := _apart(record, stream):
                unlike += 1
                yield Result("fail", "is that of the data", apart, subject=line.place, part=PART)
    if not unlike:
        detail = f"{len(chosen)} of {len(lines)} steps drawn again: checksums and counts"
        yield Result("pass", "is that of the data", detail, subject="batch", part=PART)


def _as_recorded(config: Config, fingerprint: Mapping[str, Mapping[str, Any]]) -> Config:
    """With as many dummy samples as the run had, whatever its number of ranks."""
    update: dict[str, Any] = {"valid_every": 0}
    if config.data.train_folder is None:
        update["num_samples"] = fingerprint["train"]["samples"]
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def _apart(record: Mapping[str, Any], stream: DataStream) -> str:
    batches = stream.batches(record["step"])
    expected = {
        "data_crc32": f"{sum(batch.crc32 for batch in batches) % CRC32S:08x}",
        "largest_length": max(batch.longest_segment for batch in batches),
        **{f"tokens/{name}": count for name, count in _labelled(batches).items()},
    }
    if "padding_share" in record:  # which older runs do not have
        padding = sum(batch.padding for batch in batches)
        expected["padding_share"] = padding / sum(len(batch.tokens_T) for batch in batches)
    unlike = {key: value for key, value in expected.items() if record.get(key) != value}
    return "; ".join(f"{key} is {record.get(key)}, and of this step {value}" for key, value in unlike.items())


def _labelled(batches: Sequence[Batch]) -> dict[str, int]:
    counts: Counter[int] = Counter()
    for batch in batches:
        counts.update(batch.types_T[batch.labels_T != IGNORED].tolist())
    return {name: counts[number] for number, name in enumerate(batches[0].types)}


def _skipped(detail: str) -> Result:
    return Result("skip", "is that of the data", detail, subject="batch", part=PART)
