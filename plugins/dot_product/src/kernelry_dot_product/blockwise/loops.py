"""Loops that are none where there is nothing to repeat: a call of one tile is a tenth of the program to compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from kernelry_dot_product.blockwise.visits import Visits


def scanned(body: Callable[[Any, Any], tuple[Any, Any]], start: Any, over: Any, length: int) -> tuple[Any, Any]:
    """`lax.scan` over the leading dimension, `length`; a plain call where it is 1."""
    if length != 1:
        return lax.scan(body, start, over)
    now, found = body(start, jax.tree.map(lambda array: array[0], over))
    return now, jax.tree.map(lambda array: array[None], found)


def visited(
    visits: Visits,
    visit: Callable[[bool, Any, Any], Any],
    counts: tuple[jax.Array, jax.Array],
    start: Any,
    blocks: int,
) -> Any:
    """Goes through the blocks that need no mask, then through those that need one.

    Args:
      visits: what is known while tracing.
      visit: (masked, place in the order, what there is so far) → what there is with that block.
      counts: how many blocks need no mask, and how many hold anything.
      start: what there is before.
      blocks: of the side that is gone through. One alone is visited with its mask, whatever that leaves of it.
    """
    if blocks == 1:
        return visit(not visits.all_full, 0, start)
    full, some = counts
    now = start
    if visits.any_full:
        now = lax.fori_loop(0, full, lambda at, now: visit(False, at, now), now)
    if visits.any_partial:
        now = lax.fori_loop(full, some, lambda at, now: visit(True, at, now), now)
    return now
