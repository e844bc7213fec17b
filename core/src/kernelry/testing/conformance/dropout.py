"""Dropout, statistically: its bits are not defined, its rate, its scale and its dependence on the key are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.execution.normalization import to_lse
from kernelry.kernel.capabilities import Feature
from kernelry.request.request import Operand
from kernelry.storage import SEPARATE
from kernelry.testing.conformance.bench import Bench
from kernelry.testing.conformance.calls import AttentionCall
from kernelry.testing.conformance.compare import close, oracle, tolerance_for
from kernelry.testing.conformance.longer import longer
from kernelry.testing.conformance.positive import but, forms
from kernelry.testing.conformance.report import Case
from kernelry.testing.conformance.subject import Subject

_Compiled = Callable[[], Callable[..., Any]]

_RATE = 0.3
_DEVIATIONS = 6.0
"""The standard errors by which a mean may be off: one false alarm in 5e8."""

_SPREAD = 0.05
_STEP, _SLOPE = 1e-2, 1e-2
"""How far an operand is moved, and the largest relative error of the slope: float32 rounds, and curves bend."""

_FEWEST = 128
"""Draws below which a correlation says nothing."""


def dropout_cases(subject: Subject, base: AttentionCall) -> Iterator[Case]:
    """One case per promise."""
    if Feature.DROPOUT not in subject.can.features:
        return
    call = subject.first(forms(base, dropout_rate=_RATE))
    if call is None:
        return
    yield from _cases(subject, call, "dropout")
    lengths = () if subject.quick else longer(subject, base)
    call = subject.first(form for length in lengths for form in forms(length, dropout_rate=_RATE))
    if call is not None:
        yield from _cases(subject, call, "dropout beyond its tiles")


def _cases(subject: Subject, call: AttentionCall, name: str) -> Iterator[Case]:
    bench = subject.bench
    forward = but(call, gradients=frozenset())
    compiled = functools.cache(functools.partial(_compiled, bench, forward))
    yield Case(f"{name} keeps the mean, at its rate", "dropout", functools.partial(_rate, compiled, forward))
    yield Case(f"{name} repeats no bits", "dropout", functools.partial(_fresh, compiled, forward))
    yield Case(f"{name} follows its key", "dropout", functools.partial(_keys, compiled, forward))
    partial = but(forward, partial=True)
    if subject.serves(partial):
        yield Case(f"lse under {name}", "dropout", functools.partial(_lse, bench, partial))
    if Operand.VALUE in call.wanted:
        yield Case(f"{name} drops alike forward and backward", "dropout", functools.partial(_gradient, bench, call))


def _compiled(bench: Bench, call: AttentionCall) -> Callable[..., Any]:
    arrays = call.arrays()
    run: Callable[..., Any] = bench.compiled(
        lambda arrays, mask, rng: bench.attend(call, arrays, mask, rng), arrays, call.mask, jax.random.key(0)
    )
    return run


def _kept(run: Callable[..., Any], call: AttentionCall) -> np.ndarray:
    """Draws [B, T, N] sixteen times: with uniform probabilities and values of 1, kept / ((1 − rate) · S)."""
    arrays = call.arrays()
    values = "value" if call.kv_layout == SEPARATE else "key"  # where the values are
    ones = jax.tree.map(lambda leaf: jnp.ones_like(leaf) if leaf.dtype == call.dtype else leaf, arrays[values])
    arrays = arrays | {"query": jnp.zeros_like(arrays["query"]), values: ones}
    return np.stack(
        [np.asarray(run(arrays, call.mask, jax.random.key(seed)), np.float64)[..., 0] for seed in range(16)]
    )


def _rate(compiled: _Compiled, call: AttentionCall) -> None:
    kept = _kept(compiled(), call)
    count = kept.size * call.kv_len
    allowed = _DEVIATIONS * (_RATE / (1 - _RATE) / count) ** 0.5 + 1e-2 * (call.dtype != "float32")
    assert abs(kept.mean() - 1) <= allowed, f"the mean of the output is {kept.mean():.4f}, not 1 ± {allowed:.4f}"
    expected = (_RATE / (1 - _RATE) / call.kv_len) ** 0.5
    spread, off = float(kept.std()), max(_SPREAD, _DEVIATIONS * (2 * kept.size) ** -0.5)
    assert abs(spread / expected - 1) < off, (
        f"outputs spread by {spread:.4f} where a rate of {_RATE} on {call.kv_len} keys gives {expected:.4f}"
    )


def _fresh(compiled: _Compiled, call: AttentionCall) -> None:
    """Rows, at any distance and of any head and batch row, that drop the same keys would keep equally many."""
    kept = np.moveaxis(_kept(compiled(), call), 2, 3)
    above = (kept - kept.mean()) / kept.std()
    streams = np.moveaxis(above.reshape(len(above), -1, call.q_len), 1, 0)
    for first, mine in enumerate(streams):
        for second, theirs in enumerate(streams):
            _uncorrelated(mine, theirs, (first, second), call)


def _uncorrelated(mine: np.ndarray, theirs: np.ndarray, which: tuple[int, int], call: AttentionCall) -> None:
    """Compares the kept counts of every row with those of the rows at every distance."""
    draws, length = mine.shape
    for distance in range(which[0] == which[1], length):
        count = draws * (length - distance)
        if count < _FEWEST:
            return
        found = float((mine[:, : length - distance] * theirs[:, distance:]).mean())
        names = " and ".join(f"batch row {stream // call.q_heads}, head {stream % call.q_heads}" for stream in which)
        assert abs(found) <= _DEVIATIONS * count**-0.5, (
            f"rows {distance} apart drop the same keys ({names}): what they keep is correlated by {found:.2f}"
        )


def _lse(bench: Bench, call: AttentionCall) -> None:
    """Dropout acts on probabilities, after the softmax, and leaves statistics unchanged."""
    partial = to_lse(_compiled(bench, call)(call.arrays(), call.mask, jax.random.key(5)))
    close("lse", partial.lse, oracle(call).lse, tolerance_for(bench.spec.capabilities, call).forward)


def _keys(compiled: _Compiled, call: AttentionCall) -> None:
    run = compiled()
    arrays = call.arrays()
    first, again, other = (np.asarray(run(arrays, call.mask, jax.random.key(seed))) for seed in (1, 1, 2))
    assert np.array_equal(first, again), "the same key gave different results"
    assert not np.array_equal(first, other), "another key gave the same result"


def _gradient(bench: Bench, call: AttentionCall) -> None:
    """The output is linear in the values, so ⟨out, d_out⟩ = ⟨value, d_value⟩ if both drop the same.

    Along the gradients of query and key it rises by their squared length, by finite differences with the same key.
    """
    arrays, cotangents, rng = call.arrays(), call.cotangents(), jax.random.key(3)
    run = bench.compiled(bench.program(call), arrays, call.mask, cotangents, rng)
    found = run(arrays, call.mask, cotangents, rng)
    gradients = found.gradients
    outward = np.asarray(found.out, np.float64) * np.asarray(cotangents["out"], np.float64)
    inward = np.asarray(arrays["value"], np.float64) * np.asarray(gradients["value"], np.float64)
    allowed = (1e-4 if call.dtype == "float32" else 2e-2) * max(1.0, float(np.abs(outward).sum()))
    distance = abs(outward.sum() - inward.sum())
    assert distance <= allowed, f"⟨out, d_out⟩ and ⟨value, d_value⟩ differ by {distance:.3g} > {allowed:.3g}"
    for name in sorted({"query", "key"} & gradients.keys() if call.dtype == "float32" else ()):
        d_array, step = np.asarray(gradients[name], np.float64), _STEP / np.abs(gradients[name]).max()
        moved = [arrays | {name: arrays[name] + sign * step * gradients[name]} for sign in (1, -1)]
        up, down = (np.asarray(run(each, call.mask, cotangents, rng).out, np.float64) for each in moved)
        rise = float(((up - down) * np.asarray(cotangents["out"], np.float64)).sum()) / (2 * float(step))
        slope = float((d_array**2).sum())
        assert abs(rise - slope) <= _SLOPE * slope, (
            f"along the gradient of {name} ⟨out, d_out⟩ rises by {rise:.4g}, not by {slope:.4g}"
        )
