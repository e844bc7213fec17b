"""Runs a call through `kernelry.attention` and proves that the kernel under test did the work."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, final

import jax

from kernelry.api import attention
from kernelry.errors import PluginError
from kernelry.execution.normalization import finalize, to_lse
from kernelry.kernel.partial import Partial
from kernelry.kernel.spec import KernelSpec
from kernelry.policy.scope import record
from kernelry.resolution.explanation import Resolution
from kernelry.testing.conformance.calls import QKV, Call
from kernelry.testing.conformance.cases import Skip
from kernelry.testing.conformance.held import TABLE, as_given
from kernelry.testing.conformance.place import Place


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a call returned; None where it was not asked for.

    Args:
      out: [B, T, N, D]; of a Partial, finalised.
      lse: [B, N, T], of a Partial.
      max_logits: [B, N].
      gradients: by the operand's name.
    """

    out: Any
    lse: Any
    max_logits: Any
    gradients: Mapping[str, Any]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """A kernel at a place."""

    spec: KernelSpec
    place: Place

    def attend(self, call: Call, arrays: Mapping[str, Any], mask: Any, rng: Any = None) -> Any:
        """Calls the kernel by name."""
        query, key, value = as_given(arrays)
        others: dict[str, Any] = {name: array for name, array in arrays.items() if name not in (*QKV, TABLE)}
        others |= {"mask": mask, "kernel": self.spec.name, "dropout_rng": rng, **call.arguments}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the soft cap caps bias too")  # the oracle does so, too
            return attention(query, key, value, **others)

    def program(self, call: Call) -> Callable[..., Answer]:
        """Returns a function of (arrays, mask, cotangents, rng) that attends and differentiates."""

        def run(arrays: Any, mask: Any, cotangents: Any, rng: Any = None) -> Answer:
            def forward(moving: Any) -> Any:
                result = self.attend(call, arrays | moving, mask, rng)
                result, max_logits = result if call.max_logits else (result, None)
                return _returned(result, call), max_logits

            moving = {operand.value: arrays[operand.value] for operand in sorted(call.wanted, key=lambda o: o.value)}
            if not moving:
                returned, max_logits = forward({})
                return Answer(returned["out"], returned.get("lse"), max_logits, {})
            returned, pull, max_logits = jax.vjp(forward, moving, has_aux=True)
            return Answer(returned["out"], returned.get("lse"), max_logits, pull(cotangents)[0])

        return run

    def compiled(self, function: Callable[..., Any], *arguments: Any, adapters: bool = False, **options: Any) -> Any:
        """Compiles a function for its arguments, after looking at what it resolved to and what is in its text.

        Raises:
          Skip: the kernel cannot run here.
          AssertionError: another kernel was resolved, or the program lacks this one's signature.
        """
        if self.place.why_not is not None:
            raise Skip(self.place.why_not)
        with self.place.entered(self.spec, adapters=adapters):
            with record() as resolutions:
                lowered = jax.jit(function, **options).lower(*arguments)
            self._check_ran(resolutions, lowered, adapters)
            return _compile(lowered, self.place.target.platform)

    def _check_ran(self, resolutions: list[Resolution], lowered: Any, adapters: bool) -> None:
        assert resolutions, f"nothing was resolved: {self.spec.name} did not run"
        for resolution in resolutions:
            plan = resolution.plan
            assert plan is not None, "nothing was resolved"
            assert plan.kernel is self.spec, f"{plan.kernel.name} was resolved, not {self.spec.name}"
            steps = ", ".join(step.adapter.name for step in plan.steps)
            assert adapters or not steps, f"adapters are forbidden, and {steps} ran"
        try:
            resolutions[-1].verify(lowered)
        except PluginError as error:
            raise AssertionError(str(error)) from error

    def answer(self, call: Call, *, seed: int = 0, adapters: bool = False) -> Answer:
        """Compiles the call, forward and backward in one program, and runs it."""
        given = call.arrays(seed), call.mask, call.cotangents(seed)
        return Answer(*self.compiled(flat(self.program(call)), *given, adapters=adapters)(*given))


_FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""The same program in a tenth of the time: most calls of the kit run once, on 16 tokens."""


def _compile(lowered: Any, platform: str) -> Any:
    if platform != "cpu":
        return lowered.compile()  # there the machine code is what is put to the test
    try:
        return lowered.compile(compiler_options=_FAST_TO_COMPILE)
    except jax.errors.JaxRuntimeError:  # another XLA, with other options
        return lowered.compile()


def flat(program: Callable[..., Answer]) -> Callable[..., tuple[Any, ...]]:
    """Makes a program return a tuple, which JAX can carry, in place of an Answer."""

    def run(*arguments: Any) -> tuple[Any, ...]:
        found = program(*arguments)
        return found.out, found.lse, found.max_logits, dict(found.gradients)

    return run


def _returned(result: Any, call: Call) -> dict[str, Any]:
    if not call.partial:
        return {"out": result}
    assert isinstance(result, Partial), f"a Partial was asked for, got {type(result).__name__}"
    assert result.has_statistics, "it declares statistics and returned a Partial without any"
    with_lse = to_lse(result)
    return {"out": finalize(with_lse), "lse": with_lse.lse}
