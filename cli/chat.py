"""``portmoe chat``."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portmoe.cli import completions
from portmoe.cli.first_line import announce
from portmoe.cli.options import StepOrBest, backend_option
from portmoe.errors import ConfigError

if TYPE_CHECKING:
    from portmoe.data.chat.messages import Message

ANEW = "/new"


@click.command()
@click.argument(
    "source",
    metavar="RUN_OR_FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    shell_complete=completions.runs,
)
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Answer this and end. May be repeated."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 100),
    metavar="T",
    default=0.0,
    show_default=True,
    help="0: always the likeliest token; else drawn, the higher the less likely ones.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 2**20),
    metavar="N",
    default=512,
    show_default=True,
    help="Of an answer.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    metavar="N",
    default=0,
    show_default=True,
    help="Of the draws.",
)
@click.option(
    "--step",
    type=StepOrBest(),
    default=None,
    metavar="N|best",
    help="Of a run's checkpoint.  [default: hf_model of a finished run, else the newest]",
)
@backend_option("The accelerator to compute on.")
def chat(
    source: Path,
    prompts: tuple[str, ...],
    temperature: float,
    max_tokens: int,
    seed: int,
    step: int | str | None,
    backend: str,
) -> None:
    """Talk to the model of a run, or of a folder of the hub, on one device.

    At a terminal turn by turn: /new begins anew, Ctrl-C ends an answer, Ctrl-D the conversation. Otherwise
    standard input is one prompt. A model whose tokenizer has no chat template goes on with the text instead.
    """
    from portmoe.accelerator.discovery import prepare

    if not prompts and not sys.stdin.isatty():
        prompts = (sys.stdin.read().strip(),)
        if not prompts[0]:
            raise click.UsageError("standard input is empty; write a prompt there, or give --prompt TEXT")
    if not all(prompt.strip() for prompt in prompts):
        raise click.UsageError("--prompt is empty; give it a text")
    announce(f"chat {source}")
    prepare(backend)
    from portmoe.chat.model import opened
    from portmoe.chat.source import find
    from portmoe.data.chat.messages import ASSISTANT, USER, Message
    from portmoe.generation.conversation import stream
    from portmoe.generation.decode import Decoding, generate

    found = find(source, step)
    conversation = found.conversation()
    with opened(found, backend) as (next_logits, where):
        click.echo(f"{found.said}; {where}", err=True)
        decoding = Decoding(max_tokens, conversation.ends, temperature, seed)

        def answer(turns: "list[Message]") -> "Message":
            """Tell the answer to the last turn as it comes; the answer as a turn."""
            told: list[str] = []

            def tell(text: str) -> None:
                text = text.lstrip() if conversation.is_chat and not told else text
                if text:
                    told.append(text)
                    click.echo(text, nl=False)

            take = stream(conversation, tell)
            with contextlib.suppress(*([] if prompts else [KeyboardInterrupt])):
                for chosen in generate(next_logits, [conversation.prompt(turns)], decoding):
                    take(chosen[0])
            click.echo()
            return Message(ASSISTANT, "".join(told))

        if not prompts:
            _talk(answer, conversation.is_chat)
        for prompt in prompts:
            if len(prompts) > 1:
                click.echo(f"> {prompt}")
            answer([Message(USER, prompt)])


def _talk(answer: "Callable[[list[Message]], Message]", is_chat: bool) -> None:
    """Turn by turn, until the end of the input."""
    from portmoe.data.chat.messages import USER, Message

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (the input's line can be edited)
    turns: list[Message] = []
    for said in _inputs():
        if said == ANEW:
            turns = []
            continue
        asked = Message(USER, said)
        try:
            replied = answer([*turns, asked])
        except ConfigError as error:  # the template refuses it
            click.echo(f"error: {error}", err=True)
            continue
        turns = [*turns, asked, replied] if is_chat and replied.content.strip() else turns


def _inputs() -> Iterator[str]:
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if said:
            yield said
