"""Reads a mask's form from text such as `causal & window(511)`, for commands.

What holds arrays is written by name alone (`segments`, `lengths`, `dense`), for only its form
matters where nothing is computed.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernelry.errors import ArgumentError, nearest
from kernelry.masks.band import Causal, Full, SlidingWindow
from kernelry.masks.base import Mask
from kernelry.masks.form import MaskForm
from kernelry.masks.indexed import Dense, Lengths, Segments


def parse_form(text: str, classes: Mapping[str, type[Mask]] | None = None) -> MaskForm:
    """Reads a mask expression.

    Args:
      text: names, calls with whole numbers, `&`, `|`, `~`, parentheses and `.at(query_offset=…)`,
        where the word `traced` stands for an offset known only at run time.
      classes: masks of plugins, by name; core's own names come first.

    Raises:
      ArgumentError: it is no mask expression, or a name is unknown.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ArgumentError(f"mask {text!r} is not an expression: {error.msg}.") from error
    return _Reader(text, {**(classes or {}), **_BUILTIN}).read(tree).form


def _segments(separate: int = 0) -> Mask:
    ids = jnp.zeros((1,), jnp.int32)
    return Segments(ids, ids) if separate else Segments(ids)


_BUILTIN: dict[str, Any] = {
    "full": Full,
    "causal": Causal,
    "window": SlidingWindow,
    "segments": _segments,
    "lengths": lambda: Lengths(jnp.zeros((1,), jnp.int32)),
    "dense": lambda: Dense(jnp.ones((1, 1, 1, 1), bool)),
}


class _Reader:
    """Walks the syntax tree; knows names, calls and operators, and nothing else."""

    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        self.text = text
        self.names = names

    def read(self, node: ast.expr) -> Mask:
        match node:
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return self.read(left) & self.read(right)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.read(left) | self.read(right)
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return ~self.read(operand)
            case ast.Call(func=ast.Attribute(value=inside, attr="at"), args=[], keywords=keywords):
                return self.placed(inside, keywords)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self.make(name, [self.number(argument) for argument in arguments])
            case ast.Name(id=name):
                return self.make(name, [])
        raise ArgumentError(f"mask {self.text!r}: cannot read {ast.unparse(node)!r}.")

    def placed(self, inside: ast.expr, keywords: list[ast.keyword]) -> Mask:
        known = ("query_offset", "kv_offset")
        for keyword in keywords:
            if keyword.arg not in known:
                raise ArgumentError(
                    f"mask {self.text!r}: unknown .at({keyword.arg}=…){nearest(str(keyword.arg), known)}"
                )
        return self.read(inside).at(**{str(keyword.arg): self.offset(keyword.value) for keyword in keywords})

    def make(self, name: str, numbers: list[int]) -> Mask:
        if name not in self.names:
            raise ArgumentError(f"mask {self.text!r}: unknown name {name!r}{nearest(name, self.names)}")
        try:
            made: Mask = self.names[name](*numbers)
        except TypeError as error:
            raise ArgumentError(f"mask {self.text!r}: {name}{tuple(numbers)}: {error}.") from error
        return made

    def number(self, node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
                return -value
        raise ArgumentError(f"mask {self.text!r}: {ast.unparse(node)!r} must be a whole number.")

    def offset(self, node: ast.expr) -> int | jax.Array:
        traced = isinstance(node, ast.Name) and node.id == "traced"
        return jnp.zeros((), jnp.int32) if traced else self.number(node)
