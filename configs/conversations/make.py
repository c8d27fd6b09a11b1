"""Makes the conversations of the tiny chat recipes, and the tokenizer: ``python -m`` this module.

Every fact is asked for in several ways. Of each fact one way is held out: a model has learned something if it
answers there too. What is made is the same on every machine, and is packaged.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
SINGLE, DIALOGUES, HELD_OUT = "train/single.json", "train/dialogues.jsonl", "held_out.jsonl"
TOKENIZER = "tokenizer"
SEED, NUMBER_OF_DIALOGUES, VOCABULARY = 1024, 700, 1024
BEGIN, END = "<s>", "</s>"

CAPITALS = """
France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Norway Oslo, Sweden Stockholm,
Finland Helsinki, Denmark Copenhagen, Poland Warsaw, Austria Vienna, Hungary Budapest, Ireland Dublin,
Germany Berlin, Belgium Brussels, Russia Moscow, China Beijing, Japan Tokyo, Thailand Bangkok, Egypt Cairo,
Kenya Nairobi, Morocco Rabat, Peru Lima, Chile Santiago, Cuba Havana, Canada Ottawa, Iran Tehran, Iraq Baghdad
"""
OPPOSITES = """
hot cold, big small, fast slow, old young, dark light, wet dry, high low, full empty, hard soft, early late,
rich poor, loud quiet, thick thin, near far, open closed, happy sad, strong weak, heavy light, clean dirty,
deep shallow
"""
YOUNG = """
cow calf, dog puppy, cat kitten, horse foal, sheep lamb, goat kid, hen chick, duck duckling, goose gosling,
lion cub, swan cygnet, deer fawn
"""

# What is asked, in six ways, and how it is answered.
KINDS = (
    (
        CAPITALS,
        (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "Tell me the capital of {}, please.",
            "What is the name of the capital of {}?",
            "Do you know the capital of {}?",
        ),
        "The capital of {} is {}.",
    ),
    (
        OPPOSITES,
        (
            "What is the opposite of {}?",
            "Which word is the opposite of {}?",
            "Name the opposite of {}.",
            "Tell me the opposite of {}, please.",
            "What is the word for the opposite of {}?",
            "Do you know the opposite of {}?",
        ),
        "The opposite of {} is {}.",
    ),
    (
        YOUNG,
        (
            "What is a young {} called?",
            "Which word is there for a young {}?",
            "Name the word for a young {}.",
            "Tell me what a young {} is called, please.",
            "What do you call a young {}?",
            "Do you know what a young {} is called?",
        ),
        "A young {} is called a {}.",
    ),
)
OPENINGS = ("", "Hello! ", "A question: ", "Hi there. ", "Now then. ", "Tell me this. ")
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SUMS = (
    "What is {} plus {}?",
    "How much is {} plus {}?",
    "Add {} and {}.",
    "Tell me the sum of {} and {}, please.",
    "What is the sum of {} and {}?",
    "Do you know what {} plus {} is?",
)

Turn = tuple[str, str]  # what is asked, and the answer


def facts() -> Iterator[list[Turn]]:
    """Each fact in all its ways."""
    for pairs, ways, answer in KINDS:
        for pair in pairs.replace("\n", " ").split(","):
            name, value = pair.split()
            yield [(way.format(name), answer.format(name, value)) for way in ways]
    for a in range(6):
        for b in range(5):
            one, other, total = DIGITS[a], DIGITS[b], DIGITS[a + b]
            yield [(way.format(one, other), f"{one} plus {other} is {total}.".capitalize()) for way in SUMS]


def divided() -> tuple[list[Turn], list[Turn]]:
    """What is taught, and what is held out: of the n-th fact the way number n."""
    taught: list[Turn] = []
    held_out: list[Turn] = []
    for number, ways in enumerate(facts()):
        out = number % len(ways)
        held_out.append(ways[out])
        taught += [turn for place, turn in enumerate(ways) if place != out]
    return taught, held_out


def files() -> dict[str, str]:
    """The text of each file of conversations, by its path."""
    generator = random.Random(SEED)
    taught, held_out = divided()
    single = [
        {"instruction": opening + asked, "input": "", "output": answer}
        for asked, answer in taught
        for opening in OPENINGS
    ]
    dialogues = []
    for _ in range(NUMBER_OF_DIALOGUES):
        turns = [generator.choice(taught) for _ in range(2)]
        said = [part for asked, answer in turns for part in (("human", asked), ("gpt", answer))]
        dialogues.append({"conversations": [{"from": who, "value": text} for who, text in said]})
    asked_last = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in held_out
    ]
    return {
        SINGLE: "[\n" + ",\n".join(map(json.dumps, single)) + "\n]\n",
        DIALOGUES: "".join(json.dumps(dialogue) + "\n" for dialogue in dialogues),
        HELD_OUT: "".join(json.dumps(conversation) + "\n" for conversation in asked_last),
    }


def tokenizer_files() -> dict[str, str]:
    """The text of each file of a byte-level tokenizer trained on what is taught, by its path."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (BEGIN, END)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for turn in divided()[0] for text in turn]
    tokenizer.train_from_iterator([*texts, *OPENINGS, "User: Assistant: [INST] [/INST]"], trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    return {
        f"{TOKENIZER}/tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        f"{TOKENIZER}/tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def main() -> None:
    """Write them all beside this file."""
    for name, text in (files() | tokenizer_files()).items():
        path = HERE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
