"""Turns of a conversation to a prompt's tokens, and an answer's tokens to text."""

from collections.abc import Callable, Sequence
from pathlib import Path

from portmoe.config import Config
from portmoe.data.chat.messages import ASSISTANT, USER, BadSample, Message
from portmoe.data.chat.template import OWN, ChatTemplate, open_template, own_template
from portmoe.data.text.tokenizer import BYTES, FromFile, open_tokenizer
from portmoe.errors import ConfigError
from portmoe.files import json_object

TOKENIZER, TEMPLATE = "data.tokenizer", "data.chat_template"
UNFINISHED = "\ufffd"  # what bytes that are no whole character are decoded to


class Conversation:
    """A tokenizer with a chat template; without one, text that is gone on with.

    Args:
        ends: further tokens that end an answer, beside the tokenizer's own and the one the template closes
            the assistant's turn with.

    Attributes:
        ends: all of them.
    """

    def __init__(self, tokenizer: FromFile, template: ChatTemplate | None, ends: Sequence[int] = ()) -> None:
        self._tokenizer, self._template = tokenizer, template
        own = {tokenizer.end} if tokenizer.end is not None else set()
        self.ends = frozenset(own | set(ends) | self._closing())

    @property
    def begin(self) -> int | None:
        """The token that begins a text, if the tokenizer names one."""
        return self._tokenizer.begin

    @property
    def template_text(self) -> str:
        """The source of the template; empty without one."""
        return "" if self._template is None else self._template.text

    @property
    def is_chat(self) -> bool:
        """Whether there is a template."""
        return self._template is not None

    def prompt(self, turns: Sequence[Message]) -> list[int]:
        """The tokens after which the assistant speaks.

        Raises:
            ConfigError: the template refuses the turns.
        """
        if self._template is None:
            begin = self._tokenizer.special.get("bos_token", "")
            return self._tokenizer.encode(begin + "".join(turn.content for turn in turns))
        try:
            return self._tokenizer.encode(self._template.render(turns, prompt=True))
        except BadSample as error:
            raise ConfigError(f"{error}; choose another {TEMPLATE}, or say it otherwise") from None

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say, without special ones."""
        return self._tokenizer.fast.decode(list(tokens), skip_special_tokens=True)

    def _closing(self) -> set[int]:
        """The special token that the template writes first behind an answer."""
        if self._template is None:
            return set()
        answer = "answer"
        try:
            rendered = self._template.render([Message(USER, "question"), Message(ASSISTANT, answer)])
        except BadSample:  # of a template that wants more
            return set()
        _, _, behind = rendered.rpartition(answer)
        special = self._tokenizer.fast.get_added_tokens_decoder()
        return {token for token in self._tokenizer.encode(behind)[:1] if token in special}


def stream(conversation: Conversation, told: Callable[[str], None]) -> Callable[[int], None]:
    """Return what takes an answer's tokens as they come and tells their text, whole characters at a time."""
    tokens: list[int] = []
    said = ""

    def take(token: int) -> None:
        nonlocal said
        tokens.append(token)
        text = conversation.text(tokens)
        if text.startswith(said) and not text.endswith(UNFINISHED):
            told(text[len(said) :])
            said = text

    return take


def open_conversation(config: Config, folder: Path | None = None) -> Conversation:
    """The tokenizer and the template that a config trains with.

    Args:
        folder: where the tokenizer is; None: where the config says, ``data.tokenizer`` or else
            ``model.from_pretrained``.

    Raises:
        ConfigError: there is none, or it cannot be read.
        BackendError: a package that reads it is missing.
    """
    where = str(folder) if folder else config.data.tokenizer or config.model.from_pretrained
    if where is None:
        raise ConfigError(
            f"no tokenizer is known: set {TOKENIZER}, or model.from_pretrained, to a folder with one"
        )
    tokenizer = open_tokenizer(where, TOKENIZER)
    if not isinstance(tokenizer, FromFile):
        raise ConfigError(f"{TOKENIZER}={BYTES!r} has no conversations; give the folder of a tokenizer")
    path = Path(where) if Path(where).is_dir() else Path(where).parent
    template, name = None, config.data.chat_template
    if name != OWN or own_template(path) is not None:
        template = open_template(name, path, tokenizer.special, TEMPLATE)
    ends = json_object(path / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return Conversation(tokenizer, template, [end for end in ends if isinstance(end, int)])


def read_prompts(given: Sequence[str] | str) -> list[str]:
    """The prompts themselves, or those of a file: one a line.

    Raises:
        ConfigError: the file cannot be read, or holds none.
    """
    if not isinstance(given, str):
        return list(given)
    try:
        lines = Path(given).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"eval.prompts={given!r} cannot be read ({error}); give a file or a list") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"eval.prompts={given!r} holds no prompt; write one a line")
    return prompts
