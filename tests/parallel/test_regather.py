"""What ``fsp`` keeps and gathers, against ``msp``, on real ranks."""

from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import MODEL, train

import portmoe
from portmoe.model.decoder import Decoder
from portmoe.training import engine as training_engine

GATHER = "all_gather_into_tensor"  # the gathers between tensor-parallel ranks; the engines' have other names
TOKENS, HIDDEN, LAYERS, MICRO_BATCHES = 32, 32, 2, 8  # of the small model
REGIONS = 2 * LAYERS + 1  # attention and feed-forward of each layer, and the head


class Watch(TorchDispatchMode):
    """Counts gathers, and weighs the storages made in a ``with`` block that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.gathers = 0
        self._made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.gathers += function._opname == GATHER
        for leaf in tree_leaves(result):
            if hasattr(leaf, "untyped_storage"):
                storage = leaf.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


def watched(directory, *overrides) -> tuple[int, int]:
    """Gathers in the last step, and the fewest bytes alive after a forward pass: what it keeps.

    What is under way between ranks may be alive beside it.
    """
    alive, gathers = [], 0
    forward, train_step = Decoder.forward, training_engine.NativeEngine.train_step

    def watched_forward(decoder, *args):
        with Watch() as watch:
            output = forward(decoder, *args)
        alive.append(watch.alive())
        return output

    def watched_step(engine, *args, **keywords):
        nonlocal gathers
        with Watch() as watch:
            outcome = train_step(engine, *args, **keywords)
        gathers = watch.gathers
        return outcome

    Decoder.forward, training_engine.NativeEngine.train_step = watched_forward, watched_step
    try:
        train(directory, *overrides, "data.total_steps=2", "parallel.tensor.size=2")
    finally:
        Decoder.forward, training_engine.NativeEngine.train_step = forward, train_step
    return gathers, min(alive)


def test_fsp_keeps_a_part_of_what_enters_a_region_and_gathers_it_again(world, tmp_path):
    """By hand: forward a gather for each region; backward one for what left each, or the embedding."""
    keys = ["model.moe_use_residual=true"]  # four operations of a layer keep its input, and share one gather
    both = {
        mode: world(2).call(watched, tmp_path / mode, f"parallel.tensor.mode={mode}", *keys)
        for mode in ("msp", "fsp")
    }
    for (gathers, alive), (gathers_again, alive_again) in zip(both["msp"], both["fsp"], strict=True):
        assert gathers == MICRO_BATCHES * 2 * REGIONS
        assert gathers_again == MICRO_BATCHES * 3 * REGIONS
        assert alive - alive_again == REGIONS * TOKENS * HIDDEN * 4 // 2  # float32, half of it


def test_the_small_model_is_as_counted_here():
    config = portmoe.load_config("tiny_moe4", MODEL)
    assert (config.data.seq_len, config.model.hidden_size, config.model.num_layers) == (
        TOKENS,
        HIDDEN,
        LAYERS,
    )
    assert config.data.global_batch_size == MICRO_BATCHES
