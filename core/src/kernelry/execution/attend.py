"""Runs kernels over parts of the keys, inside the custom_vjps of core.

Without statistics a kernel's `forward` is called bare, so the program and its derivative are the kernel's own. With
statistics, and always where it declares `backward_only`, a kernel with `gradient=BACKWARD` is differentiated by its
`backward` with the output and lse of the whole attention (all parts merged, sinks included): probabilities are
exp(logits − lse) and delta is Σ out · d_out, so each part's unmodified backward yields its exact share, and
d_sink = −Σ exp(sink − lse) · delta.

What the backward pass reads of the output and the statistics has a name for `jax.checkpoint` policies: one that saves
it runs no kernel again. A kernel whose own derivative is used gives the name itself, for only it can.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.errors import PluginError
from kernelry.execution.adapters.base import Duty
from kernelry.execution.normalization import lse_with_sinks, merge, to_lse, with_sinks
from kernelry.kernel.capabilities import Gradient, ManualAxes
from kernelry.kernel.partial import Partial, checked, heads_last, named, unchecked
from kernelry.kernel.spec import Gradients, Inputs, KernelSpec, Tiling
from kernelry.request.arguments import narrowed
from kernelry.request.request import Operand, Request

_R = TypeVar("_R")


@final
@dataclasses.dataclass(frozen=True, slots=True)
class BoundKernel:
    """A kernel with the request that it serves over one part of the keys; `duties` is what core adds to it."""

    kernel: KernelSpec
    request: Request
    tiling: Tiling
    duties: frozenset[Duty] = frozenset()

    def forward(self, inputs: Inputs, *, statistics: bool) -> Partial:
        """Runs the kernel.

        Raises:
          PluginError: what it returned is not a Partial, or has a wrong shape or dtype, or lacks a statistic.
        """
        if self.is_narrow or self.is_unchecked:
            from kernelry.execution.apart import forward  # elsewhere nothing of it is needed

            partial = forward(self, inputs, statistics=statistics)
        else:
            partial = self.run(inputs, statistics=statistics)
        return _zero_in_empty_rows(partial) if Duty.EMPTY_ROWS in self.duties else partial

    @property
    def has_backward(self) -> bool:
        """Whether core may call its `backward`."""
        return self.kernel.capabilities.gradient is Gradient.BACKWARD

    @property
    def needs_backward(self) -> bool:
        """Whether its `forward` alone would lack a derivative that is asked for."""
        return self.kernel.capabilities.backward_only and bool(self.request.gradients)

    @property
    def is_narrow(self) -> bool:
        """Whether 64-bit types are enabled but not used here: the kernel then runs as if they were not.

        Vendors' index maps and block numbers are int32, and do not trace together with the int64 of Python's integers.
        """
        capabilities, dtypes = self.kernel.capabilities, (self.request.dtype, self.request.logits_dtype)
        if capabilities.gradient is Gradient.NATIVE or "float64" in dtypes:
            return False
        return jax.dtypes.canonicalize_dtype("int64") == "int64"

    @property
    def is_unchecked(self) -> bool:
        """Whether a shard_map around it, if there is one, must not check its manual axes."""
        is_checked = self.kernel.capabilities.manual_axes is ManualAxes.CHECKED
        return not is_checked and not jax.sharding.get_abstract_mesh().empty

    def traced(self, function: Callable[..., _R], *arrays: Any) -> _R:
        """Calls what traces the kernel, a function of pytrees of arrays that returns one."""
        with jax.enable_x64(False) if self.is_narrow else contextlib.nullcontext():
            if not self.is_unchecked:
                return function(*arrays)
            from kernelry.execution.manual_axes import unchecked

            return unchecked(function, *arrays)

    def run(self, inputs: Inputs, *, statistics: bool) -> Partial:
        """Runs the kernel's forward alone, and checks what it returned."""

        def forward(inputs: Inputs) -> Partial:
            partial = self.kernel.body().forward(inputs, self.request, self.tiling, statistics=statistics)
            self._check("forward", partial, Partial, _faults_of_partial(partial, inputs, self.request, statistics))
            return partial

        return self.traced(forward, inputs)

    def backward(
        self, inputs: Inputs, out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array | None
    ) -> Gradients:
        """Runs the kernel's backward; see `Kernel.backward`.

        Raises:
          PluginError: what it returned is not Gradients, or has a wrong shape or dtype, or lacks the bias's.
        """
        if d_lse is not None and Duty.LSE_GRADIENT in self.duties:
            # delta = Σ out · d_out is what a backward subtracts from the cotangents of the probabilities. The last
            # column of the values is 0, so out = −1 and d_out = d_lse in it change delta by −d_lse and nothing else.
            out = out.at[..., -1].set(-1)
            d_out = d_out.at[..., -1].set(d_lse.swapaxes(1, 2).astype(d_out.dtype))
            d_lse = None

        def backward(inputs: Inputs, *whole: Any) -> tuple[Any, ...]:
            share = self.kernel.body().backward(inputs, self.request, self.tiling, *whole)
            self._check("backward", share, Gradients, _faults_of_gradients(share, inputs, self.request))
            return share.query, share.key, share.value, share.bias

        return Gradients(*self.traced(backward, inputs, out, lse, d_out, d_lse))

    def _check(self, method: str, found: object, kind: type, faults: Iterable[str]) -> None:
        """Raises PluginError where a result is not what the contract says; looks at shapes and dtypes alone."""
        if not isinstance(found, kind):
            faults = (f"it is {_described(found)}, expected a kernelry.plugin.{kind.__name__}",)
        wrong = "; ".join(faults)
        if wrong:
            body = type(self.kernel.body())
            raise PluginError(
                f"kernel {self.kernel.name!r} ({body.__module__}.{body.__qualname__}) returned a wrong result from "
                f"{method}, asked for {self.request}: {wrong}. The fault is the kernel's: report it to its authors, "
                f"or choose another kernel."
            )


def _faults_of_partial(found: Partial, inputs: Inputs, request: Request, statistics: bool) -> Iterator[str]:
    batch, q_len, heads = inputs.query.shape[:3]
    wide = ("float32", request.logits_dtype)  # of statistics, and of an output that goes with them
    if found.dtype != request.dtype:
        yield f"Partial.dtype is {found.dtype!r}, expected the query's {request.dtype!r}: pass dtype=request.dtype"
    out = (batch, q_len, heads, request.value_dim)
    yield from _fault("out", found.out, "B T N D", out, (request.dtype, *wide))
    given = {name: array for name in ("lse", "max", "sum") if (array := getattr(found, name)) is not None}
    for name, array in given.items():
        yield from _fault(name, array, "B N T", (batch, heads, q_len), wide)
    if found.lse_rest is not None:
        yield from _fault("lse_rest", found.lse_rest, "B N T", (batch, heads, q_len), wide)
    if (given or statistics) and set(given) not in ({"lse"}, {"max", "sum"}):
        yield f"its statistics are {' and '.join(given) or 'missing'}, expected Partial(…, lse=lse), or max and sum"
    if found.max_logits is not None or request.max_logits:
        yield from _fault("max_logits", found.max_logits, "B N", (batch, heads), wide)


def _faults_of_gradients(found: Gradients, inputs: Inputs, request: Request) -> Iterator[str]:
    expected = {"query": "B T N H", "key": "B S K H", "value": "B S K D"}
    expected |= {"bias": "the bias's own"} if Operand.BIAS in request.gradients else {}
    for name, letters in expected.items():
        operand = getattr(inputs, name)
        if isinstance(operand, jax.Array):  # quantised and paged keys have no gradient
            yield from _fault(f"the gradient of {name}", getattr(found, name), letters, operand.shape)


def _fault(
    name: str, found: Any, letters: str, shape: tuple[int, ...], dtypes: tuple[str, ...] | None = None
) -> Iterator[str]:
    """Says what is wrong with an array; without `dtypes` any floating one is right."""
    if _is_array(found) and found.shape == shape and _has_dtype(found, dtypes):
        return
    kinds = " or ".join(dict.fromkeys(dtypes)) if dtypes else "floating"
    yield f"{name} is {_described(found)}, expected {kinds} {list(shape)} ({letters})"


def _has_dtype(array: Any, dtypes: tuple[str, ...] | None) -> bool:
    return str(array.dtype) in dtypes if dtypes else jnp.issubdtype(array.dtype, jnp.floating)


def _is_array(found: object) -> bool:
    return isinstance(found, jax.Array | np.ndarray)


def _described(found: Any) -> str:
    if _is_array(found):
        return f"an array {found.dtype} {list(found.shape)}"
    return "missing" if found is None else f"a {type(found).__name__}"


def attend(
    parts: tuple[BoundKernel, ...], inputs: tuple[Inputs, ...], *, sinks: jax.Array | None, statistics: bool
) -> Partial:
    """Attends to all parts.

    Args:
      parts: what runs over each part of the keys.
      inputs: the arrays of each part; the query is the same.
      sinks: [N], where the kernels do not take them; else they are in the inputs.
      statistics: whether the result needs them.

    Returns:
      A Partial; with sinks it has no statistics.
    """
    if any(part.is_narrow for part in parts):
        inputs, sinks = narrowed((inputs, sinks))
    if inputs[0].sinks is not None and parts[0].needs_backward:
        sinks, inputs = inputs[0].sinks, tuple(dataclasses.replace(arrays, sinks=None) for arrays in inputs)
    inputs, sinks = _varying_alike((inputs, sinks))
    if len(parts) == 1 and sinks is None and not statistics and not parts[0].duties and not parts[0].needs_backward:
        alone = parts[0].forward(inputs[0], statistics=False)
        has_name = parts[0].kernel.capabilities.names_residuals and parts[0].request.gradients
        return alone if has_name else _named(alone)
    if any(part.request.gradients and part.has_backward for part in parts):
        whole = _differentiated(parts, statistics, inputs, sinks)
    else:
        whole = _named(whole_of(_run(parts, inputs), sinks)[0])
    return _with_rest(whole) if statistics else dataclasses.replace(whole, lse_rest=None)


def _with_rest(partial: Partial) -> Partial:
    """Gives a Partial that has lse the rest, too, whatever kernel it is from: all have one structure."""
    if partial.lse is None or partial.lse_rest is not None:
        return partial
    _, rest = _varying_alike((partial.lse, jnp.zeros_like(partial.lse)))
    return dataclasses.replace(partial, lse_rest=rest)


def _varying_alike(tree: Any) -> Any:
    if jax.sharding.get_abstract_mesh().empty:  # inside a shard_map there is a mesh
        return tree
    from kernelry.execution import manual_axes

    return manual_axes.varying_alike(tree)


def _zero_in_empty_rows(partial: Partial) -> Partial:
    """Gives rows that see nothing the output 0, whatever the kernel returned there."""
    empty = jnp.isneginf(partial.lse) if partial.lse is not None else jnp.equal(partial.sum, 0)  # type: ignore[arg-type]
    return dataclasses.replace(partial, out=jnp.where(heads_last(empty), 0, partial.out))


def _run(parts: tuple[BoundKernel, ...], inputs: tuple[Inputs, ...]) -> list[Partial]:
    return [part.forward(arrays, statistics=True) for part, arrays in zip(parts, inputs, strict=True)]


_Lse = tuple[jax.Array | None, jax.Array | None]
"""lse, and what rounding took from it, as far as it is known."""


def whole_of(partials: list[Partial], sinks: jax.Array | None) -> tuple[Partial, _Lse]:
    """Merges partials and applies sinks; returns the result and the lse that includes the sinks."""
    merged = partials[0] if len(partials) == 1 else merge(partials)
    if sinks is None:
        return merged, (merged.lse, merged.lse_rest)
    merged = to_lse(merged)
    assert merged.lse is not None
    out = with_sinks(merged.out, merged.lse, sinks, merged.lse_rest).astype(merged.out.dtype)
    lse = lse_with_sinks(merged.lse, merged.lse_rest, sinks)
    return dataclasses.replace(merged, out=out, lse=None, lse_rest=None), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiated(
    parts: tuple[BoundKernel, ...], statistics: bool, inputs: tuple[Inputs, ...], sinks: jax.Array | None
) -> Partial:
    whole, _ = whole_of([to_lse(partial) for partial in _run(parts, inputs)], sinks)
    return whole if statistics else _rounded(whole)


def _rounded(whole: Partial) -> Partial:
    """The output as the caller gets it, so that a wider one is not kept for the backward pass."""
    return dataclasses.replace(whole, out=whole.out.astype(whole.dtype))


def _named(partial: Partial) -> Partial:
    return _with_named_lse(dataclasses.replace(partial, out=named(partial.out)))


def _with_named_lse(partial: Partial) -> Partial:
    return dataclasses.replace(partial, lse=named(partial.lse), lse_rest=named(partial.lse_rest))


_Residuals = tuple[tuple[Inputs, ...], jax.Array | None, jax.Array, _Lse, list[jax.Array]]


def _forward(
    parts: tuple[BoundKernel, ...], statistics: bool, inputs: tuple[Inputs, ...], sinks: jax.Array | None
) -> tuple[Partial, _Residuals]:
    # All that the backward pass reads of the statistics is computed from what has the name.
    partials = [_with_named_lse(to_lse(partial)) for partial in _run(parts, inputs)]
    # Empty rows are remembered per part and before sinks: a global lse that is finite thanks to a
    # sink or another part would make a vendor's backward explode on a row that is empty here.
    empty = [jnp.isneginf(partial.lse) for partial in partials]  # type: ignore[arg-type]
    whole, lse = whole_of(partials, sinks)
    whole = whole if statistics else _rounded(whole)
    whole = dataclasses.replace(whole, out=named(whole.out))
    return whole, (inputs, sinks, whole.out, lse, empty)


def _backward(
    parts: tuple[BoundKernel, ...], statistics: bool, residuals: _Residuals, d_whole: Partial
) -> tuple[tuple[Inputs, ...], jax.Array | None]:
    with unchecked():
        found = _cotangents(parts, statistics, residuals, d_whole)
    return checked(found)  # type: ignore[no-any-return]


def _cotangents(
    parts: tuple[BoundKernel, ...], statistics: bool, residuals: _Residuals, d_whole: Partial
) -> tuple[tuple[Inputs, ...], jax.Array | None]:
    inputs, sinks, out, (lse, rest), empty = residuals
    assert lse is not None
    nowhere = heads_last(functools.reduce(operator.and_, empty))
    d_out = jnp.where(nowhere, 0, d_whole.out.astype(out.dtype))  # so that a NaN in an empty row's cotangent stops here
    d_lse = d_whole.lse if statistics else None
    # The kernels' probabilities are too large by exp(rest), and what they return is linear in d_out and d_lse.
    part_d_out, d_lse = (d_out, d_lse) if rest is None else _shared_out(d_out, d_lse, rest)
    shares = []
    for part, arrays, none in zip(parts, inputs, empty, strict=True):
        d_statistic = None if d_lse is None else jnp.where(none, 0.0, d_lse)
        shares.append(part.backward(arrays, out, jnp.where(none, jnp.inf, lse), part_d_out, d_statistic))
    d_inputs = tuple(_cotangent(arrays, share) for arrays, share in zip(inputs, shares, strict=True))
    if sinks is None:
        return d_inputs, None
    return d_inputs, sink_gradient(sinks, out, lse, rest, d_out)


def sink_gradient(
    sinks: jax.Array, out: jax.Array, lse: jax.Array, rest: jax.Array | None, d_out: jax.Array
) -> jax.Array:
    """Returns d_sink = −Σ exp(sink − lse) · Σ out · d_out, [N], of the whole attention."""
    delta = jnp.einsum("BTND,BTND->BNT", out.astype(jnp.float32), d_out.astype(jnp.float32))
    nothing = jnp.isneginf(lse)  # no key and no sink
    exponent = sinks.astype(jnp.float32)[None, :, None] - jnp.where(nothing, 0.0, lse)
    exponent = exponent if rest is None else exponent - rest
    probability = jnp.where(nothing, 0.0, jnp.exp(exponent))
    return -(probability * delta).sum(axis=(0, 2)).astype(sinks.dtype)


def _shared_out(d_out: jax.Array, d_lse: jax.Array | None, rest: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The cotangents times exp(−rest): 1 up to rounding, but for logits so large that their number vanishes."""
    factor = jnp.exp(-rest)
    smaller = (d_out.astype(jnp.float32) * heads_last(factor)).astype(d_out.dtype)
    return smaller, None if d_lse is None else d_lse * factor


def _cotangent(inputs: Inputs, share: Gradients) -> Inputs:
    return Inputs(
        query=share.query.astype(inputs.query.dtype),
        key=_cotangent_of(inputs.key, share.key),
        value=_cotangent_of(inputs.value, share.value),
        mask=None,  # type: ignore[arg-type]
        bias=None if inputs.bias is None or share.bias is None else share.bias.astype(inputs.bias.dtype),
    )


def _cotangent_of(stored: Any, share: jax.Array) -> jax.Array | None:
    """Quantised and paged keys and values have no gradient."""
    return share.astype(stored.dtype) if isinstance(stored, jax.Array) else None


_differentiated.defvjp(_forward, _backward)
