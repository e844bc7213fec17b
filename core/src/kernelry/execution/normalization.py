"""How partials merge and finish: the two forms of the softmax's statistics.

Laws: `merge` is associative and commutative up to rounding, an empty part is its identity, and
`finalize(merge(parts))` equals attention over the concatenated keys, gradients included.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernelry.errors import ArgumentError, ShapeError
from kernelry.kernel.partial import Partial, checking_output, heads_last

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Normalization(Protocol):
    """Turns weighted values and their statistics into attention."""

    @abstractmethod
    def merge(self, partials: Sequence[Partial]) -> Partial:
        """Merges attention over disjoint parts of the keys into attention over all of them."""

    @abstractmethod
    def finalize(self, partial: Partial, sinks: Float[Array, " N"] | None = None) -> Float[Array, "B T N D"]:
        """Returns the output in the query's dtype; sinks join the denominator here, once."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class LogSumExp(Normalization):
    """Softmax by `lse`: out = Σᵢ outᵢ · exp(lseᵢ − lse), lse = log Σᵢ exp(lseᵢ)."""

    def merge(self, partials: Sequence[Partial]) -> Partial:
        parts = [to_lse(partial) for partial in partials]
        lses = jnp.stack([_float32(part.lse) for part in parts])
        top = lax.stop_gradient(_finite(lses.max(axis=0)))
        rests = jnp.stack([_rest(part) for part in parts])
        weights = jnp.exp((lses - top[None]) + rests)
        total = weights.sum(axis=0)
        some = total > 0
        divisor = jnp.where(some, total, 1.0)
        outs = (heads_last(w / divisor) * part.out.astype(jnp.float32) for w, part in zip(weights, parts, strict=True))
        lse, rest = log_sum(top, divisor)
        return Partial(
            sum(outs),  # type: ignore[arg-type]
            lse=jnp.where(some, lse, -jnp.inf),
            max_logits=_largest(parts),
            dtype=parts[0].dtype,
            lse_rest=rest if all(part.lse_rest is not None for part in parts) else None,
        )

    def finalize(self, partial: Partial, sinks: Float[Array, " N"] | None = None) -> Float[Array, "B T N D"]:
        if not partial.has_statistics and sinks is None:
            return partial.out.astype(partial.dtype)
        partial = to_lse(partial)
        out = partial.out if sinks is None else with_sinks(partial.out, partial.lse, sinks, partial.lse_rest)
        return out.astype(partial.dtype)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class MaxSum(Normalization):
    """Softmax by running maximum and sum of an unnormalised output. The maximum has no gradient."""

    def merge(self, partials: Sequence[Partial]) -> Partial:
        parts = [to_max_sum(partial) for partial in partials]
        maxima = jnp.stack([_float32(part.max) for part in parts])
        top = lax.stop_gradient(maxima.max(axis=0))
        weights = jnp.exp(lax.stop_gradient(maxima) - _finite(top)[None])
        outs = (heads_last(w) * part.out.astype(jnp.float32) for w, part in zip(weights, parts, strict=True))
        sums = (w * _float32(part.sum) for w, part in zip(weights, parts, strict=True))
        return Partial(
            sum(outs),  # type: ignore[arg-type]
            max=top,
            sum=sum(sums),
            max_logits=_largest(parts),
            dtype=parts[0].dtype,
        )

    def finalize(self, partial: Partial, sinks: Float[Array, " N"] | None = None) -> Float[Array, "B T N D"]:
        return LogSumExp().finalize(partial, sinks)


def to_lse(partial: Partial) -> Partial:
    """Converts a Partial to the normative statistic: lse = max + log(sum), out divided by sum.

    Raises:
      ArgumentError: it holds no statistics.
    """
    if partial.lse is not None:
        return partial
    if partial.max is None or partial.sum is None:
        if (partial.max is None) != (partial.sum is None):
            missing = "sum" if partial.sum is None else "max"
            raise ArgumentError(f"this Partial lacks {missing}; return_partial=True gives lse, or max and sum.")
        raise ArgumentError("this Partial holds no statistics; ask for them with return_partial=True.")
    some = partial.sum > 0
    divisor = jnp.where(some, partial.sum, 1.0)
    lse, rest = log_sum(lax.stop_gradient(_finite(partial.max)), divisor)
    out = partial.out.astype(jnp.float32) / heads_last(divisor)
    return dataclasses.replace(partial, out=out, lse=jnp.where(some, lse, -jnp.inf), lse_rest=rest, max=None, sum=None)


def to_max_sum(partial: Partial) -> Partial:
    """Converts a Partial to the other form: max = lse, sum = 1 up to the rounding of lse, so out stays as it is.

    Gradients through lse are carried by `sum`, for `max` has none.
    """
    if partial.max is not None:
        return partial
    lse = _float32(to_lse(partial).lse)
    top = lax.stop_gradient(lse)
    some = top > -jnp.inf
    difference = jnp.where(some, lse, 0.0) - jnp.where(some, top, 0.0)
    total = jnp.where(some, jnp.exp(difference + _rest(partial)), 0.0)
    out = partial.out.astype(jnp.float32) * heads_last(total)
    return dataclasses.replace(partial, out=out, lse=None, lse_rest=None, max=top, sum=total)


def log_sum(top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns top + log(total), and what rounding took from it, which has no gradient.

    With a top of −3e38 the logarithm vanishes: the difference is that between a mean of the values and their sum.
    """
    log = jnp.log(total)
    lse = top + log
    return lse, lax.stop_gradient(log - (lse - top))


def lse_with_sinks(
    lse: Float[Array, "B N T"], rest: Float[Array, "B N T"] | None, sinks: Float[Array, " N"]
) -> tuple[Float[Array, "B N T"], Float[Array, "B N T"]]:
    """Returns the lse of keys and sinks, −inf where there is neither, and what rounding took from it."""
    logits = sinks.astype(jnp.float32)[None, :, None]
    top = _finite(jnp.maximum(lse, logits))
    total = jnp.exp((lse - top) + (0.0 if rest is None else rest)) + jnp.exp(logits - top)
    some = total > 0
    whole, whole_rest = log_sum(top, jnp.where(some, total, 1.0))
    return jnp.where(some, whole, -jnp.inf), whole_rest


def with_sinks(
    out: Float[Array, "B T N D"],
    lse: Float[Array, "B N T"] | None,
    sinks: Float[Array, " N"],
    lse_rest: Float[Array, "B N T"] | None = None,
) -> Float[Array, "B T N D"]:
    """Lets one sink logit per head join the denominator: out · sigmoid(lse − sink), in float32 or wider."""
    if lse is None:
        raise ArgumentError("sinks need lse; ask for it with return_partial=True.")
    wide = jnp.promote_types(lse.dtype, jnp.float32)
    empty = jnp.isneginf(lse)  # a sink of −inf must not meet the lse of an empty row
    difference = jnp.where(empty, 0.0, lse).astype(wide) - sinks.astype(wide)[None, :, None]
    difference = difference if lse_rest is None else difference + lse_rest.astype(wide)
    share = jnp.where(empty, 0.0, jax.nn.sigmoid(difference))
    return out.astype(wide) * heads_last(share)


@checking_output
def merge(partials: Sequence[Partial]) -> Partial:
    """Merges attention over disjoint parts of the keys into attention over all of them, in float32.

    Args:
      partials: at least one, each with statistics, for the same queries: same shape and dtype.

    Returns:
      A Partial with `max` and `sum` where every part has them, else with `lse`; with `lse_rest` where every part has
      it, as all from `attention` do; with the largest `max_logits` where the parts have them.

    Raises:
      ArgumentError: no partials, one without statistics, or some with `max_logits` and some without.
      ShapeError: outputs of different shapes or dtypes.
    """
    if isinstance(partials, Partial):
        raise ArgumentError("merge takes a sequence of Partials, got one Partial; write merge([partial]).")
    if not isinstance(partials, Iterable):
        raise ArgumentError(f"merge takes a sequence of Partials, got {_not_a_partial(partials)}.")
    partials = tuple(partials)
    _check_parts(partials)
    form: Normalization = MaxSum() if all(partial.max is not None for partial in partials) else LogSumExp()
    return form.merge(partials)


@checking_output
def finalize(partial: Partial, sinks: Float[Array, " N"] | None = None) -> Float[Array, "B T N D"]:
    """Returns the output of a Partial in the query's dtype.

    Args:
      partial: what `attention(..., return_partial=True)` or `merge` returned.
      sinks: [N], one logit per query head, joins the denominator once.

    Raises:
      ArgumentError: not a Partial, or sinks without statistics.
      ShapeError: sinks are not [N].
    """
    if not isinstance(partial, Partial):
        raise ArgumentError(f"finalize takes a Partial, got {_not_a_partial(partial)}.")
    sinks = None if sinks is None else jnp.asarray(sinks)
    if sinks is not None and jnp.shape(sinks) != (partial.out.shape[2],):
        raise ShapeError(
            f"sinks must be [N] = [{partial.out.shape[2]}], one logit per query head, got shape {jnp.shape(sinks)}."
        )
    return LogSumExp().finalize(partial, sinks)


def _check_parts(partials: Sequence[Partial]) -> None:
    if not partials:
        raise ArgumentError("merge got no partials; there is no shape to give an empty result.")
    for partial in partials:
        if not isinstance(partial, Partial):
            raise ArgumentError(f"merge takes Partials, got {_not_a_partial(partial)}.")
    outputs = sorted({f"{part.dtype}{list(part.out.shape)}" for part in partials})
    if len(outputs) > 1:
        raise ShapeError(f"merge takes parts of one attention, for the same queries; got outputs {', '.join(outputs)}.")
    for name in ("lse", "lse_rest", "max", "sum", "max_logits"):
        shapes = {array.shape for part in partials if (array := getattr(part, name)) is not None}
        if len(shapes) > 1:
            found = " and ".join(map(str, sorted(shapes)))
            raise ShapeError(f"merge takes parts whose {name} has one shape, got {found}.")
    without = sum(part.max_logits is None for part in partials)
    if 0 < without < len(partials):
        raise ArgumentError(
            f"{without} of {len(partials)} partials hold no max_logits; ask for them in every part or in none."
        )


def _not_a_partial(value: object) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {value.shape}; ask for a Partial with attention(…, return_partial=True)"
    if isinstance(value, tuple) and value and isinstance(value[0], Partial):
        return "a tuple: with return_max_logits=True a call returns (partial, max_logits); pass the first"
    return repr(value) if value is None else f"a {type(value).__name__}"


def _finite(statistic: jax.Array) -> jax.Array:
    """Replaces −inf by 0, so that differences of empty rows stay defined."""
    return jnp.where(statistic == -jnp.inf, 0.0, statistic)


def _float32(statistic: jax.Array | None) -> jax.Array:
    if statistic is None:
        raise ArgumentError("this Partial lacks a statistic; ask for it with return_partial=True.")
    return statistic.astype(jnp.float32)


def _rest(partial: Partial) -> jax.Array:
    """What rounding took from a Partial's lse, as far as it is known."""
    if partial.lse_rest is not None:
        return lax.stop_gradient(_float32(partial.lse_rest))
    return jnp.zeros_like(_float32(partial.lse))


def _largest(parts: Sequence[Partial]) -> jax.Array | None:
    found = [part.max_logits for part in parts]
    if any(part is None for part in found):
        return None
    return jnp.stack(found).max(axis=0)  # type: ignore[arg-type]
