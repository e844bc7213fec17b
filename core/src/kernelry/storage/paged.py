"""Arrays stored in pages, found through a table."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ShapeError
from kernelry.storage.quantized import Quantization, QuantizedArray, Stored, described, is_array

if TYPE_CHECKING:
    from jaxtyping import Array, Int32


@final
@pytree("pages", "table")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PagedArray:
    """Keys or values [B, S, K, H] of which slot s of row b is stored in pages[table[b, s // page_size], s % page_size].

    A negative entry of the table says that there is no page; what a mask shows of it is NaN.

    Args:
      pages: [P, page_size, K, H], an array or a QuantizedArray.
      table: int32 [B, M], with S = M · page_size.

    Raises:
      ShapeError: a rank or a dtype is another one.
    """

    pages: Stored
    table: Int32[Array, "B M"]

    def __post_init__(self) -> None:
        is_quantized = isinstance(self.pages, QuantizedArray)
        if not (is_quantized or is_array(self.pages)) or self.pages.ndim != 4:
            found = self.pages if is_quantized else described(self.pages)
            raise ShapeError(f"PagedArray: pages must be [P, page_size, K, H], got {found}.")
        if not is_array(self.table) or self.table.ndim != 2 or not jnp.issubdtype(self.table.dtype, jnp.integer):
            raise ShapeError(f"PagedArray: table must be integers [B, M], got {described(self.table)}.")

    @property
    def page_size(self) -> int:
        """The slots of a page."""
        return self.pages.shape[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, S, K, H."""
        rows, pages = self.table.shape
        _, page_size, heads, width = self.pages.shape
        return rows, pages * page_size, heads, width

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return 4

    @property
    def quantization(self) -> Quantization | None:
        """How its pages are quantised."""
        return self.pages.quantization if isinstance(self.pages, QuantizedArray) else None

    def gather(self) -> Stored:
        """Copies the pages of every row side by side, [B, S, K, H]; NaN where there is no page."""
        gathered: Stored = jax.tree.map(lambda pages: _gathered(pages, self.table), self.pages)
        return gathered

    def __repr__(self) -> str:
        if not hasattr(self.pages, "shape") or not hasattr(self.table, "shape"):  # what jax.tree.map put there
            return f"PagedArray({self.pages!r}, {self.table!r})"
        return f"PagedArray(pages={list(self.pages.shape)}, table={list(self.table.shape)})"


def _gathered(pages: jax.Array, table: jax.Array) -> jax.Array:
    pages, table = jnp.asarray(pages), jnp.asarray(table)  # both may be NumPy's
    found = pages.at[jnp.where(table < 0, pages.shape[0], table)].get(mode="fill", fill_value=_nothing(pages.dtype))
    rows, count, page_size, *rest = found.shape
    return found.reshape(rows, count * page_size, *rest)


def _nothing(dtype: np.dtype) -> float:
    """NaN, where a dtype has it; of quantised values the scale's NaN is enough."""
    return float("nan") if jnp.issubdtype(dtype, jnp.floating) else 0
