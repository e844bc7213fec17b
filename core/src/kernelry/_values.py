"""What users hand over, made plain: arrays out of wrappers, and sizes that may be symbolic."""

from __future__ import annotations

import functools
from typing import Any, final

import jax

from kernelry.errors import ArgumentError


def unwrapped(value: Any) -> Any:
    """Returns the array inside a wrapper that JAX would unwrap, e.g. flax's `nnx.Param`; anything else as it is."""
    wraps = hasattr(value, "__jax_array__") and not isinstance(value, jax.Array | type)
    return value.__jax_array__() if wraps else value


@final
class SymbolicSize(int):
    """A size that is known only when an exported program is called, e.g. `b` or `2*b`: at least 1.

    It equals sizes of the same text and no number. Estimates count it as 1; what decides must ask for it first.
    """

    text: str

    def __new__(cls, text: str) -> SymbolicSize:
        size = super().__new__(cls, 1)
        size.text = text
        return size

    @classmethod
    def parse(cls, text: str) -> SymbolicSize:
        """Reads an expression as `jax.export.symbolic_shape` does.

        Raises:
          ArgumentError: it is none.
        """
        return cls(_canonical(text))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SymbolicSize) and self.text == other.text

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.text)

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]
        return (self.text,)

    def __repr__(self) -> str:
        return self.text


@functools.lru_cache(maxsize=256)
def _canonical(text: str) -> str:
    try:
        [size] = jax.export.symbolic_shape(text)
    except Exception:  # JAX's parser raises various types
        size = 0
    if not jax.export.is_symbolic_dim(size):
        raise ArgumentError(f"a size must be an integer, or the text of a symbolic one, e.g. 'b', got {text!r}.")
    return str(size)


def size_of(dimension: Any) -> int:
    """A dimension of an array as a Request keeps it."""
    return SymbolicSize(str(dimension)) if jax.export.is_symbolic_dim(dimension) else dimension
