"""Random conversations, files of them in every format, and small tokenizers trained on the spot."""

import json
import random

import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = [
    *("the", "a", "moe", "expert", "router", "token", "42", "3.14", "naïve", "森林", "很", "好", "лес", "🙂"),
    *("👩\u200d💻", "e\u0301", "x=1;", "don't", "User:", "Assistant:", "[INST]", "[/INST]", "<|im_end|>"),
    *(
        "</s>",
        "<s>",
        "<|im_start|>assistant",
        "system:",
        "###",
        "```",
        "{{x}}",
        "{% y %}",
        "&lt;",
        "“q”",
        "&",
    ),
]
SPACES = [" ", " ", " ", " ", "\n", "\n\n", "  ", "\t", "\n \n", ""]


def trained_tokenizer(folder, kind="bytes", template=None, **settings):
    """A folder with a tokenizer of ``kind``: byte-level BPE, or metaspace BPE with a fallback to bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [text_of(random.Random(seed), 40) for seed in range(200)]
    text += ["User: what is\n\nAssistant: it is\n<|im_start|>system\n[INST] x [/INST] assistant\n"] * 50
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", *SPECIAL, *fallback])
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **settings}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def text_of(rng, most):
    """Text that is not blank, with what templates write, at times, and space at its ends."""
    while True:
        words = [rng.choice(WORDS) + rng.choice(SPACES) for _ in range(rng.randint(1, most))]
        text = rng.choice(["", "", "", " ", "\n"]) + "".join(words)
        if text.strip():
            return text


def conversation(rng, form):
    """(role, text) of each turn; alpaca has one question and one answer."""
    turns = [("system", text_of(rng, 6))] if rng.random() < 0.4 else []
    for _ in range(1 if form == "alpaca" else rng.randint(1, 4)):
        turns += [("user", text_of(rng, 12)), ("assistant", text_of(rng, 15))]
    return turns


def record(turns, form):
    """The same as an object of a format."""
    if form == "messages":
        return {"messages": [{"role": role, "content": text} for role, text in turns], "id": 7}
    if form == "sharegpt":
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": names[role], "value": text} for role, text in turns]}
    system = next((text for role, text in turns if role == "system"), None)
    pairs = [text for role, text in turns if role != "system"]
    pairs = list(zip(pairs[::2], pairs[1::2], strict=True))
    if form == "alpaca":
        instruction, _, rest = pairs[0][0].partition("\n")
        if not instruction.strip() or not rest.strip():
            instruction, rest = pairs[0][0], ""
        found = {"instruction": instruction, "input": rest, "output": pairs[0][1]}
        return found | ({"system": system} if system else {})
    first = {"system": system} if system else {}
    return {
        "conversation": [
            (first if not number else {}) | {"input": asked, "output": answer}
            for number, (asked, answer) in enumerate(pairs)
        ]
    }


def write(path, records):
    """A file of records, by its ending."""
    if path.suffix == ".parquet":
        fields = {field: None for one in records for field in one}  # the first row decides on the columns
        table = pyarrow.Table.from_pylist([fields | one for one in records])
        pyarrow.parquet.write_table(table, path, row_group_size=40)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        lines = [json.dumps(one, ensure_ascii=number % 2 == 0) for number, one in enumerate(records)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
