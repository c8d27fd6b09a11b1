"""What every section of a config is made of, and the section every model has.

Stands below the families, whose sections are built from it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from portmoe.config.keys import SAME_RUN, Key

LARGEST = 2**40  # no count or step in a config is anywhere near it
LARGEST_SIZE = 2**24  # of one dimension: the product of two still fits 64 bits
LARGEST_FLOAT = 2.0**127  # what float32 holds

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
Factor = Annotated[float, Field(ge=0.0, le=1024.0)]
Above0 = Annotated[float, Field(gt=0.0, le=LARGEST_FLOAT)]
NonNegative = Annotated[float, Field(ge=0.0, le=LARGEST_FLOAT)]
Layers = Annotated[int, Field(ge=1, le=4096)]
Experts = Annotated[int, Field(ge=1, le=65536)]
Path = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every section: unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(Section):
    """The ``model`` section as far as all families share it: how a model is trained, not what it is.

    A family adds the keys of its architecture.
    """

    # a folder with config.json, which gives the model, and safetensors; its place may differ by machine
    from_pretrained: Annotated[Path | None, SAME_RUN] = None
    # share of the layers whose activations are recomputed
    checkpoint: Annotated[bool | Fraction, SAME_RUN] = False
    checkpoint_offload: Annotated[bool, SAME_RUN] = False  # what these keep waits in host memory
    num_chunks: Annotated[Layers, SAME_RUN] = 1  # pipeline stages per rank
    dtype: Literal["float32", "tf32", "bfloat16", "float16"] = "bfloat16"
    use_flash_attn: Annotated[bool, Key(same_run=True, asks_for=("attention",))] = True

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_alias(cls, value: Any) -> Any:
        """Take torch's spelling (``torch.bfloat16``, ``torch.half``) as well as the bare name."""
        if isinstance(value, str):
            value = value.removeprefix("torch.")
            value = {"half": "float16", "float": "float32"}.get(value, value)
        return value
