"""The published families against the library they are used with: the same folder, the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from published_models import VARIANTS, in_our_layout, their_model
from worlds import records

from portmoe.checkpoint.hub_read import fill
from portmoe.config.read import load_config
from portmoe.data.batch import Batch
from portmoe.data.loader import open_data
from portmoe.generation.decode import Decoding, answering, answers
from portmoe.model import Decoder
from portmoe.model.moe import MoE
from portmoe.ops import Segments
from portmoe.training import hub

pytest.importorskip("transformers")

LENGTHS = (23, 1, 40)  # of the samples of a pack
IGNORED = -100


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(variant)``: their model and the folder it was saved in, once."""
    made = {}

    def of(variant):
        if variant not in made:
            model, folder = their_model(variant), tmp_path_factory.mktemp("saved") / "model"
            model.save_pretrained(folder)
            made[variant] = model, folder
        return made[variant]

    return of


def ours(folder, *overrides, dtype="float32"):
    """The config and the model of a folder, by nothing but its path."""
    file = folder.parent / "from_folder.yaml"
    file.write_text(f"model: {{from_pretrained: {folder}, dtype: {dtype}}}\n")
    config = load_config(file, overrides)
    model, weights = Decoder(config), hub.Weights.of(config)
    fill(dict(model.named_parameters()), weights.made, weights.folder)
    return config, model


def packed(vocabulary=448):
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(vocabulary, (length,), generator=generator) for length in LENGTHS]
    tokens_T = torch.cat(samples)
    labels_T = torch.cat([torch.cat((sample[1:], torch.tensor([IGNORED]))) for sample in samples])
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    positions_T = torch.cat([torch.arange(length) for length in LENGTHS])
    batch = Batch(tokens_T, labels_T, positions_T, torch.zeros_like(tokens_T), Segments((0, *ends)), 0)
    return samples, batch


def their_logits(model, samples):
    """[T,V] of samples laid end to end, each computed alone."""
    return torch.cat([model(input_ids=sample[None]).logits[0] for sample in samples])


def our_logits(model, batch):
    caught = []
    hook = model.norm.register_forward_hook(lambda _, __, x_TH: caught.append(x_TH))
    output = model(batch.tokens_T, batch)
    hook.remove()
    return caught[0].float() @ model.head.weight.T, output


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_routing_and_gradients(variant, saved, monkeypatch):
    theirs, folder = saved(variant)
    _, model = ours(folder, "moe.aux_loss=none")
    samples, batch = packed()
    chosen, route = [], MoE._route

    def recorded(self, *args):
        chosen.append(route(self, *args))
        return chosen[-1]

    monkeypatch.setattr(MoE, "_route", recorded)
    their_chosen = []
    gates = [module.mlp.gate for module in theirs.model.layers if hasattr(module.mlp, "gate")]
    hooks = [gate.register_forward_hook(lambda _, __, out: their_chosen.append(out[2])) for gate in gates]
    expected = their_logits(theirs, samples)
    for hook in hooks:
        hook.remove()
    found, output = our_logits(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    layers = len(gates)
    assert len(chosen) == layers >= 1
    for layer, routing in enumerate(chosen):
        of_samples = torch.cat(their_chosen[layer::layers])
        assert torch.equal(routing.expert_KS.t().sort(1).values, of_samples.sort(1).values)

    labels_T = batch.labels_T
    output.loss_T.sum().backward()
    F.cross_entropy(expected, labels_T, ignore_index=IGNORED, reduction="sum").backward()
    gradients = in_our_layout({n: p.grad for n, p in theirs.named_parameters()}, theirs.config)
    theirs.zero_grad()
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        scale = gradients[name].norm()
        assert scale > 0, name
        assert (parameter.grad - gradients[name]).norm() <= 1e-4 * scale, name


ANSWERED = 24


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_generation(variant, saved):
    """Token by token theirs, several prompts at once, each ending where theirs does."""
    theirs, folder = saved(variant)
    samples, _ = packed()
    prompts = [sample[:length] for sample, length in zip(samples, (23, 1, 11), strict=True)]

    def generated(**options):
        options |= {"do_sample": False, "max_new_tokens": ANSWERED, "pad_token_id": 0}
        with torch.no_grad():
            found = [theirs.generate(prompt[None], **options)[0].tolist() for prompt in prompts]
        return [answer[len(prompt) :] for answer, prompt in zip(found, prompts, strict=True)]

    _, model = ours(folder)
    given = [prompt.tolist() for prompt in prompts]
    free = generated(eos_token_id=None)
    end = free[0][5]  # at the latest the first answer ends with it
    with answering(model):
        for ends, expected in ((set(), free), ({end}, generated(eos_token_id=end))):
            decoding = Decoding(ANSWERED, ends)
            assert answers(lambda b: model(b.tokens_T, b), given, decoding, 16) == expected
    assert len(expected[0]) <= 6
    assert expected[0][-1] == end


WITH_A_LOSS = [name for name in VARIANTS if not name.startswith("deepseek")]


@pytest.mark.parametrize("variant", WITH_A_LOSS)
def test_the_auxiliary_loss_is_theirs_with_and_without_padding(variant, saved):
    theirs, folder = saved(variant)
    config, model = ours(folder)
    samples, _ = packed()
    sample = samples[0]
    out = theirs(input_ids=sample[None], labels=sample[None], output_router_logits=True)
    none_T, length = torch.zeros_like(sample), len(sample)
    labels_T = torch.cat((sample[1:], torch.tensor([IGNORED])))
    for padding in (0, 5):
        pad_P = torch.zeros(padding, dtype=torch.int64)
        tokens_T = torch.cat((sample, pad_P))
        offsets = (0, length, length + padding) if padding else (0, length)
        positions_T = torch.cat((torch.arange(length), torch.arange(padding)))
        batch = Batch(
            tokens_T,
            torch.cat((labels_T, pad_P + IGNORED)),
            positions_T,
            torch.cat((none_T, pad_P)),
            Segments(offsets, padded=bool(padding)),
            0,
        )
        output = model(tokens_T, batch)
        coefficient = config.architecture.balance.coefficient
        assert coefficient == 0.05
        torch.testing.assert_close(output.aux_loss, out.aux_loss, rtol=1e-5, atol=0)
        loss = output.loss_T.sum() / (length - 1) + coefficient * output.aux_loss
        torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=0)
    theirs.zero_grad()
    out.loss.backward()
    loss.backward()
    gradients = in_our_layout({n: p.grad for n, p in theirs.named_parameters()}, theirs.config)
    theirs.zero_grad()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-4 * gradients[name].norm(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_as_far_from_float32_as_theirs(variant, saved):
    """Both round after every operation: logits are at most half as far again from float32 as theirs.

    The median of the tokens, since rounding may send one to another expert.
    """
    theirs, folder = saved(variant)
    samples, batch = packed()
    with torch.no_grad():
        exact = their_logits(theirs, samples)
        _, model = ours(folder, dtype="bfloat16")
        found = our_logits(model, batch)[0]
        half = their_logits(theirs.to(torch.bfloat16), samples).float()
    theirs.to(torch.float32)
    of_ours, of_theirs = ((logits - exact).norm(dim=1).median() for logits in (found, half))
    assert 0 < of_ours <= 1.5 * of_theirs


STEPS = 20
TRAINING = [
    "data.seq_len=32",
    "data.micro_bsz=2",
    "data.micro_num=2",
    "data.num_samples=200",
    f"data.total_steps={STEPS}",
    "hybrid_zero_optimizer.clip_grad_norm=0",
    "adam.weight_decay=0",
    "adam.lr=1e-4",
    "adam.adam_beta2=0.999",
    "lr_scheduler.warmup_ratio=0",
    "lr_scheduler.eta_min=1e-4",
    "moe.aux_loss=none",
    "ckpt.enable_save_ckpt=false",
]


def train(file, overrides):
    from portmoe.training.run import train

    train(load_config(file, overrides), "from_folder", "cpu", "torchrun")


@pytest.mark.parametrize("variant", ["mixtral", "deepseek_v2, latent queries, groups, yarn"])
def test_twenty_steps(variant, saved, world, tmp_path):
    _, folder = saved(variant)
    file = tmp_path / "from_folder.yaml"
    file.write_text(f"model: {{from_pretrained: {folder}, dtype: float32}}\n")
    overrides = [*TRAINING, f"run.directory={tmp_path / 'run'}"]
    world(1).call(train, file, overrides)
    found = [record["loss"] for record in records(tmp_path / "run")]

    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    expected, unequal = [], False
    with open_data(load_config(file, overrides), rank=0, size=1, micro_num=2) as data:
        for step in range(STEPS):
            batches = data.batches(step)
            labels = [int((batch.labels_T != IGNORED).sum()) for batch in batches]
            unequal = unequal or labels[0] != labels[1]
            expected.append(0.0)
            for batch in batches:  # every labelled token of the step weighs alike
                samples = batch.tokens_T.split(batch.segments.lengths)
                logits_TV = their_logits(theirs, samples)
                loss = F.cross_entropy(logits_TV, batch.labels_T, ignore_index=IGNORED, reduction="sum")
                (loss / sum(labels)).backward()
                expected[-1] += loss.item() / sum(labels)
            optimizer.step()
            optimizer.zero_grad()
    assert len(found) == STEPS
    assert unequal
    assert expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=1e-5)
