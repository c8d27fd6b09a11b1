"""What one step consumes."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from portmoe.config.keys import OF_THE_DATA, SAME_RUN, no_effect
from portmoe.config.section import LARGEST_SIZE, Count, NonNegative, Path, Positive, Section, Size

Format = Literal["auto", "alpaca", "sharegpt", "messages", "xtuner", "text"]
Paths = Annotated[list[Path], Field(min_length=1, max_length=64)]


class DataConfig(Section):
    """What one step consumes. One micro-batch is one pack of micro_bsz · seq_len tokens."""

    seq_len: Size = 2048
    micro_num: Annotated[Size, SAME_RUN] = 1
    micro_bsz: Size = 1
    # sequences; set: micro_num follows from it
    global_batch_size: Annotated[Positive | None, SAME_RUN] = None
    # sequences; a larger global batch is refused
    max_global_batch_size: Annotated[Positive | None, SAME_RUN] = None
    # null is micro_num
    valid_micro_num: Annotated[Annotated[int, Field(ge=0, le=LARGEST_SIZE)] | None, SAME_RUN] = None
    valid_every: Annotated[Count, SAME_RUN] = 0  # steps between validations, 0: none
    pack_sample_into_one: Literal[False] = False
    # what fills the rows of seq_len tokens, see docs/finetune.md; the published models' default is cut
    packing: Literal["benchmark", "cut", "whole", "none"] = "benchmark"
    use_varlen_attn: bool = True  # false: attention crosses the samples of a row, as its positions do
    total_steps: Annotated[Positive | None, SAME_RUN] = 50  # null: what num_epochs makes
    num_epochs: Annotated[Positive | None, SAME_RUN] = None  # null: total_steps, whatever epochs they make
    skip_batches: str = ""  # steps passed over, as "3,10-12"
    rampup_batch_size: Literal[""] | None = ""
    min_length: Annotated[Count, OF_THE_DATA] = 50  # shorter samples of a tokenized data set are left out
    # a folder or file, or a list of them, each a source of its own; null: the built-in dummy data
    train_folder: Annotated[Path | Paths | None, OF_THE_DATA] = None
    valid_folder: Annotated[Path | Paths | None, SAME_RUN] = None
    # auto: a folder with .bin files is tokenized, others are known by their first record
    format: Annotated[Format, OF_THE_DATA] = "auto"
    tokenizer: Annotated[Path | None, OF_THE_DATA] = None  # a folder; null: that of model.from_pretrained
    chat_template: Annotated[Path, OF_THE_DATA] = "tokenizer"  # its own, a packaged one's name, or FILE.jinja
    train_on: Annotated[Literal["assistant", "last_turn", "all"], OF_THE_DATA] = "assistant"
    on_bad_sample: Annotated[Literal["skip", "error"], SAME_RUN] = "skip"
    cache_folder: Annotated[Path | None, SAME_RUN] = None  # of what was tokenized; null: the user's cache
    # of the dummy data; null: 500 · data-parallel size, and 500 to validate with
    num_samples: Annotated[Size | None, OF_THE_DATA] = None
    fixed_random_dataset_seqlen: bool = True
    empty_cache_and_diag_interval: Annotated[Count, no_effect("memory is not emptied between steps")] = 200
    diag_outlier_ratio: Annotated[NonNegative, no_effect("slow ranks are not diagnosed")] = 1.1

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, values: Any) -> Any:
        """With epochs, the number of steps is the data's to say."""
        if isinstance(values, dict) and values.get("num_epochs") is not None:
            return {"total_steps": None} | values
        return values

    @model_validator(mode="after")
    def _some_length(self) -> "DataConfig":
        if self.total_steps is None and self.num_epochs is None:
            raise ValueError(
                "data.total_steps=null and data.num_epochs=null leave open how long the run is; set one"
            )
        return self

    @field_validator("skip_batches")
    @classmethod
    def _skip_batches_parse(cls, text: str) -> str:
        parse_step_ranges(text)
        return text

    @model_validator(mode="after")
    def _batch_within_limit(self) -> "DataConfig":
        batch, limit = self.global_batch_size, self.max_global_batch_size
        if batch is not None and limit is not None and batch > limit:
            raise ValueError(
                f"data.global_batch_size={batch} is over data.max_global_batch_size={limit}; "
                f"set data.global_batch_size to {limit} or less"
            )
        return self

    def largest_token(self) -> int | None:
        """The largest token the dummy data can hold, whatever is drawn; None for data from a folder.

        A sample is its block length n, its number of blocks r, then the blocks. r starts below 200
        and doubles until n · r reaches seq_len, so n = 1 takes it furthest.
        """
        if self.train_folder is not None:
            return None
        blocks = range(10, 200)
        if not self.fixed_random_dataset_seqlen:
            return blocks[-1]
        return max(r << max(0, (-(-self.seq_len // r) - 1).bit_length()) for r in blocks)


def parse_step_ranges(text: str) -> list[range]:
    """Read "3,10-12" as [range(3, 4), range(10, 13)]; a ValueError names the part that is no range."""
    ranges = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = part.partition("-")
        if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
            raise ValueError(f"{part!r} is neither a step nor a range of steps, as in '3,10-12'")
        ranges.append(range(int(first), int(last or first) + 1))
        if not ranges[-1]:
            raise ValueError(f"{part!r} ends before it begins; write the smaller step first")
    return ranges
