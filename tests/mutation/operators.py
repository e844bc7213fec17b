"""Every change of one place in a Python file that a test suite should notice.

Left alone: annotations, decorators, strings, assertions (`strict=` of zip is one), `__all__`, the classes of isinstance
and what only type checkers run.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import difflib
import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

Span = tuple[int, int]

_COMPARISONS = {
    ast.Lt: ("<", "<=", ">="),
    ast.LtE: ("<=", "<", ">"),
    ast.Gt: (">", ">=", "<="),
    ast.GtE: (">=", ">", "<"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
    ast.BitXor: ("^", "|"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
_NAMES = dict([*(pairs := [("min", "max"), ("any", "all"), ("minimum", "maximum"), ("floor", "ceil")]),
               *((new, old) for old, new in pairs)])  # fmt: skip
_LEFT_ALONE = {"annotation", "returns", "decorator_list", "bases", "keywords"}  # a call's keywords are looked at
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A change of one place: `path` holds `mutated` in place of `original`.

    Args:
      span: lines of the statement around it, of a compound statement its head.
      scopes: lines of the functions and classes around it, from the inside out.
      lazy: whether it stands in the body of a function, not in what runs on import.
    """

    id: str
    path: str
    line: int
    operator: str
    original: str
    mutated: str
    span: Span
    scopes: tuple[Span, ...]
    lazy: bool

    def is_valid(self) -> bool:
        """Whether it compiles without a warning, and to something else."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                compile(self.mutated, self.path, "exec")
            except (SyntaxError, SyntaxWarning):
                return False
        return ast.dump(ast.parse(self.mutated)) != ast.dump(ast.parse(self.original))

    def diff(self) -> list[str]:
        """The change, with a line around it."""
        old, new = self.original.splitlines(), self.mutated.splitlines()
        return list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the walk through a file is; `bound` are the function's names that have a value already."""

    span: Span = (0, 0)
    scopes: tuple[Span, ...] = ()
    lazy: bool = False
    bound: frozenset[str] = frozenset()


_Edit = tuple[int, int, str, str]
"""Where the old text starts and ends in bytes, the new text, and the operator's name."""


def mutations(root: Path, path: str) -> list[Mutation]:
    """All mutations of a file, in its order; some may not be valid."""
    source = (root / path).read_bytes()
    lines, made, seen = source.decode().splitlines(), [], collections.Counter()
    for (start, end, new, operator), place in sorted(_Walk(source).all(), key=lambda found: found[0]):
        line = source.count(b"\n", 0, start) + 1
        head = source[source.rfind(b"\n", 0, start) + 1 : start].decode()
        tail = source[end : source.find(b"\n", end)].decode()
        what = path, lines[line - 1].strip(), (head + new + tail).strip()
        seen[what] += 1
        name = hashlib.sha256(repr((*what, seen[what])).encode()).hexdigest()[:10]
        mutated = (source[:start] + new.encode() + source[end:]).decode()
        place_of = place.span, place.scopes, place.lazy
        made.append(Mutation(name, path, line, operator, source.decode(), mutated, *place_of))
    return made


class _Walk:
    """Walks through a file."""

    def __init__(self, source: bytes):
        self.source = source
        self.tree = ast.parse(source)
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def all(self) -> Iterator[tuple[_Edit, _Place]]:
        """Every edit, with where it is."""
        return self.block(self.tree.body, _Place())

    def block(self, body: list[ast.stmt], place: _Place, *, may_return: bool = False) -> Iterator[tuple[_Edit, _Place]]:
        """The edits of statements that follow each other; `may_return` where a return may be left out."""
        bound = place.bound
        for statement in body:
            here = dataclasses.replace(place, span=_head(statement), bound=bound)
            if not _is_left_alone(statement):
                for edit in self.dropped(statement, bound, may_return):
                    yield edit, here
                yield from self.inside(statement, here)
            bound |= _names(statement)

    def inside(self, node: ast.AST, place: _Place) -> Iterator[tuple[_Edit, _Place]]:
        """The edits of a node and of all in it."""
        if isinstance(node, ast.JoinedStr | ast.Assert):  # Python 3.11 does not know where the parts of f-strings are
            return
        if isinstance(node, ast.keyword) and node.arg == "strict":
            return
        for edit in self.edits(node):
            yield edit, place
        within = place
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            scopes = ((node.lineno, node.end_lineno or node.lineno), *place.scopes)
            within = dataclasses.replace(place, scopes=scopes)
        for field, value in ast.iter_fields(node):
            if field in _LEFT_ALONE and not isinstance(node, ast.Call):
                continue
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                inner = within
                if isinstance(node, _FUNCTIONS):
                    inner = dataclasses.replace(within, lazy=True, bound=frozenset(_arguments(node.args)))
                yield from self.block(value, inner, may_return=not isinstance(node, _FUNCTIONS))
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not _is_a_type(node, child):
                    yield from self.inside(child, within)

    def at(self, node: ast.expr | ast.stmt | ast.keyword) -> Span:
        """Where a node starts and ends in bytes."""
        end = self.starts[(node.end_lineno or 1) - 1] + (node.end_col_offset or 0)
        return self.starts[node.lineno - 1] + node.col_offset, end

    def edits(self, node: ast.AST) -> Iterator[_Edit]:
        """The edits of a node itself."""
        match node:
            case ast.Compare():
                operands = [node.left, *node.comparators]
                for left, right, sign in zip(operands, operands[1:], node.ops, strict=False):
                    yield from self.signs(left, right, *_COMPARISONS[type(sign)])
            case ast.BoolOp():
                names = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from self.signs(left, right, *names)
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                yield from self.signs(node.left, node.right, *_ARITHMETIC[type(node.op)])
            case ast.AugAssign() if type(node.op) in _ARITHMETIC:
                yield from self.signs(node.target, node.value, *_ARITHMETIC[type(node.op)])
            case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
                yield self.at(node)[0], self.at(node.operand)[0], "", "sign"
            case ast.Constant(value=bool() | int() | float() | None):
                yield from self.constants(node)
            case ast.Name(id=name) if name in _NAMES:
                yield *self.at(node), _NAMES[name], "name"
            case ast.Attribute(attr=name) if name in _NAMES:
                yield self.at(node)[1] - len(name), self.at(node)[1], _NAMES[name], "name"
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                yield from self.negated(test)
            case ast.comprehension(ifs=tests):
                for test in tests:
                    yield from self.negated(test)
            case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
                yield from self.negated(value, returned=True)
            case ast.Call(keywords=keywords):
                yield from self.without_keyword(keywords)

    def signs(self, left: ast.expr, right: ast.expr, old: str, *others: str) -> Iterator[_Edit]:
        """Another operator between two operands."""
        start, end = self.at(left)[1], self.at(right)[0]
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, old.split()))
        if found := re.search(pattern.encode(), self.source[start:end]):
            for new in others:
                yield start + found.start(), start + found.end(), new, "operator"

    def constants(self, node: ast.Constant) -> Iterator[_Edit]:
        """Another constant."""
        if node.value is None:
            others: tuple[object, ...] = (0,)
        elif isinstance(node.value, bool):
            others = (not node.value,)
        else:
            others = (node.value + 1, node.value - 1) if node.value > 0 else (node.value + 1,)
        for other in others:
            yield *self.at(node), repr(other), "constant"

    def negated(self, test: ast.expr, *, returned: bool = False) -> Iterator[_Edit]:
        """The opposite of a condition; of another value that is returned, None."""
        start, end = self.at(test)
        if not returned or isinstance(test, ast.Compare | ast.BoolOp):
            yield start, end, f"(not ({self.source[start:end].decode()}))", "condition"
        else:
            yield start, end, "None", "returned value"

    def without_keyword(self, keywords: list[ast.keyword]) -> Iterator[_Edit]:
        """A call without one of its keyword arguments."""
        for keyword in keywords:
            start, end = self.at(keyword)
            if keyword.arg == "strict":  # of zip: an assertion
                continue
            if after := re.match(rb"\s*,\s*", self.source[end:]):
                yield start, end + after.end(), "", "argument"
            elif before := re.search(rb",\s*$", self.source[:start]):
                yield before.start(), end, "", "argument"

    def dropped(self, statement: ast.stmt, bound: frozenset[str], may_return: bool) -> Iterator[_Edit]:
        """Nothing in place of a statement that only has an effect, gives a name another value or leaves early."""
        match statement:
            case ast.Expr(value=ast.Constant()):
                return
            case ast.Expr() | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break() | ast.Delete():
                pass
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                pass
            case ast.Assign() if _names(statement) and _names(statement) <= bound:
                pass
            case ast.Return() if may_return:
                pass
            case _:
                return
        yield *self.at(statement), "pass", "statement"


def _head(statement: ast.stmt) -> Span:
    """The lines of a statement, without the statements in it."""
    body = getattr(statement, "body", None) or getattr(statement, "cases", None)
    if not body:
        return statement.lineno, statement.end_lineno or statement.lineno
    first = body[0].lineno if isinstance(body[0], ast.stmt) else body[0].pattern.lineno
    return statement.lineno, max(first - 1, statement.lineno)


def _names(statement: ast.stmt) -> frozenset[str]:
    """The names that a statement gives a value."""
    return frozenset(
        node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    return (node.arg for node in ast.walk(arguments) if isinstance(node, ast.arg))


def _is_left_alone(statement: ast.stmt) -> bool:
    """What only type checkers look at, `__all__`, and imports."""
    if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
        return True
    return isinstance(statement, ast.Import | ast.ImportFrom) or "__all__" in _names(statement)


def _is_a_type(parent: ast.AST, child: ast.AST) -> bool:
    """Whether a child is a type: a class to look for, or the parameter of a generic."""
    match parent:
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, second, *_]):
            return child is second
        case ast.Call(func=ast.Name(id="cast" | "TypeVar" | "NewType" | "ParamSpec")):
            return child is not parent.args[-1] or parent.func.id != "cast"
        case ast.Subscript(value=ast.Name(id="tuple" | "list" | "dict" | "Callable" | "Mapping" | "Annotated")):
            return True
    return False
