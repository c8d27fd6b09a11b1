"""What a terminal shows of what was written to it: the few control codes that rich uses are obeyed."""

import io
import re

_CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


class Screen(io.StringIO):
    """A terminal of UTF-8."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def shown(self) -> list[str]:
        """The lines that are not empty, without colours; wrapping is not imitated."""
        return [line for line in shown(self.getvalue()) if line]


def shown(written: str) -> list[str]:
    """Every line of the screen after ``written``."""
    lines, row, column = [""], 0, 0
    position = 0
    while position < len(written):
        if code := _CODE.match(written, position):
            position = code.end()
            count = int(code[1] or 1) if not code[1].startswith("?") and ";" not in code[1] else 0
            if code[2] == "A":
                row = max(row - count, 0)
            elif code[2] == "K":
                lines[row] = ""
            elif code[2] not in "mhl":
                raise ValueError(f"this screen does not know {code[0]!r}")
            continue
        character = written[position]
        position += 1
        if character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif character == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
