"""Chat templates: Jinja, rendered in its sandbox only, with the places that a template marks as generated."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from portmoe.data.chat.messages import BadSample, Message
from portmoe.errors import BackendError, ConfigError
from portmoe.families.templates import chat_templates
from portmoe.files import json_object

OWN = "tokenizer"  # the name of the tokenizer's own template
BEGIN, END = "\ufdd0", "\ufdd1"  # around what is marked; no text holds these code points
CHATML = Path(__file__).with_name("chatml.jinja")
TEMPLATE = "a template"


class ChatTemplate:
    """A template over the special tokens of a tokenizer.

    Attributes:
        text: its source.
        marks: whether it says itself what the assistant generates (``{% generation %}``).
        identity: equal for templates that render alike.
    """

    def __init__(self, text: str, special: Mapping[str, str], said: str) -> None:
        """
        Args:
            special: the special tokens' texts by name.
            said: what an error calls the template.
        """
        from jinja2 import TemplateError, meta

        environment = _environment()
        try:
            names = meta.find_undeclared_variables(environment.parse(text))
            self._template = environment.from_string(text)
        except TemplateError as error:
            line = f" at line {error.lineno}" if getattr(error, "lineno", None) else ""
            raise ConfigError(f"{said} is no Jinja template{line}: {error!s:.200}") from error
        for name in ("bos_token", "eos_token"):
            if name in names and name not in special:
                raise ConfigError(
                    f"{said} writes {name}, and the tokenizer names none; add it to its "
                    "tokenizer_config.json, or choose another data.chat_template"
                )
        self.text, self._special = text, dict(special)
        self.marks = "endgeneration" in text
        told = json.dumps([text, sorted(special.items())], ensure_ascii=False)
        self.identity = hashlib.sha256(told.encode("utf-8")).hexdigest()[:32]

    def marked(self, messages: Sequence[Message], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The rendering, and from which to which character of it is marked.

        Args:
            prompt: end with what stands before the assistant's next turn.

        Raises:
            BadSample: the template refuses the messages.
        """
        if any(mark in turn.content for turn in messages for mark in (BEGIN, END)):
            raise BadSample(TEMPLATE, "it holds U+FDD0 or U+FDD1, which are no characters")
        try:
            rendered = self._template.render(
                messages=[turn.plain() for turn in messages],
                add_generation_prompt=prompt,
                tools=None,
                documents=None,
                **self._special,
            )
        except Exception as error:  # a template is a program, and this is what became of it
            raise BadSample(TEMPLATE, f"the chat template refuses it: {error!s:.200}") from error
        pieces, spans, at = [], [], 0
        for number, piece in enumerate(rendered.split(BEGIN)):
            inside, mark, after = piece.partition(END)
            if bool(mark) != bool(number):
                raise BadSample(TEMPLATE, "the chat template's marks of what is generated lie in each other")
            if number:
                spans.append((at, at + len(inside)))
            pieces += [inside, after]
            at += len(inside) + len(after)
        return "".join(pieces), spans

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The rendering alone, see ``marked``."""
        return self.marked(messages, prompt)[0]


def open_template(name: str, folder: Path, special: Mapping[str, str], key: str) -> ChatTemplate:
    """The tokenizer's own template, a packaged one by its name, or a file.

    Args:
        folder: the tokenizer's.
        key: where the name was given.

    Raises:
        ConfigError: there is none.
        BackendError: the package that renders it is missing.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"chat templates need the package jinja2 ({error}); pip install 'portmoe[finetune]'"
        ) from error
    packaged = {"chatml": CHATML, **chat_templates()}
    if name == OWN:
        text = own_template(folder)
        if text is None:
            raise ConfigError(
                f"{key}={name!r}: the tokenizer in {str(folder)!r} has no chat template; choose "
                f"{', '.join(packaged)}, or a file that ends in .jinja"
            )
        return ChatTemplate(text, special, f"the chat template in {str(folder)!r}")
    path = packaged.get(name, Path(name))
    if name not in packaged and path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise ConfigError(
            f"{key}={name!r} is no template; choose {OWN}, {', '.join(packaged)}, or a file that ends in "
            ".jinja"
        )
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"), special, f"{key}={name!r}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={name!r} cannot be read ({error})") from error


def own_template(folder: Path) -> str | None:
    """The template in a tokenizer's folder; where it has several, the one called default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = json_object(folder / name).get("chat_template")
        if isinstance(found, list):
            found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
        if isinstance(found, str):
            return found
    return None


@cache
def _environment() -> Any:
    """The sandbox, with what the hub's templates may use."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END))
            return [begin, nodes.Scope(body, lineno=line), end]

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment
