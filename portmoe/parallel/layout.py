"""How many ranks do what: the sizes of every parallel group and of the batch, as plain arithmetic.

Contradictions that hold for any number of ranks are refused by ``portmoe.config``; those that
depend on it are refused here. No torch: the command line plans
before it starts a process.
"""

import math
from dataclasses import dataclass

from portmoe.config import Config
from portmoe.config.sections.data import DataConfig
from portmoe.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """The resolved sizes of one run.

    Attributes:
        world: ranks in all = data · tensor · pipeline.
        data: ranks that see different samples.
        tensor: ranks that share one layer, or that split the tokens of one micro-batch (isp mode,
            ``parallel.sequence.size``).
        ring: groups of these that keys and values go around; in each the ranks split the heads.
        pipeline: stages.
        replicas: ranks that compute with the same weights: ``data``, where tokens are split data · tensor.
        zero1: ranks the masters and moments are sharded over; it divides ``replicas``.
        moments: ranks the moments of each of these shards are sharded over again; 1 where ``weight`` is 1.
        sequence: ranks the tokens of a micro-batch are split over between the regions that ``tensor`` shares.
        weight: ranks the parameters are sharded over in isp mode; 1: they are not. Else equal to ``zero1``.
        expert: ranks the experts are spread over; it divides ``replicas`` and the number of experts. 1: every
            rank computes every expert.
        micro_num: micro-batches per rank and step; follows from ``data.global_batch_size`` where that is set.
        micro_bsz: sequences per micro-batch.
        seq_len: tokens per sequence.
    """

    world: int
    data: int
    tensor: int
    ring: int
    pipeline: int
    replicas: int
    zero1: int
    moments: int
    sequence: int
    weight: int
    expert: int
    micro_num: int
    micro_bsz: int
    seq_len: int

    @classmethod
    def plan(cls, config: Config, world_size: int) -> "Layout":
        """The layout of ``config`` on ``world_size`` ranks.

        Raises:
            ConfigError: the sizes cannot be met with this number of ranks, the global batch cannot be
                divided or is over its limit.
        """
        if world_size < 1:
            raise ConfigError(f"the number of ranks is {world_size}; it must be at least 1")
        parallel = config.parallel
        (shared_by, tensor), pipeline = parallel.shared_by, parallel.pipeline.size
        if world_size % (tensor * pipeline):
            below, above = _multiples_around(world_size, tensor * pipeline)
            raise ConfigError(
                f"{shared_by}={tensor} · parallel.pipeline.size={pipeline} = {tensor * pipeline} "
                f"does not divide the {world_size} ranks; use {_either(below, above)} ranks or change one of "
                "the two"
            )
        data = world_size // (tensor * pipeline)
        micro_num = _micro_num(config.data, data)
        _check_schedule(config, micro_num)
        _check_tensor(config)
        replicas = data * tensor if parallel.mode == "isp" else data
        weight = _dividing("parallel.weight.size", parallel.weight.size, replicas)
        spread = parallel.expert.size or _most_expert_ranks(config, data)
        expert = _dividing("parallel.expert.size", spread, replicas)
        return cls(
            world=world_size,
            data=data,
            tensor=tensor,
            ring=parallel.sequence.size
            // math.gcd(parallel.sequence.size, config.architecture.heads["kv_heads"]),
            pipeline=pipeline,
            replicas=replicas,
            zero1=weight if weight > 1 else _zero1(parallel.zero1.size, replicas),
            moments=_moments(parallel.zero1.size, replicas // weight) if weight > 1 else 1,
            sequence=1 if parallel.mode == "mtp" else tensor,
            weight=weight,
            expert=expert,
            micro_num=micro_num,
            micro_bsz=config.data.micro_bsz,
            seq_len=config.data.seq_len,
        )

    def __str__(self) -> str:
        """The groups, as shown at the start of a run."""
        shared = "sequence" if self.replicas > self.data else "tensor"
        groups = {"data": self.data, shared: self.tensor, "pipeline": self.pipeline}
        state = self.zero1 * self.moments
        shards = {"optimizer state": state, "weights": self.weight, "experts": self.expert}
        parts = [f"{name} {size}" for name, size in groups.items()]
        parts += [f"a ring of {self.ring}"] * (self.ring > 1)
        parts += [f"{name} over {size}" for name, size in shards.items()]
        return f"{self.world} rank{'s' if self.world > 1 else ''}: {', '.join(parts)}"

    @property
    def expert_shards(self) -> int:
        """Ranks the optimizer state of an expert is sharded over: ``zero1`` of those that hold it, or all."""
        return math.gcd(self.replicas // self.expert, self.zero1)

    @property
    def global_batch_sequences(self) -> int:
        """Sequences per step over all ranks."""
        return self.micro_bsz * self.micro_num * self.data

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens of one pack, over the ranks that share it."""
        return self.micro_bsz * self.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step over all ranks."""
        return self.global_batch_sequences * self.seq_len


def most_ranks(config: Config) -> int | None:
    """The number of ranks at which the global batch reaches its limit; None if nothing limits it.

    0: a single data-parallel rank is over the limit already.
    """
    data = config.data
    if data.max_global_batch_size is None or data.global_batch_size is not None:
        return None
    shares = config.parallel.shared_by[1] * config.parallel.pipeline.size
    return data.max_global_batch_size // (data.micro_bsz * data.micro_num) * shares


def _check_tensor(config: Config) -> None:
    """What the tensor-parallel ranks share, beside heads, must divide evenly among them."""
    (key_of_size, size), mode, model = config.parallel.shared_by, config.parallel.mode, config.architecture
    if size == 1:
        return
    shared: set[tuple[str, int]] = set()
    if mode != "isp":
        shared |= {(model.keys["vocabulary"], model.vocabulary)}
        shared |= {(model.keys["width"], width) for width in model.widths}
    if mode != "mtp":
        shared |= {("data.micro_bsz · data.seq_len", config.data.micro_bsz * config.data.seq_len)}
    for key, value in sorted(shared):
        if value % size:
            raise ConfigError(
                f"{key}={value} must be a multiple of {key_of_size}={size}; change one of the two"
            )


def _zero1(size: int, replicas: int) -> int:
    return _dividing("parallel.zero1.size", size, replicas) if size > 0 else replicas


def _moments(size: int, holders: int) -> int:
    """Ranks the moments of a shard of the weights are sharded over, of the ``holders`` of that shard."""
    if size <= 0 or size == holders:
        return holders
    if size == 1:
        return 1
    raise ConfigError(
        f"parallel.zero1.size={size} with parallel.weight.size: the moments of a shard of the weights lie on "
        f"each of the {holders} ranks that hold it, or are sharded over all of them; set "
        f"parallel.zero1.size to 1 or {holders}"
    )


def _check_schedule(config: Config, micro_num: int) -> None:
    """What torch's 1F1B schedules need of the number of micro-batches."""
    size, chunks = config.parallel.pipeline.size, config.model.num_chunks
    given = config.data.global_batch_size is None
    key = "data.micro_num" if given else "micro_num, from data.global_batch_size,"
    fix = "data.micro_num" if given else "the micro-batches per rank"
    if micro_num < size:
        raise ConfigError(
            f"{key}={micro_num} is fewer than the ranks of the pipeline, parallel.pipeline.size={size}; "
            f"set {fix} to at least {size}"
        )
    rounds = micro_num // size
    if chunks > 1 and micro_num % rounds:
        below = next(n for n in range(micro_num, 0, -1) if n % (n // size) == 0)
        above = next(n for n in range(micro_num, 2 * micro_num) if n % (n // size) == 0)
        raise ConfigError(
            f"{key}={micro_num} cannot be divided into {rounds} equal rounds, as model.num_chunks={chunks} "
            f"(the interleaved schedule) needs with parallel.pipeline.size={size}; set {fix} to {below} or "
            f"{above}"
        )


def _most_expert_ranks(config: Config, data: int) -> int:
    """Ranks to spread experts over, ``parallel.expert.size`` being null; only the native engine does.

    What ``moe.expert_in_one_shard`` computes at a time stays together.
    """
    together = config.expert_shard or 1
    counts = [experts.count // together for experts in config.architecture.expert_layers] or [1]
    return math.gcd(data, *counts) if config.trainer.engine == "native" else 1


def _micro_num(data: DataConfig, ranks: int) -> int:
    """Micro-batches per rank, from ``data.global_batch_size`` or as given."""
    per_round = data.micro_bsz * ranks
    limit = data.max_global_batch_size
    if data.global_batch_size is None:
        batch = per_round * data.micro_num
        if limit is not None and batch > limit:
            raise ConfigError(
                f"the global batch of {batch} sequences (data.micro_bsz={data.micro_bsz} · data.micro_num="
                f"{data.micro_num} · {ranks} data-parallel ranks) is over data.max_global_batch_size={limit};"
                + (
                    f" set data.micro_num to at most {limit // per_round}"
                    if per_round <= limit
                    else f" set data.micro_bsz to at most {limit // ranks} and data.micro_num to 1"
                    if ranks <= limit
                    else f" use at most {limit} data-parallel ranks"
                )
            )
        return data.micro_num
    if data.global_batch_size % per_round:
        below, above = _multiples_around(data.global_batch_size, per_round)
        if limit is not None and above > limit:
            above = 0
        nearest = _either(below, above)
        fix = f"set data.global_batch_size to {nearest}" if nearest else "use fewer ranks"
        each, rest = divmod(data.global_batch_size, ranks)
        if not rest:
            micro_bsz = max(size for size in range(1, min(data.micro_bsz, each) + 1) if each % size == 0)
            fix += f", or data.micro_bsz to {micro_bsz}"
        raise ConfigError(
            f"data.global_batch_size={data.global_batch_size} cannot be divided over {ranks} data-parallel "
            f"ranks with data.micro_bsz={data.micro_bsz}: it must be a multiple of {per_round}; {fix}"
        )
    return data.global_batch_size // per_round


def _dividing(key: str, size: int, group: int) -> int:
    """``size``, checked to divide the ``group`` of ranks it is cut from."""
    if group % size:
        possible = [n for n in range(1, group + 1) if group % n == 0]
        near = sorted(sorted(possible, key=lambda n: abs(n - size))[:2])
        raise ConfigError(
            f"{key}={size} must divide the group of {group} ranks it is cut from; "
            f"nearest possible: {' or '.join(map(str, near))}"
        )
    return size


def _multiples_around(value: int, step: int) -> tuple[int, int]:
    """The multiples of ``step`` just below and just above ``value``; 0 below means there is none."""
    below = value // step * step
    return below, below + step


def _either(below: int, above: int) -> str:
    """The numbers that are not 0, joined by "or"."""
    return " or ".join(str(number) for number in (below, above) if number)
