"""Reading a config written as Python assignments, without executing it.

The syntax tree is evaluated by hand: literals, names assigned before, arithmetic on numbers,
``dict(…)`` and few more. Nothing of the file runs, and no value can grow beyond what a config
needs. What is not understood stays in the tree as ``Unreadable`` with its line, so that it matters
only where somebody asks for it.
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from portmoe.errors import ConfigError

ALLOWED = (
    "allowed are literals, names assigned before, X['key'], + - * / // % **, int(…), float(…), dict(…) "
    "and f-strings of these"
)
MAX_DEPTH = 40
MAX_BITS = 1024  # of an integer
MAX_TEXT = 4096  # characters
MAX_ITEMS = 4096  # of lists put together

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}


@dataclass(frozen=True)
class Unreadable:
    """A value the file computes in a way that is not read; ``name`` is that of something imported."""

    line: int
    source: str
    why: str
    name: str = ""


class Lines(dict[str, Any]):
    """A dict of the file, with the line of each key."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}

    def put(self, key: str, value: Any, line: int) -> None:
        self[key] = value
        self.lines[key] = line


@dataclass
class Assignments:
    """What the file assigns at its top level, and the statements that were not understood."""

    names: Lines = field(default_factory=Lines)
    unread: list[Unreadable] = field(default_factory=list)


class _CannotRead(Exception):
    def __init__(self, value: Unreadable) -> None:
        super().__init__(value.why)
        self.value = value


def read_assignments(text: str, source: str) -> Assignments:
    """Evaluate the top-level assignments of Python text.

    Args:
        source: the file's name, for messages.

    Raises:
        ConfigError: the text is no Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings: not ours to complain about
            tree = ast.parse(text)
    except SyntaxError as error:
        raise ConfigError(
            f"{source}: line {error.lineno or 1}: not valid Python: {error.msg}; "
            "give a config that Python itself can read"
        ) from None
    except (RecursionError, MemoryError):
        raise ConfigError(f"{source}: nested too deeply to be a config; {ALLOWED}") from None
    except ValueError as error:  # a NUL character, before Python 3.12
        raise ConfigError(f"{source}: not valid Python: {error}") from None
    reader = _Reader(text)
    for statement in tree.body:
        reader.statement(statement)
    return reader.found


class _Reader:
    def __init__(self, text: str) -> None:
        self.text_lines = re.split(r"\r\n|\r|\n", text)  # where Python ends a line
        self.found = Assignments()
        self.bound: dict[str, Unreadable] = {}  # by imports and definitions

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value) if all(isinstance(t, ast.Name) for t in targets):
                result = self._value_or_unreadable(value, 0)
                for target in targets:
                    self.found.names.put(target.id, result, node.lineno)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                self.found.names.put(name, self._value_or_unreadable(value, 0), node.lineno)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=sign, value=value):
                before = ast.copy_location(ast.Name(target.id), target)
                whole = ast.copy_location(ast.BinOp(before, sign, value), node)
                self.found.names.put(name, self._value_or_unreadable(whole, 0), node.lineno)
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                pass  # a text that comments
            case ast.Import(names=names) | ast.ImportFrom(names=names) if names[0].name != "*":
                for alias in names:
                    name = alias.asname or alias.name.partition(".")[0]
                    self.bound[name] = replace(self._unreadable(node, "nothing is imported"), name=name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                self.bound[name] = self._unreadable(node, "nothing is executed")
            case _:
                self.found.unread.append(self._unreadable(node, "this statement is not read"))

    def _value_or_unreadable(self, node: ast.expr, depth: int) -> Any:
        try:
            return self._value(node, depth)
        except _CannotRead as error:
            return error.value

    def _value(self, node: ast.expr, depth: int) -> Any:
        if depth == MAX_DEPTH:
            raise self._cannot(node, f"nested more than {MAX_DEPTH} levels deep")
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return self._bounded(node, value)
            case ast.Name(id=name):
                known = self.bound | self.found.names
                if name not in known:
                    raise self._cannot(node, f"{name} is not assigned before this line")
                return self._readable(known[name])
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [self._value(element, depth + 1) for element in elements]
            case ast.Dict() | ast.Call(func=ast.Name(id="dict"), args=[]):
                return self._dict(node, depth)
            case ast.Call(func=ast.Name(id="int" | "float" as kind), args=[argument], keywords=[]):
                return self._number(node, kind, self._value(argument, depth + 1))
            case ast.Subscript(value=whole, slice=index):
                return self._item(node, self._value(whole, depth + 1), self._value(index, depth + 1))
            case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _SIGNS:
                value = self._value(operand, depth + 1)
                if not isinstance(value, int | float):
                    raise self._cannot(node, "the sign of something other than a number")
                return _SIGNS[type(sign)](value)
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
                return self._arithmetic(
                    node, sign, self._value(left, depth + 1), self._value(right, depth + 1)
                )
            case ast.JoinedStr(values=parts):
                return self._bounded(node, "".join(self._part(part, depth + 1) for part in parts))
        raise self._cannot(node, "this is computed, and nothing is executed")

    def _dict(self, node: ast.Dict | ast.Call, depth: int) -> Lines:
        result = Lines()
        if isinstance(node, ast.Dict):
            pairs = list(zip(node.keys, node.values, strict=True))
        else:
            pairs = [(k.arg and ast.Constant(k.arg, lineno=k.lineno), k.value) for k in node.keywords]
        for key, value in pairs:
            if key is None:  # **another
                other = self._value(value, depth + 1)
                if not isinstance(other, Lines):
                    raise self._cannot(value, "** of something other than a dict")
                for name, inner in other.items():
                    result.put(name, inner, other.lines[name])
                continue
            name = self._value(key, depth + 1)
            if not isinstance(name, str):
                raise self._cannot(node, "a key is not text")
            if name in result and isinstance(node, ast.Call):
                raise self._cannot(value, f"{name} is given twice")
            result.put(name, self._value_or_unreadable(value, depth + 1), value.lineno)
        return result

    def _item(self, node: ast.expr, whole: Any, index: Any) -> Any:
        try:
            if isinstance(whole, Lines) or (isinstance(whole, list) and type(index) is int):
                return self._readable(whole[index])
        except (KeyError, IndexError, TypeError):
            raise self._cannot(node, "there is no such item") from None
        raise self._cannot(node, "an item of something other than a dict or a list")

    def _number(self, node: ast.expr, kind: str, value: Any) -> int | float:
        if not isinstance(value, int | float):
            raise self._cannot(node, f"{kind}() of something other than a number")
        try:
            return self._bounded(node, int(value) if kind == "int" else float(value))
        except (OverflowError, ValueError) as error:  # an integer of infinity; a float of a huge integer
            raise self._cannot(node, str(error)) from None

    def _arithmetic(self, node: ast.expr, sign: ast.operator, left: Any, right: Any) -> Any:
        if isinstance(left, list) and isinstance(right, list) and isinstance(sign, ast.Add):
            if len(left) + len(right) > MAX_ITEMS:
                raise self._cannot(node, "the list is too long for a config")
            return left + right
        texts = isinstance(left, str) and isinstance(right, str) and isinstance(sign, ast.Add)
        if not texts and not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise self._cannot(node, "arithmetic on something other than numbers")
        if isinstance(sign, ast.Pow) and isinstance(left, int) and abs(right) > MAX_BITS:
            raise self._cannot(node, "the number is too large for a config")
        try:
            value = _ARITHMETIC[type(sign)](left, right)
        except (ArithmeticError, ValueError) as error:
            raise self._cannot(node, str(error)) from None
        if isinstance(value, complex):
            raise self._cannot(node, "the result is a complex number")
        return self._bounded(node, value)

    def _part(self, part: ast.expr, depth: int) -> str:
        if isinstance(part, ast.FormattedValue):
            if part.conversion != -1 or part.format_spec is not None:
                raise self._cannot(part, "an f-string with a format")
            value = self._value(part.value, depth)
            if not isinstance(value, str | int | float | None):
                raise self._cannot(part, "an f-string of something other than text and numbers")
            return str(value)
        return str(self._value(part, depth))

    def _bounded(self, node: ast.expr, value: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise self._cannot(node, "the number is too large for a config")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise self._cannot(node, "the text is too long for a config")
        if isinstance(value, str) and not value.replace("\n", "").replace("\t", "").isprintable():
            raise self._cannot(node, "the text contains characters that cannot be printed")
        return value

    def _readable(self, value: Any) -> Any:
        if isinstance(value, Unreadable):
            raise _CannotRead(value)
        return value

    def _cannot(self, node: ast.expr, why: str) -> _CannotRead:
        return _CannotRead(self._unreadable(node, why))

    def _unreadable(self, node: ast.stmt | ast.expr, why: str) -> Unreadable:
        # The text itself: ast.unparse would recurse as deep as the file likes.
        line = self.text_lines[node.lineno - 1].encode()  # columns count bytes
        end = node.end_col_offset if node.end_lineno == node.lineno else len(line)
        return Unreadable(node.lineno, line[node.col_offset : end].decode().strip(), why)
