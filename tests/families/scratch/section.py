"""Grouped heads of a free width, a dense first layer, and experts with a shared one beside them."""

from portmoe.config.section import Experts, Layers, ModelSection, Size
from portmoe.families import architecture as arch

MODEL_TYPE = "scratch"


class ModelConfig(ModelSection):
    """Keys of its own."""

    width: Size = 32
    depth: Layers = 3
    queries: Size = 4
    keys: Size = 2
    head: Size = 12
    value: Size = 10
    dense: Size = 40
    expert: Size = 24
    shared: Size = 16
    experts: Experts = 4
    chosen: Experts = 2
    words: Size = 448


def architecture(config):
    model = config.model
    attention = arch.Attention(
        heads=model.queries,
        kv_heads=model.keys,
        head_dim=model.head,
        value_dim=model.value,
        bias=False,
        out_bias=True,
        rotary=arch.Rotary(5000.0, interleaved=True),
    )
    gate = arch.Gate("topk", model.chosen, capacity_factor=1.25, eval_capacity_factor=2.0, min_capacity=2)
    experts = arch.Experts(model.experts, model.expert, gate, shared=arch.Dense(model.shared))
    layers = [arch.Layer(attention, arch.Dense(model.dense))]
    layers += [arch.Layer(attention, experts)] * (model.depth - 1)
    return arch.Architecture(
        vocabulary=model.words,
        hidden=model.width,
        layers=tuple(layers),
        norm_epsilon=1e-6,
        initial=arch.Initial(projection=0.02, router=0.02, vocabulary=0.02),
        nominal_ratio=model.expert / model.width,
        keys={
            "heads": "model.queries",
            "kv_heads": "model.keys",
            "width": "a network's width",
            "experts": "model.experts",
            "top_k": "model.chosen",
            "layers": "model.depth",
            "vocabulary": "model.words",
        },
    )
