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

    Pages that are interleaved hold values, too: row 2k of a slot is the key of head k, and row 2k + 1 its value. As an
    array they are the keys; the values go with them as `ValueInKey(H)`.

    Args:
      pages: [P, page_size, K, H], an array or a QuantizedArray; interleaved an array [P, page_size, 2·K, H].
      table: int32 [B, M], with S = M · page_size.
      interleaved: whether keys and values alternate.

    Raises:
      ShapeError: a rank or a dtype is another one, or interleaved pages have an odd number of rows or are quantised.
    """

    pages: Stored
    table: Int32[Array, "B M"]
    interleaved: bool = False

    def __post_init__(self) -> None:
        is_quantized = isinstance(self.pages, QuantizedArray)
        if not (is_quantized or is_array(self.pages)) or self.pages.ndim != 4:
            found = self.pages if is_quantized else described(self.pages)
            raise ShapeError(f"PagedArray: pages must be [P, page_size, K, H], got {found}.")
        if not is_array(self.table) or self.table.ndim != 2 or not jnp.issubdtype(self.table.dtype, jnp.integer):
            raise ShapeError(f"PagedArray: table must be integers [B, M], got {described(self.table)}.")
        if type(self.interleaved) is not bool:
            raise ShapeError(f"PagedArray: interleaved must be True or False, got {self.interleaved!r}.")
        if self.interleaved and is_quantized:
            raise ShapeError(
                f"PagedArray: interleaved pages cannot be quantised, got {self.pages}; keep keys and values apart."
            )
        if self.interleaved and self.pages.shape[2] % 2:
            raise ShapeError(
                "PagedArray: interleaved pages must be [P, page_size, 2·K, H], an even number of rows, got "
                f"{described(self.pages)}."
            )

    @property
    def page_size(self) -> int:
        """The slots of a page."""
        return self.pages.shape[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, S, K, H."""
        rows, pages = self.table.shape
        _, page_size, heads, width = self.pages.shape
        return rows, pages * page_size, heads // 2 if self.interleaved else heads, width

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
        if self.interleaved:
            return self.gather_pair()[0]
        gathered: Stored = jax.tree.map(lambda pages: _gathered(pages, self.table), self.pages)
        return gathered

    def gather_pair(self) -> tuple[jax.Array, jax.Array]:
        """The keys and the values of interleaved pages, as `gather`, [B, S, K, H] each."""
        assert not isinstance(self.pages, QuantizedArray)
        gathered = _gathered(self.pages, self.table)
        return gathered[:, :, ::2], gathered[:, :, 1::2]

    def __repr__(self) -> str:
        if not hasattr(self.pages, "shape") or not hasattr(self.table, "shape"):  # what jax.tree.map put there
            return f"PagedArray({self.pages!r}, {self.table!r})"
        how = ", interleaved=True" if self.interleaved else ""
        return f"PagedArray(pages={list(self.pages.shape)}, table={list(self.table.shape)}{how})"


def _gathered(pages: jax.Array, table: jax.Array) -> jax.Array:
    pages, table = jnp.asarray(pages), jnp.asarray(table)  # both may be NumPy's
    found = pages.at[jnp.where(table < 0, pages.shape[0], table)].get(mode="fill", fill_value=_nothing(pages.dtype))
    rows, count, page_size, *rest = found.shape
    return found.reshape(rows, count * page_size, *rest)


def _nothing(dtype: np.dtype) -> float:
    """NaN, where a dtype has it; of quantised values the scale's NaN is enough."""
    return float("nan") if jnp.issubdtype(dtype, jnp.floating) else 0
