"""The files that an entry of ``data.train_folder`` names, each with the format of its records."""

from pathlib import Path

from portmoe.data.chat.messages import SIGNS, format_of
from portmoe.data.text import documents, records
from portmoe.data.text.parts import where, whole
from portmoe.data.tokenizing.recipe import TEXT, Given
from portmoe.errors import ConfigError


def named_files(name: str, key: str, form: str) -> tuple[list[Given], list[str]]:
    """The files of one entry, and what is to be said of others that lie there.

    Texts beside records, as a README in a folder of conversations, are taken only where text is asked for.

    Args:
        key: where the name was given.
        form: as data.format.

    Raises:
        ConfigError: there is no such file, or its format is not known.
    """
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"{key}={name!r} does not exist; name a file or a folder of data")
    found, said = documents.files([path]), []
    of_records = [file for file in found if file.suffix.lower() in records.READERS]
    if path.is_dir() and form != TEXT and 0 < len(of_records) < len(found):
        texts = [str(file.relative_to(path)) for file in found if file not in of_records]
        shown = ", ".join(texts[:5]) + f" and {len(texts) - 5} more" * (len(texts) > 5)
        said.append(f"{key}: text beside records is not taken: {shown}")
        found = of_records
    return [Given(file, _form(file, form)) for file in found], said


def _form(file: Path, form: str) -> str:
    """The format of a file: what is asked for, or what its first sound record looks like."""
    plain = file.suffix.lower() not in records.READERS
    if plain and form not in ("auto", TEXT):
        raise ConfigError(
            f"data.format={form!r}: {file} is plain text; give files that end in {', '.join(records.READERS)}"
        )
    if form != "auto" or plain:
        return TEXT if plain else form
    for record in records.records(whole(file)):
        if record.value is not None:
            if (found := format_of(record.value)) is not None:
                return found
            fields = ", ".join(map(repr, record.value)) or "none"
            raise ConfigError(
                f"{where(file, record.place)}: the format is not known by the fields {fields}; known are "
                f"{', '.join(f'{field!r} ({name})' for field, name in SIGNS.items())}; set data.format, or "
                "name the files that are meant"
            )
    return TEXT
