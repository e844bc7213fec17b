"""Dropout, statistically: its bits are nobody's business, its rate, its scale and its key are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.capabilities import Feature
from kernelry.normalization import to_lse
from kernelry.request import Operand
from kernelry.testing.conformance.bench import Bench
from kernelry.testing.conformance.calls import Call
from kernelry.testing.conformance.cases import Case, Verdict
from kernelry.testing.conformance.compare import close, oracle, tolerance_for
from kernelry.testing.conformance.positive import but
from kernelry.testing.conformance.report import Outcome
from kernelry.testing.conformance.subject import Subject

_Compiled = Callable[[], Callable[..., Any]]

_RATE = 0.3
_DEVIATIONS = 6.0
"""Standard errors that a mean may be off: one false alarm in 5e8."""

_STEP, _SLOPE = 1e-2, 1e-2
"""How far an operand is moved, and the relative error of the slope found so: float32 rounds, and curves bend."""


def dropout_cases(subject: Subject, base: Call) -> Iterator[Case]:
    """One case per promise."""
    if Feature.DROPOUT not in subject.can.features:
        return
    call = subject.first((but(base, dropout_rate=_RATE), but(base, dropout_rate=_RATE, gradients=frozenset())))
    if call is None:
        return
    bench = subject.bench
    forward = but(call, gradients=frozenset())
    compiled = functools.cache(functools.partial(_compiled, bench, forward))
    yield Case("dropout keeps the mean, at its rate", "dropout", _rate(compiled, forward))
    yield Case("dropout follows its key", "dropout", _keys(compiled, forward))
    partial = but(forward, partial=True)
    if subject.serves(partial):
        yield Case("lse under dropout", "dropout", _lse(bench, partial))
    if Operand.VALUE in call.wanted:
        yield Case("dropout drops alike forward and backward", "dropout", _gradient(bench, call))


def _compiled(bench: Bench, call: Call) -> Callable[..., Any]:
    arrays = call.arrays()
    run: Callable[..., Any] = bench.compiled(
        lambda arrays, mask, rng: bench.attend(call, arrays, mask, rng), arrays, call.mask, jax.random.key(0)
    )
    return run


def _rate(compiled: _Compiled, call: Call) -> Callable[[], Verdict]:
    """Uniform probabilities and values of 1 turn the output into kept / ((1 − rate) · S)."""

    def check() -> Verdict:
        run = compiled()
        arrays = call.arrays()
        arrays = arrays | {"query": jnp.zeros_like(arrays["query"]), "value": jnp.ones_like(arrays["value"])}
        draws = [np.asarray(run(arrays, call.mask, jax.random.key(seed)), np.float64)[..., 0] for seed in range(16)]
        kept = np.stack(draws)
        count = kept.size * call.kv_len
        allowed = _DEVIATIONS * (_RATE / (1 - _RATE) / count) ** 0.5 + 1e-2 * (call.dtype != "float32")
        assert abs(kept.mean() - 1) <= allowed, f"the mean of the output is {kept.mean():.4f}, not 1 ± {allowed:.4f}"
        expected = (_RATE / (1 - _RATE) / call.kv_len) ** 0.5
        spread = float(kept.std())
        assert 0.8 * expected < spread < 1.25 * expected, (
            f"outputs spread by {spread:.4f} where a rate of {_RATE} on {call.kv_len} keys gives {expected:.4f}"
        )
        for axis, name in ((1, "batch rows"), (2, "query rows"), (3, "heads")):
            if kept.shape[axis] > 1:
                assert np.ptp(kept, axis=axis).max() > 0, f"all {name} drop the same keys"
        return Outcome.PASSED, ""

    return check


def _lse(bench: Bench, call: Call) -> Callable[[], Verdict]:
    """Dropout acts on probabilities, after the softmax: statistics know nothing of it."""

    def check() -> Verdict:
        partial = to_lse(_compiled(bench, call)(call.arrays(), call.mask, jax.random.key(5)))
        close("lse", partial.lse, oracle(call).lse, tolerance_for(bench.spec.capabilities, call).forward)
        return Outcome.PASSED, ""

    return check


def _keys(compiled: _Compiled, call: Call) -> Callable[[], Verdict]:
    def check() -> Verdict:
        run = compiled()
        arrays = call.arrays()
        first, again, other = (np.asarray(run(arrays, call.mask, jax.random.key(seed))) for seed in (1, 1, 2))
        assert np.array_equal(first, again), "the same key gave different results"
        assert not np.array_equal(first, other), "another key gave the same result"
        return Outcome.PASSED, ""

    return check


def _gradient(bench: Bench, call: Call) -> Callable[[], Verdict]:
    """The output is linear in the values, so ⟨out, d_out⟩ = ⟨value, d_value⟩ if both drop the same.

    Along the gradients of query and key it rises by their squared length, by finite differences with the same key.
    """

    def check() -> Verdict:
        arrays, cotangents, rng = call.arrays(), call.cotangents(), jax.random.key(3)
        program = bench.program(call)

        def both(arrays: Any, mask: Any, cotangents: Any, rng: Any) -> Any:
            found = program(arrays, mask, cotangents, rng)
            return found.out, dict(found.gradients)

        run = bench.compiled(both, arrays, call.mask, cotangents, rng)
        out, gradients = run(arrays, call.mask, cotangents, rng)
        d_value = gradients["value"]
        outward = np.asarray(out, np.float64) * np.asarray(cotangents["out"], np.float64)
        inward = np.asarray(arrays["value"], np.float64) * np.asarray(d_value, np.float64)
        allowed = (1e-4 if call.dtype == "float32" else 2e-2) * max(1.0, float(np.abs(outward).sum()))
        distance = abs(outward.sum() - inward.sum())
        assert distance <= allowed, f"⟨out, d_out⟩ and ⟨value, d_value⟩ differ by {distance:.3g} > {allowed:.3g}"
        for name in sorted({"query", "key"} & gradients.keys() if call.dtype == "float32" else ()):
            d_array, step = np.asarray(gradients[name], np.float64), _STEP / np.abs(gradients[name]).max()
            moved = [arrays | {name: arrays[name] + sign * step * gradients[name]} for sign in (1, -1)]
            up, down = (np.asarray(run(each, call.mask, cotangents, rng)[0], np.float64) for each in moved)
            rise = float(((up - down) * np.asarray(cotangents["out"], np.float64)).sum()) / (2 * float(step))
            slope = float((d_array**2).sum())
            assert abs(rise - slope) <= _SLOPE * slope, (
                f"along the gradient of {name} ⟨out, d_out⟩ rises by {rise:.4g}, not by {slope:.4g}"
            )
        return Outcome.PASSED, ""

    return check
