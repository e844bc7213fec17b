"""Attention over a part of the keys, and the two forms of its softmax statistics."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, final

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernelry._pytree import pytree, short_repr

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_P = ParamSpec("_P")
_R = TypeVar("_R")

REMAT_NAME = "context"
"""How `jax.checkpoint` policies know what attention's backward pass needs; the name that MaxText uses, too."""


@final
@pytree("out", "lse", "max", "sum", "max_logits", "lse_rest")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """Attention over a part of the keys with the statistics asked for.

    Args:
      out: [B, T, N, D]; normalised, unless `max` and `sum` are given.
      lse: [B, N, T], log Σ exp(logits), natural logarithm; −inf for a row that sees nothing.
      max, sum: [B, N, T], the running maximum and Σ exp(logits − max) of an unnormalised `out`;
        −inf and 0 for a row that sees nothing.
      max_logits: [B, N], the largest visible logit; −inf where nothing is visible. No gradient.
      dtype: the dtype that `finalize` returns, the query's.
      lse_rest: [B, N, T], what rounding to float32 took from `lse`: log Σ exp(logits) = lse + lse_rest. It matters
        where logits are so large that adding a logarithm changes nothing, beyond ±1e7: there lse does not tell how many
        keys it sums over. The Partials that `attention` returns have it wherever they have `lse`, 0 from a kernel that
        does not return it; None, in a Partial made by hand, counts as 0. No gradient.
    """

    out: Float[Array, "B T N D"]
    lse: Float[Array, "B N T"] | None = None
    max: Float[Array, "B N T"] | None = None
    sum: Float[Array, "B N T"] | None = None
    max_logits: Float[Array, "B N"] | None = None
    dtype: str = "float32"
    lse_rest: Float[Array, "B N T"] | None = None

    __repr__ = short_repr

    @property
    def has_statistics(self) -> bool:
        """True where this Partial can be merged with others."""
        return self.lse is not None or self.max is not None


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Switches off JAX's search for NaN and inf after every operation (`jax_debug_nans`), where it is on.

    Intermediate values may hold them: a hidden key has a logit of −inf, a row that sees nothing has lse −inf, and a
    page that does not exist holds NaN.
    """
    with contextlib.ExitStack() as stack:
        for check in (jax.debug_nans, jax.debug_infs):
            if check.value:  # left alone where it is off, for jitted functions are cached by it
                stack.enter_context(check(False))
        yield


def checked(tree: Any) -> Any:
    """Copies arrays where JAX searches for NaN or inf, so that it searches them; elsewhere returns them as they are."""
    return jax.tree.map(jnp.copy, tree) if _is_checking() else tree


def checking_output(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Has JAX search for NaN and inf only in what a function returns, or in the first of a tuple that it returns."""

    @functools.wraps(function)
    def run(*arguments: _P.args, **options: _P.kwargs) -> _R:
        with unchecked():
            result = function(*arguments, **options)
        checked_result: _R = _with_checked_output(result) if _is_checking() else result
        return checked_result

    return run


def _is_checking() -> bool:
    return bool(jax.debug_nans.value or jax.debug_infs.value)


def _with_checked_output(result: Any) -> Any:
    if isinstance(result, tuple):
        return (_with_checked_output(result[0]), *result[1:])
    if isinstance(result, Partial):
        return dataclasses.replace(result, out=checked(result.out))
    return checked(result)


def named(arrays: _R) -> _R:
    """Gives arrays the name `REMAT_NAME`; adds no operation.

    Name each array once: of one that was named twice, a policy that saves by name keeps both if both are read.
    """
    same: _R = None if arrays is None else checkpoint_name(arrays, REMAT_NAME)  # type: ignore[assignment,no-untyped-call]
    return same


def heads_last(statistic: jax.Array) -> jax.Array:
    """Returns a statistic [B, N, T] as [B, T, N, 1], which broadcasts against an output [B, T, N, D]."""
    return statistic.swapaxes(1, 2)[..., None]
