"""What stays float32 while the rest of the model computes in half precision."""

import pytest
import torch

from portmoe.config import Config
from portmoe.model import Decoder, MoELayer
from portmoe.model.norm import RMSNorm
from portmoe.model.reference_table import reference_table


def make_config(use_fp32_norm=False) -> Config:
    sizes = {
        "dtype": "bfloat16",
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_layers": 2,
        "vocab_size": 200,
    }
    return Config.model_validate(
        {"model": sizes | {"multiple_of": 8}, "data": {"seq_len": 8}, "use_fp32_norm": use_fp32_norm}
    )


def test_parameters_are_float32_whatever_the_models_dtype():
    assert {p.dtype for p in Decoder(make_config()).parameters()} == {torch.float32}


@pytest.mark.parametrize("exact", [True, False])
def test_exact_norms_do_not_round_their_gain(exact):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(64, 1e-5, exact, reference_table())
    with torch.no_grad():
        norm.weight.uniform_(1.0, 2.0, generator=generator)
    x_TH = torch.randn(50, 64, generator=generator).bfloat16()
    x64 = x_TH.double()
    y64 = x64 / (x64.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight.detach().double()
    y_TH = norm(x_TH)
    right = (y_TH == y64.bfloat16()).float().mean()
    assert y_TH.dtype == torch.bfloat16
    assert right > 0.999 if exact else right < 0.9


def test_router_logits_are_exact_for_half_precision_input():
    layer = MoELayer(make_config())
    x_TH = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_TE = layer.router(x_TH)
    expected = x_TH.double() @ layer.router.weight.detach().double().T
    assert logits_TE.dtype == torch.float32
    assert (logits_TE.double() - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_layer_alone_computes_in_its_inputs_dtype(dtype):
    layer = MoELayer(make_config())
    x_TH = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    y_TH = layer(x_TH)
    assert y_TH.shape == x_TH.shape
    assert y_TH.dtype == dtype
    y_TH.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
