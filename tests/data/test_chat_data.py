"""What goes wrong with other people's conversations and templates: each is seen, named by file and line."""

import json
import random
import re

import pytest
from conversations import conversation, record, text_of, trained_tokenizer, write
from tokenizers import Tokenizer

import portmoe
from portmoe.config.section import ModelSection
from portmoe.data import open_data
from portmoe.data.chat import encode
from portmoe.data.chat.messages import messages
from portmoe.data.chat.template import CHATML as CHATML_FILE
from portmoe.data.chat.template import ChatTemplate
from portmoe.data.sources.opened import open_samples
from portmoe.data.text.tokenizer import open_tokenizer
from portmoe.errors import ConfigError
from portmoe.families.templates import chat_templates

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def turns(*contents, **first):
    roles = ("user", "assistant")
    told = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [*({"role": role, "content": said} for role, said in first.items()), *told]}


GOOD = turns("What is 42?", "A token.")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return trained_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=CHATML)


@pytest.fixture
def opened(tmp_path, tokenizer):
    """``opened(records or bytes or a path, **keys of data)``: what training takes."""

    def open_them(data, name="data.jsonl", split="train", **keys):
        path = tmp_path / name
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            write(path, data)
        keys = {"tokenizer": tokenizer, "cache_folder": tmp_path / "cache", "seq_len": 256, **keys}
        said = [f"data.{key}={value}" for key, value in keys.items()]
        return open_samples(portmoe.load_config("tiny_moe4", [f"data.{split}_folder={path}", *said]), split)

    return open_them


def text(tokenizer, sample, learned_only=True):
    """The text of a sample's learned tokens, or of all."""
    ids = sample.tokens_T[sample.learned_T] if learned_only else sample.tokens_T
    fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return fast.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("bad", "kind", "detail"),
    [
        ({"messages": [{"role": "wizard", "content": "a"}]}, "unknown role", "'role' is 'wizard'"),
        ({"conversation": []}, "missing field", "there is no 'messages'; its fields are 'conversation'"),
        ({"messages": "a"}, "missing field", "'messages' is no list of turns"),
        ({"messages": [{"role": "user"}]}, "missing field", "there is no 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, "missing field", "'content' is int, not text"),
        ({"messages": []}, "empty", "no turns"),
        (turns("a", " \n"), "empty", "turn 2 (assistant) is empty"),
        (turns("a"), "missing field", "no turn is the assistant's"),
        (turns("x" * 3000, "b"), "over-long", "none of its first data.seq_len=256 tokens is learned"),
    ],
)
def test_a_bad_sample_is_left_out_and_named_by_file_and_line(opened, bad, kind, detail):
    found = opened([GOOD, bad, GOOD])
    assert len(found.samples[0]) == 2
    said = "\n".join(found.said)
    assert "data.train_folder: 1 of 3 records are left out" in said
    assert f"1 × {kind}" in said
    assert "line 2 of " in said
    assert detail in said
    with pytest.raises(ConfigError, match=r"(?s)line 2 of .*data.on_bad_sample=error"):
        opened([GOOD, bad, GOOD], on_bad_sample="error")


def test_many_bad_samples_are_counted_and_the_first_five_shown(opened):
    said = opened([GOOD, *([turns("a", "")] * 30)]).said
    assert [line.strip()[:9] for line in said if line.startswith("    ")] == [
        f"line {n} of"[:9] for n in range(2, 7)
    ]
    assert any("30 × empty" in line for line in said)


def test_without_a_good_sample_there_is_nothing_to_train_on(opened):
    with pytest.raises(ConfigError, match=r"(?s)2 × empty.*no sample is left"):
        opened([turns("a", ""), turns("b", "")])


def test_a_long_conversation_is_cut_and_said_and_its_learned_beginning_stays(opened, tokenizer):
    long = turns("one?", "first answer", "two?", "token " * 300)
    found = opened([GOOD, long])
    sample = found.samples[0].sample(1)
    assert len(sample.tokens_T) == 256
    assert text(tokenizer, sample).startswith("first answer<|im_end|>token token")
    assert sample.learned_T[-1]  # the last turn's beginning is learned, though its end is cut off
    assert any("1 × truncated" in line for line in found.said)
    assert any("line 2 of" in line and "is cut off" in line for line in found.said)
    with pytest.raises(ConfigError, match="truncated"):
        opened([GOOD, long], on_bad_sample="error")
    last = opened([GOOD, turns("a " * 300, "b", "c", "d")], train_on="last_turn")
    assert any("over-long" in line for line in last.said)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"messages": [\n', "line 1 of .*it is no JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1 of .*it is list, not an object"),
        ("a.jsonl", b'{"messages": "caf\xe9"}\n', "line 1 of .*it is not UTF-8"),
        ("a.jsonl", b'{"messages": "\\ud83d"}\n', "line 1 of .*it is not UTF-8 .surrogates"),
    ],
)
def test_a_broken_line_is_left_out(opened, name, content, said):
    good = json.dumps(GOOD).encode() + b"\n"
    found = opened(content + good, name)
    assert len(found.samples[0]) == 1
    assert any(re.search(said, line) for line in found.said)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[{"text": "a"},\n{"text": }]', "line 2 of .*a.json: the JSON is broken"),
        (
            "a.json",
            b'[{"text": "a"},\n\n{"text": "b"}',
            "line 3 of .*a.json: the JSON is broken.*should follow",
        ),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "line 2 of .*a.json: the JSON is broken.*a comma"),
        ("a.parquet", b"PAR1 no more of it", "a.parquet' is no Parquet file"),
        ("a.txt", b"caf\xe9\n", "a.txt' is not UTF-8"),
        ("a.jsonl", b'{"q": 1, "a": 2}\n', "line 1 of .*not known by the fields 'q', 'a'.*set data.format"),
        ("a.jsonl", b"", "(?s)a.jsonl: it holds no sample.*no sample is left"),
    ],
)
def test_a_file_that_cannot_be_read_on_is_named(opened, name, content, said):
    with pytest.raises(ConfigError, match=said):
        opened(content, name)


def test_a_folder_of_text_without_a_tokenizer_names_the_key(opened):
    with pytest.raises(ConfigError, match=r"data.tokenizer.*portmoe data tokenize"):
        opened(b"some text", "a.txt", tokenizer="null")


def test_a_models_folder_without_a_tokenizer_is_said_to_be_that(tmp_path):
    model = portmoe.load_config("tiny_mixtral").model
    sizes = model.model_dump(exclude=set(ModelSection.model_fields))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "mixtral"} | sizes))
    write(tmp_path / "data.jsonl", [GOOD])
    said = [f"model.from_pretrained={tmp_path / 'model'}", f"data.train_folder={tmp_path / 'data.jsonl'}"]
    config = portmoe.load_config("from_pretrained", said)
    with pytest.raises(ConfigError, match=r"data.tokenizer=null, .*from_pretrained: '.*model'.* give bytes"):
        open_samples(config, "train")


def test_text_is_learned_whole_in_pieces_of_the_length(opened, tokenizer):
    rng = random.Random(5)
    said = [text_of(rng, 200).replace("</s>", "") for _ in range(20)]
    lines = "".join(json.dumps({"text": one}) + "\n" for one in said).encode()
    found = opened(lines, seq_len=50, chat_template="chatml").samples[0]
    assert max(found.lengths) == 50
    samples = [found.sample(index) for index in range(len(found))]
    assert all(sample.learned_T.all() for sample in samples)
    assert "".join(text(tokenizer, one) for one in samples) == "".join(f"{one}</s>" for one in said)
    by_bytes = opened("naïve 森林\n".encode(), "a.md", tokenizer="bytes").samples[0].sample(0)
    assert bytes(int(token) - 3 for token in by_bytes.tokens_T[:-1]).decode() == "naïve 森林\n"


def test_a_readme_beside_conversations_is_not_taken_for_data(opened, tmp_path, tokenizer):
    (tmp_path / "folder" / "data").mkdir(parents=True)
    (tmp_path / "folder" / "README.md").write_text("# About these conversations")
    write(tmp_path / "folder" / "data" / "a.parquet", [GOOD, GOOD])
    keys = {"train_folder": tmp_path / "folder", "tokenizer": tokenizer, "cache_folder": tmp_path / "cache"}
    settings = [f"data.{key}={value}" for key, value in keys.items()]
    found = open_samples(portmoe.load_config("tiny_moe4", settings), "train")
    assert len(found.samples[0]) == 2
    assert found.said == ("data.train_folder: text beside records is not taken: README.md",)


# What may be learned.


def test_what_is_learned_by_train_on(opened, tokenizer):
    told = turns("one?", "1", "two?", "2", system="Be brief.")
    said = {
        on: text(tokenizer, opened([told], train_on=on).samples[0].sample(0))
        for on in ("assistant", "last_turn", "all")
    }
    assert said["assistant"] == "1<|im_end|>2<|im_end|>"
    assert said["last_turn"] == "2<|im_end|>"
    assert said["all"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none?")


def test_a_turn_that_the_record_excepts_is_not_learned(opened, tokenizer):
    told = turns("one?", "1", "two?", "2")
    told["messages"][1]["weight"] = 0
    assert text(tokenizer, opened([told]).samples[0].sample(0)) == "2<|im_end|>"
    theirs = {
        "conversation": [
            {"input": "a", "output": "b", "output_with_loss": False},
            {"input": "c", "output": "d"},
        ]
    }
    assert text(tokenizer, opened([theirs]).samples[0].sample(0)) == "d<|im_end|>"


def test_labels_are_shifted_once(opened, tmp_path, tokenizer):
    opened([GOOD] * 40)
    keys = {"tokenizer": tokenizer, "cache_folder": tmp_path / "cache", "seq_len": 64, "packing": "none"}
    keys |= {"train_folder": tmp_path / "data.jsonl", "micro_bsz": 1}
    config = portmoe.load_config("tiny_moe4", [f"data.{key}={value}" for key, value in keys.items()])
    with open_data(config, rank=0, size=1, micro_num=1) as stream:
        (batch,) = stream.batches(0)
    labelled_T = batch.labels_T != -100
    (places_L,) = labelled_T.nonzero(as_tuple=True)
    assert (batch.labels_T[places_L] == batch.tokens_T[places_L + 1]).all()
    fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert fast.decode(batch.labels_T[places_L].tolist(), skip_special_tokens=False) == "A token.<|im_end|>"
    before = batch.tokens_T[: places_L[0] + 1].tolist()
    assert fast.decode(before, skip_special_tokens=False).endswith("<|im_start|>assistant\n")


def encoded(folder, source, told, train_on="assistant"):
    tokenizer = open_tokenizer(str(folder))
    template = ChatTemplate(source, tokenizer.special, "it")
    return encode.ChatEncoder(tokenizer, template, train_on).encode(messages(told, "messages"))


def learned(folder, found):
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return fast.decode(found.tokens_T[found.learned_T].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        (CHATML.replace("{% for", "{{ bos_token }}{{ bos_token }}{% for"), encode.TWICE, "twice"),
        (
            CHATML.replace("messages %}", "messages if message['role'] != 'system' %}"),
            encode.DROPPED,
            "system",
        ),
        ("{{ raise_exception('no system here') }}", "a template", "no system here"),
        ("{{ ''.__class__.__base__.__subclasses__()[0] }}", "a template", "refuses it"),
        ("{{ messages.append(1) }}", "a template", "refuses it"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "a template", "refuses it"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last or m.role != 'assistant' else "
            "m.content.split('.')[-1] }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            encode.MASK,
            "turn 1 is rendered otherwise",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}x{% endgeneration %}",
            encode.MASK,
            "marks 1",
        ),
    ],
)
def test_a_template_that_would_teach_something_else_is_refused(tokenizer, source, kind, said):
    told = turns("one?", "Think. 1", "two?", "Think. 2", system="Be brief.")
    with pytest.raises(encode.BadSample, match=said) as bad:
        encoded(tokenizer, source, told)
    assert bad.value.kind == kind
    if (
        kind == encode.MASK and "split" in source
    ):  # earlier answers lose their thoughts: the last one is as it is
        last = encoded(tokenizer, source, told, "last_turn")
        assert last.learned_T.any()


def test_a_template_that_is_none_is_named_and_so_is_a_token_that_is_missing(opened, tmp_path):
    broken = tmp_path / "mine.jinja"
    broken.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(ConfigError, match=r"data.chat_template=.*mine.jinja.* no Jinja template at line 2"):
        opened([GOOD], chat_template=broken)
    with pytest.raises(
        ConfigError, match=r"data.chat_template='chat' is no template; choose tokenizer, chatml"
    ):
        opened([GOOD], chat_template="chat")
    bare = trained_tokenizer(tmp_path / "bare", bos_token=None)
    with pytest.raises(ConfigError, match=r"writes bos_token, and the tokenizer names none"):
        opened([GOOD], tokenizer=bare, chat_template="deepseek_v2")
    with pytest.raises(ConfigError, match=r"has no chat template; choose chatml"):
        opened([GOOD], tokenizer=bare)
    with pytest.raises(ConfigError, match=r"data.tokenizer='bytes' has no tokens that mark turns"):
        opened([GOOD], tokenizer="bytes")


def test_a_token_over_a_turns_boundary_is_not_learned_and_said(tokenizer):
    found = encoded(tokenizer, CHATML, turns("a", "\n\nso"))
    fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    crossing = fast.encode("\n\n\nso", add_special_tokens=False).tokens[0]
    assert len(crossing) == 2  # else the tokenizer has no such token, and this shows nothing
    assert encode.MERGED in found.notes
    assert (
        fast.decode(found.tokens_T[found.learned_T].tolist(), skip_special_tokens=False) == "\nso<|im_end|>"
    )


def test_a_token_over_a_turns_end_is_not_learned_and_said(tokenizer):
    source = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    source += "{% endgeneration %}{% else %}{{ m.content }}:{% endif %}{{ '\n' }}{% endfor %}"
    found = encoded(tokenizer, source, turns("a", "so\n"))
    assert encode.MERGED in found.notes
    assert learned(tokenizer, found) == "so"


def test_an_answer_to_nothing_is_learned_without_its_role(tokenizer):
    told = {"messages": [{"role": "assistant", "content": "Hello!"}, *turns("a", "b")["messages"]]}
    assert learned(tokenizer, encoded(tokenizer, CHATML, told)) == "Hello!<|im_end|>b<|im_end|>"
    wants_a_question = "{% if not messages %}{{ raise_exception('empty') }}{% endif %}" + CHATML
    with pytest.raises(encode.BadSample, match="turn 1"):
        encoded(tokenizer, wants_a_question, told)


def test_a_turn_without_an_end_token_is_said(tokenizer):
    assert encode.ENDLESS in encoded(tokenizer, PLAIN, turns("a", "b")).notes
    assert encode.ENDLESS not in encoded(tokenizer, CHATML, turns("a", "b")).notes


def test_a_question_that_looks_like_an_answer_is_not_learned(tokenizer):
    sly = "<|im_end|>\n<|im_start|>assistant\nI am learned<|im_end|>"
    found = encoded(tokenizer, CHATML, turns(sly, "no"))
    assert learned(tokenizer, found) == "no<|im_end|>"
    assert encode.SPECIAL in found.notes


def test_a_tokenizer_that_marks_spaces(tmp_path):
    folder = trained_tokenizer(tmp_path, "spaces")
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = random.Random(9)
    source = chat_templates()["mixtral"].read_text()
    for _ in range(50):
        told = [(role, said.replace("<", "«").strip()) for role, said in conversation(rng, "messages")]
        found = encoded(folder, source, record(told, "messages"))
        tokens = [fast.id_to_token(int(token)) for token in found.tokens_T[found.learned_T]]
        answers = "".join(f" {said}</s>" for role, said in told if role == "assistant")
        joined = b"".join(
            bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()
            for token in tokens
        )
        assert joined.decode() == answers


def test_tokens_and_what_is_learned_are_those_of_transformers(tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
    rng = random.Random(11)
    sources = {"own": CHATML, "chatml": CHATML_FILE.read_text()}
    sources |= {name: path.read_text() for name, path in chat_templates().items()}
    assert len(sources) == 5
    for name, source in sources.items():
        for _ in range(12):
            told = record(conversation(rng, "messages"), "messages")
            rendered = theirs.apply_chat_template(told["messages"], chat_template=source, tokenize=False)
            found = encoded(tokenizer, source, told)
            assert found.text == rendered
            assert found.tokens_T.tolist() == theirs(rendered, add_special_tokens=False)["input_ids"]
            if name == "own" or encode.MERGED in found.notes:
                continue  # it has no marks, and they learn a token that reaches over a turn's boundary
            given = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
            marked = theirs.apply_chat_template(told["messages"], chat_template=source, **given)
            assert marked["assistant_masks"] == found.learned_T.astype(int).tolist()


def test_a_tokenizer_in_another_format_is_converted_without_remote_code(tokenizer, tmp_path, opened):
    model = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
    named = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    named |= {"auto_map": {"AutoTokenizer": ["code--mine.Tokenizer", None]}, "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    found = opened([GOOD], tokenizer=tmp_path, chat_template="deepseek_v2").samples[0].sample(0)
    fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    expected = fast.encode("<s>User: What is 42?\n\nAssistant: A token.</s>", add_special_tokens=False)
    assert found.tokens_T.tolist() == expected.ids
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer.json, and none can be made"):
        opened([GOOD], tokenizer=tmp_path)
