"""JAX's transformations must not change a kernel's results."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernelry.policy.scope import use
from kernelry.request.sharding import Sharding
from kernelry.testing.conformance.bench import Answer, Bench, compile_quickly
from kernelry.testing.conformance.calls import AttentionCall
from kernelry.testing.conformance.compare import oracle, tolerance_for, verify
from kernelry.testing.conformance.positive import but
from kernelry.testing.conformance.report import Case, Skip
from kernelry.testing.conformance.subject import Subject

_Check = Callable[[Bench, AttentionCall], None]


def transform_cases(subject: Subject, call: AttentionCall) -> Iterator[Case]:
    """A case for each transformation, all of the same call."""
    checks: dict[str, _Check] = {
        "determinism": _determinism,
        "eager": _eager,
        "vmap": _vmap,
        "scan": _scan,
        "remat": _remat,
        "donation": _donation,
        "sharded inputs": _sharded,
    }
    if "batch" in subject.can.symbolic_sizes:
        checks["symbolic batch"] = _exported
    for name, check in checks.items():
        if not (subject.quick and subject.is_slow) or name == "determinism":
            yield Case(name, "transforms", functools.partial(_verdict, check, subject.bench, call))


def _verdict(check: _Check, bench: Bench, call: AttentionCall) -> None:
    if bench.host.why_not is not None:
        raise Skip(bench.host.why_not)
    check(bench, call)


def _given(call: AttentionCall, seed: int = 0) -> tuple[Any, Any, Any]:
    return call.arrays(seed), call.mask, call.cotangents(seed)


def _hold(bench: Bench, call: AttentionCall, found: Answer, seed: int = 0) -> None:
    verify(found, oracle(call, seed=seed), call, tolerance_for(bench.spec.capabilities, call))


def _determinism(bench: Bench, call: AttentionCall) -> None:
    """Running a program twice, and tracing the same call again, give the same bits."""
    given = _given(call)
    program = bench.compiled(bench.program(call), *given)
    first, again = program(*given), program(*given)
    retraced = bench.compiled(bench.program(call), *given)(*given)
    for name, other in (("a second run", again), ("the same call traced again", retraced)):
        for mine, theirs in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            assert np.array_equal(np.asarray(mine), np.asarray(theirs), equal_nan=True), f"{name} gave different bits"


def _eager(bench: Bench, call: AttentionCall) -> None:
    forward = but(call, gradients=frozenset())
    with bench.host.entered(bench.spec):
        out = bench.attend(forward, forward.arrays(), forward.mask)
    _hold(bench, forward, Answer(out, None, None, {}))


def _stacked(call: AttentionCall) -> tuple[Any, Any, Any]:
    pair = [(call.arrays(seed), call.cotangents(seed)) for seed in (0, 1)]
    arrays, cotangents = jax.tree.map(lambda *each: jnp.stack(each), *pair)
    return arrays, call.mask, cotangents


def _hold_both(bench: Bench, call: AttentionCall, found: Any) -> None:
    for seed in (0, 1):
        _hold(bench, call, jax.tree.map(lambda leaf, seed=seed: leaf[seed], found), seed)


def _vmap(bench: Bench, call: AttentionCall) -> None:
    mapped = jax.vmap(bench.program(call), in_axes=(0, None, 0))
    given = _stacked(call)
    _hold_both(bench, call, bench.compiled(mapped, *given)(*given))


def _scan(bench: Bench, call: AttentionCall) -> None:
    program = bench.program(call)

    def scanned(arrays: Any, mask: Any, cotangents: Any) -> Any:
        step = lambda carry, each: (carry, program(each[0], mask, each[1]))  # noqa: E731
        return jax.lax.scan(step, None, (arrays, cotangents))[1]

    given = _stacked(call)
    _hold_both(bench, call, bench.compiled(scanned, *given)(*given))


def _remat(bench: Bench, call: AttentionCall) -> None:
    wanted = sorted(operand.value for operand in call.wanted)

    def program(arrays: Any, mask: Any, cotangents: Any) -> Any:
        forward = jax.checkpoint(lambda moving: bench.attend(call, arrays | moving, mask))
        out, pull = jax.vjp(forward, {name: arrays[name] for name in wanted})
        return Answer(out, None, None, pull(cotangents["out"])[0] if wanted else {})

    given = _given(call)
    try:
        compiled = bench.compiled(program, *given)
    except NotImplementedError as error:
        if not bench.host.interpreted or "Effects not supported" not in str(error):
            raise
        # `pltpu.InterpretParams` calls back in order, which `interpret=True` and compiled kernels do not.
        raise Skip("JAX's interpreter of the kernel has effects that jax.checkpoint does not allow") from error
    _hold(bench, call, compiled(*given))


def _donation(bench: Bench, call: AttentionCall) -> None:
    """Donated arrays may be overwritten by results, but not before they are last read."""
    given = _given(call)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        found = bench.compiled(bench.program(call), *given, donate_argnums=(0,))(*given)
    _hold(bench, call, found)


def _exported(bench: Bench, call: AttentionCall) -> None:
    """A program exported for any batch size gives the same results as one for this batch size."""
    given = _given(call)
    [batch] = jax.export.symbolic_shape("b")

    def shape_of(leaf: Any) -> Any:
        rows = leaf.ndim > 1 and leaf.shape[0] == call.batch
        return jax.ShapeDtypeStruct((batch, *leaf.shape[1:]) if rows else leaf.shape, leaf.dtype)  # type: ignore[no-untyped-call]

    with bench.host.entered(bench.spec):
        program = jax.export.export(jax.jit(bench.program(call)))(*jax.tree.map(shape_of, given))
    lowered = jax.jit(program.call).lower(*given)
    _hold(bench, call, compile_quickly(lowered, bench.host.target.platform)(*given))


def _sharded(bench: Bench, call: AttentionCall) -> None:
    if call.page_size is not None:
        raise Skip("the pages of a row may be anywhere in the pool, so rows are not shared out")
    devices = jax.devices()
    if len(devices) < call.batch:
        raise Skip(f"needs {call.batch} devices, here {'is' if len(devices) == 1 else 'are'} {len(devices)}")
    mesh = Mesh(np.asarray(devices[: call.batch]), ("batch",))
    rows = NamedSharding(mesh, PartitionSpec("batch"))  # type: ignore[no-untyped-call]
    arrays, mask, cotangents = _given(call)
    arrays, cotangents = jax.device_put((arrays, cotangents), rows)
    given = (arrays, mask, cotangents)
    with use(sharding=Sharding(batch=("batch",), mesh=mesh)):
        _hold(bench, call, bench.compiled(bench.program(call), *given)(*given))
