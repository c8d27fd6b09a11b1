"""The engines by name. Looking one up imports neither torch nor the engine's package."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from portmoe.config import Config
from portmoe.errors import BackendError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from portmoe.accelerator.interface import BufferPool
    from portmoe.ops.table import OpTable
    from portmoe.parallel.layout import Layout
    from portmoe.parallel.mesh import Meshes
    from portmoe.training.engine import Engine

OLDEST_DEEPSPEED = (0, 19)


def require_engine(config: Config) -> None:
    """Refuse an engine whose package is not installed here, or too old.

    Raises:
        BackendError: naming what to install.
    """
    if config.trainer.engine != "deepspeed":
        return
    oldest = ".".join(map(str, OLDEST_DEEPSPEED))
    fix = "install it with `pip install \"portmoe[deepspeed]\"`, or set trainer.engine to 'native'"
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        raise BackendError(
            f"trainer.engine='deepspeed' needs the package deepspeed, {oldest} or later, and it is not "
            f"installed; {fix}"
        ) from None
    if tuple(map(int, installed.split(".")[:2])) < OLDEST_DEEPSPEED:
        raise BackendError(
            f"trainer.engine='deepspeed' needs deepspeed {oldest} or later, and {installed} is installed; "
            f"{fix}"
        )


def build_engine(
    config: Config,
    layout: "Layout",
    ops: "OpTable",
    meshes: "Meshes",
    device: "torch.device",
    world: "dist.ProcessGroup",
    pool: "BufferPool | None" = None,
) -> "Engine":
    """The engine ``trainer.engine`` names, with its part of the model initialised. Collective.

    Args:
        ops: the chosen operations.
        world: a CPU process group of all ranks.
        pool: for ``parallel.weight.memory_pool``.

    Raises:
        BackendError: its package is not installed here.
    """
    require_engine(config)
    if config.trainer.engine == "deepspeed":
        from portmoe.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, layout, ops, device, world)
    from portmoe.training.engine import NativeEngine

    return NativeEngine(config, layout, ops, meshes, device, world, pool)
