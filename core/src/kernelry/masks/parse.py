"""Reads masks from text such as `causal & window(511)`, for commands.

    mask       = mask & mask | mask | mask | ~mask | (mask) | mask.at(place=whole numbers, …) | name | name(…)
    place      = query_offset | kv_offset | query_positions | kv_positions

The names are those of forms (`causal`, `window(3)`) and of the classes (`Causal()`, `SlidingWindow(3)`),
so that what a mask's repr shows can be read back. Nothing is evaluated as Python.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernelry import masks
from kernelry.errors import ArgumentError, KernelryError, nearest, sentence
from kernelry.masks.base import Extent, Mask, Placeholder
from kernelry.masks.fit import is_mask_class
from kernelry.masks.form import MaskForm

_DEEPEST = 50
"""Levels of nesting; far more than a person writes, and canonical forms recurse a few times per level."""
_SHOWN = 100
"""Characters of the expression that messages repeat."""
_PLACES = ("query_offset", "kv_offset", "query_positions", "kv_positions")
_TRUTH = {"true": True, "false": False}
_CORE = tuple(cls for cls in map(vars(masks).__getitem__, masks.__all__) if is_mask_class(cls))
_CLASS_NAMES = frozenset(name for cls in _CORE for name in cls.readers()) - {cls.word for cls in _CORE}
_LEAST = Extent(batch=1, q_heads=1, kv_heads=1, q_len=1, kv_len=1)


def parse_mask(text: str, classes: Mapping[str, Callable[..., Mask]] | None = None) -> Mask:
    """Reads a mask with its arrays, e.g. `causal & segments(0, 0, 1, 1)`.

    Args:
      text: an expression as above; arrays are written as whole numbers or as lists.
      classes: masks of plugins, by name; core's own names come first.

    Raises:
      ArgumentError: it is not a mask expression, a name is unknown, or an array is missing.
    """
    return _parse(text, classes, None)


def parse_form(
    text: str, classes: Mapping[str, Callable[..., Mask]] | None = None, *, anywhere: bool = False
) -> MaskForm:
    """Reads a mask's form, in which arrays may be left out.

    Args:
      text: an expression as above. `segments`, `segments_separate`, `spans`, `spans_separate`, `lengths`,
        `prefix_lm`, `dense` and `block_selection(size)` need no arrays, and the word `traced` means an
        offset or positions known only at run time.
      classes: masks of plugins, by name; core's own names come first.
      anywhere: whether queries that the mask does not place stand at an offset known only at run time.

    Raises:
      ArgumentError: it is not a mask expression, or a name is unknown.
    """
    mask = _parse(text, classes, _LEAST)
    return mask.at(query_offset=jnp.zeros((), jnp.int32)).form if anywhere else mask.form


def parse_shaped(text: str, extent: Extent, names: Mapping[str, Callable[..., Mask]] | None = None) -> Mask:
    """Reads a mask for sizes alone: arrays that are left out have the shapes that fit, and no meaning.

    Args:
      text: an expression as for `parse_form`.
      extent: the sizes that it is to fit.
      names: more names, such as masks of plugins; core's own come first.

    Raises:
      ArgumentError: it is not a mask expression, or a name is unknown.
    """
    return _parse(text, names, extent)


def names_in(text: str) -> frozenset[str]:
    """Returns the names that stand alone in an expression that one of the functions above has read."""
    return frozenset(node.id for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Name))


def _parse(text: str, classes: Mapping[str, Callable[..., Mask]] | None, extent: Extent | None) -> Mask:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return _Reader(shown, classes or {}, extent).read(tree)
    except (SyntaxError, UnicodeError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ArgumentError(
            f"mask {shown!r} is not an expression: {reason}; write e.g. 'causal & window(511)'."
        ) from error
    except (RecursionError, MemoryError):  # how Python's own parser answers to thousands of levels
        raise _too_deep(shown) from None


def _too_deep(shown: str) -> ArgumentError:
    return ArgumentError(f"mask {shown!r} is nested more than {_DEEPEST} deep; compose it in Python.")


class _Reader:
    """Walks the syntax tree; knows names, calls, operators and lists, and nothing else."""

    def __init__(self, shown: str, classes: Mapping[str, Callable[..., Mask]], extent: Extent | None) -> None:
        self.shown = shown
        self.names, self.placeholders = _vocabulary(classes)
        self.extent = extent  # of the arrays that are left out; None where none may be

    def read(self, node: ast.expr, depth: int = 0) -> Mask:
        if depth > _DEEPEST:
            raise _too_deep(self.shown)
        match node:
            case ast.BinOp(op=ast.BitAnd()):
                return functools.reduce(operator.and_, [self.read(part, depth + 1) for part in _chain(node)])
            case ast.BinOp(op=ast.BitOr()):
                return functools.reduce(operator.or_, [self.read(part, depth + 1) for part in _chain(node)])
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return ~self.read(operand, depth + 1)
            case ast.Call(func=ast.Attribute(value=inside, attr="at"), args=arguments, keywords=keywords):
                if arguments:
                    raise self.wrong(f"at() takes its arguments by name: {', '.join(_PLACES)}")
                return self.placed(self.read(inside, depth + 1), keywords)
            case ast.Call(func=ast.Name() | ast.Attribute() as called, args=arguments, keywords=keywords):
                if _dotted(called) == "Predicate":
                    raise self.wrong("a Predicate's Python function cannot be written; draw it with kernelry.pictures")
                named = {str(keyword.arg): self.value(keyword.value) for keyword in keywords}
                return self.make(_dotted(called), [self.value(argument) for argument in arguments], named)
            case ast.Name() | ast.Attribute():
                return self.make(_dotted(node), [], {})
        if isinstance(node, ast.BoolOp | ast.UnaryOp):
            raise self.wrong(f"cannot read {_source(node)!r}; write &, | and ~ for and, or and not")
        raise self.wrong(f"cannot read {_source(node)!r}; masks are names, calls, &, |, ~ and .at(...)")

    def placed(self, mask: Mask, keywords: list[ast.keyword]) -> Mask:
        for keyword in keywords:
            if keyword.arg not in _PLACES:
                raise self.wrong(f"unknown .at({keyword.arg}=…){nearest(str(keyword.arg), _PLACES)}")
        return mask.at(**{str(keyword.arg): self.place(keyword) for keyword in keywords})

    def place(self, keyword: ast.keyword) -> Any:
        if not (isinstance(keyword.value, ast.Name) and keyword.value.id == "traced"):
            return self.value(keyword.value)
        if self.extent is None:
            raise self.wrong(f"a picture needs the numbers of {keyword.arg}; `traced` is known only at run time")
        if str(keyword.arg).endswith("offset"):
            return jnp.zeros((), jnp.int32)
        length = self.extent.q_len if str(keyword.arg).startswith("query") else self.extent.kv_len
        return jnp.zeros((length,), jnp.int32)

    def make(self, name: str, values: list[Any], named: Mapping[str, Any]) -> Mask:
        if name not in self.names and name not in self.placeholders:
            known = {*self.names, *self.placeholders} - _CLASS_NAMES
            raise self.wrong(f"unknown name {name!r}{nearest(name, known)}")
        without = self.placeholders.get(name)
        if without is not None and len(values) == without.numbers and not named:
            if self.extent is not None:
                return without.make(self.extent, *values)
            raise self.wrong(f"a picture needs the array of {name!r}: write {without.instead}")
        if name not in self.names:
            assert without is not None
            raise self.wrong(f"{name!r} takes no arrays: write {without.instead}")
        signature = inspect.signature(_written_as(self.names[name]))
        try:
            signature.bind(*values, **named)
        except TypeError as error:
            written = signature.replace(
                parameters=[p.replace(annotation=p.empty) for p in signature.parameters.values()],
                return_annotation=signature.empty,
            )
            raise self.wrong(f"{name}(…): {error}; it is written {name}{written}") from error
        try:
            return self.names[name](*values, **named)
        except KernelryError:
            raise
        except (TypeError, ValueError, OverflowError) as error:  # wrong in number or kind
            raise self.wrong(f"{name}(…): {error}") from error

    def value(self, node: ast.expr) -> Any:
        """A whole number, a truth value, or a NumPy array written as a list."""
        found = self.literal(node)
        if not isinstance(found, list):
            return found
        try:
            array = np.asarray(found)
        except ValueError as error:
            raise self.wrong(f"the rows of {_source(node)!r} differ in length") from error
        return array if array.size else array.astype(np.int32)

    def literal(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
                return -value
            case ast.Name(id=name) if name in _TRUTH:
                return _TRUTH[name]
            case ast.List(elts=elements):
                return [self.literal(element) for element in elements]
        raise self.wrong(f"{_source(node)!r} must be a whole number, or a list of them")

    def wrong(self, what: str) -> ArgumentError:
        return ArgumentError(sentence(f"mask {self.shown!r}: {what}"))


def _vocabulary(
    classes: Mapping[str, Callable[..., Mask]],
) -> tuple[dict[str, Callable[..., Mask]], dict[str, Placeholder]]:
    """What expressions may call, and the words for masks without their arrays; core's come first."""
    known = [*filter(is_mask_class, classes.values()), *(cls for cls in _CORE if cls is not masks.Predicate)]
    names: dict[str, Callable[..., Mask]] = {name: getattr(cls, "read", cls) for name, cls in classes.items()}
    placeholders: dict[str, Placeholder] = {}
    for cls in known:
        names |= cls.readers()
        placeholders |= cls.placeholders()
    return names, placeholders


def _written_as(reader: Callable[..., Mask]) -> Callable[..., Mask]:
    """The class, where a mask is read with the arguments of its class."""
    plain = getattr(reader, "__func__", None) is Mask.read.__func__  # type: ignore[attr-defined]
    return reader.__self__ if plain else reader  # type: ignore[attr-defined]


def _chain(node: ast.BinOp) -> list[ast.expr]:
    """The operands of `a & b & c`, which Python nests to the left."""
    operands: list[ast.expr] = []
    inside: ast.expr = node
    while isinstance(inside, ast.BinOp) and isinstance(inside.op, type(node.op)):
        operands.append(inside.right)
        inside = inside.left
    return [inside, *reversed(operands)]


def _dotted(node: ast.expr) -> str:
    """`Causal` of `Causal`, `masks.Causal` and `kernelry.masks.Causal`."""
    return _source(node).removeprefix("kernelry.").removeprefix("masks.")


def _source(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
