"""A thousand random conversations, in all formats and kinds of files, against templates written by hand.

The oracle puts each rendering together from pieces of text and says of each whether it is learned; tokens
are the tokenizers library's own of the whole, and how many bytes each is of is read off the token itself.
"""

import collections
import random

import numpy as np
import pytest
from conversations import conversation, record, trained_tokenizer, write
from tokenizers import Tokenizer

import portmoe
from portmoe.data import open_data
from portmoe.data.sources.opened import open_samples
from portmoe.data.text import parts
from portmoe.data.tokenizing import cache

FORMS = ("alpaca", "sharegpt", "messages", "xtuner")
ENDINGS = (".jsonl", ".json", ".parquet")
# As published for these models, without marks of what is generated.
OWN = {
    "deepseek_v2": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + "
    "message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + "
    "message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}


def deepseek_v2(turns):
    yield "<s>", False
    for role, text in turns:
        if role == "system":
            yield text + "\n\n", False
        elif role == "user":
            yield f"User: {text}\n\n", False
        else:
            yield "Assistant:", False
            yield f" {text}</s>", True


def mixtral(turns):
    yield "<s>", False
    system = "".join(text + "\n\n" for role, text in turns if role == "system")
    for role, text in turns:
        if role == "user":
            yield f"[INST] {system}{text} [/INST]", False
            system = ""
        elif role == "assistant":
            yield f" {text}</s>", True


def chatml(turns):
    for role, text in turns:
        yield f"<|im_start|>{role}\n", False
        yield f"{text}<|im_end|>", role == "assistant"
        yield "\n", False


def internlm2(turns):
    yield "<s>", False
    yield from chatml(turns)


ORACLES = {"deepseek_v2": deepseek_v2, "mixtral": mixtral, "chatml": chatml, "internlm2": internlm2}


def expected(pieces, tokenizer):
    """Tokens of the whole and which are learned: those all of whose bytes are of pieces that are."""
    learned_B = np.concatenate([np.full(len(text.encode()), learned) for text, learned in pieces])
    encoding = tokenizer.encode("".join(text for text, _ in pieces), add_special_tokens=False)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    # A character of a byte-level token is a byte.
    sizes = [len(token.encode()) if token in special else len(token) for token in encoding.tokens]
    assert sum(sizes) == len(learned_B)
    ends = np.cumsum(sizes)
    learned_T = [bool(learned_B[end - size : end].all()) for size, end in zip(sizes, ends, strict=True)]
    return encoding.ids, learned_T


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("conversations")


@pytest.fixture(scope="module")
def written(folder):
    """A thousand conversations, and the files they lie in, in their order."""
    rng, turns = random.Random(2024), []
    (folder / "files").mkdir()
    for number in range(12):
        form, ending = FORMS[number % 4], ENDINGS[number // 4]
        mine = [conversation(rng, form) for _ in range(84)]
        turns += mine
        name = f"{number:02d}-{form}{ending}"
        write(folder / "files" / name, [record(one, form) for one in mine])
    assert len(turns) >= 1000
    return turns, folder / "files"


@pytest.fixture(scope="module")
def tokenizers(folder):
    return {name: trained_tokenizer(folder / f"own-{name}", template=OWN.get(name)) for name in ORACLES}


def opened(folder, files, tokenizer, **keys):
    keys = {"cache_folder": folder / "cache", "seq_len": 4096, "on_bad_sample": "error", **keys}
    said = [f"data.{key}={value}" for key, value in keys.items()]
    config = portmoe.load_config(
        "tiny_moe4",
        [f"data.train_folder={files}", f"data.tokenizer={tokenizer}", *said],
    )
    return open_samples(config, "train")


@pytest.mark.parametrize(
    ("template", "oracle"),
    [*((name, name) for name in ORACLES), *(("tokenizer", name) for name in OWN)],
)
def test_tokens_and_what_is_learned_are_those_of_the_oracle(
    folder, written, tokenizers, monkeypatch, template, oracle
):
    monkeypatch.setattr(parts, "PART", 9000)
    monkeypatch.setattr(parts, "ROWS", 33)
    monkeypatch.setattr(parts, "BLOCK", 1000)
    monkeypatch.setattr(cache, "usable_cores", lambda: 1)
    turns, files = written
    found = opened(folder, files, tokenizers[oracle], chat_template=template)
    tokenizer = Tokenizer.from_file(str(tokenizers[oracle] / "tokenizer.json"))
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    (source,) = found.samples
    assert len(source) == len(turns)
    for index, one in enumerate(turns):
        sample = source.sample(index)
        ids, learned_T = expected(list(ORACLES[oracle](one)), tokenizer)
        assert sample.tokens_T.tolist() == ids
        assert sample.learned_T.tolist() == learned_T
        assert source.lengths[index] == len(ids)
        said = "".join(text for _, text in one)
        if oracle != "chatml":
            assert sample.tokens_T[0] == begin
            assert (sample.tokens_T == begin).sum() == 1 + said.count("<s>")
        if oracle in ("deepseek_v2", "mixtral"):  # pad is the end token here, and it is learned all the same
            assert (sample.tokens_T[-1], sample.learned_T[-1]) == (end, True)


def test_a_source_is_an_entry_of_the_list_and_its_tokens_go_by_its_name(folder, tokenizers):
    rng = random.Random(3)
    for name in ("facts", "poems"):
        turns = [conversation(rng, "messages") for _ in range(30)]
        write(folder / f"{name}.jsonl", [record(one, "messages") for one in turns])
    config = portmoe.load_config(
        "tiny_moe4",
        [
            *(f"data.tokenizer={tokenizers['chatml']}", f"data.cache_folder={folder / 'cache'}"),
            *("data.chat_template=chatml", "data.seq_len=64", "data.micro_bsz=1", "data.packing=cut"),
            f"data.train_folder=[{folder / 'facts.jsonl'}, {folder / 'poems.jsonl'}]",
        ],
    )
    with open_data(config, rank=0, size=1, micro_num=2) as stream:
        counts = collections.Counter()
        for batches in stream.passes():
            for batch in batches:
                assert batch.types == ("facts", "poems")
                counts.update(batch.types_T[batch.labels_T != -100].tolist())
    learned = [
        sum(int(one.sample(i).learned_T[1:].sum()) for i in range(len(one)))
        for one in open_samples(config, "train").samples
    ]
    assert min(learned) > 0
    assert [counts[0], counts[1]] == learned
