"""Runs a call through `kernelry.attention` and proves that the kernel under test did the work."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, final

import jax

from kernelry._pytree import pytree
from kernelry.api import attention
from kernelry.errors import PluginError
from kernelry.execution.normalization import finalize, to_lse
from kernelry.kernel.partial import Partial
from kernelry.kernel.spec import KernelSpec
from kernelry.policy.scope import record
from kernelry.resolution.explanation import Resolution
from kernelry.testing.conformance.calls import QKV, AttentionCall
from kernelry.testing.conformance.host import KernelHost
from kernelry.testing.conformance.report import Skip
from kernelry.testing.conformance.stored import TABLE, as_given


@final
@pytree("out", "lse", "max_logits", "gradients")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
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
    """A kernel, and where it runs.

    Args:
      spec: the kernel.
      host: where it runs.
      programs: what `answer` compiled; many calls differ in their numbers only.
    """

    spec: KernelSpec
    host: KernelHost
    programs: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def attend(self, call: AttentionCall, arrays: Mapping[str, Any], mask: Any, rng: Any = None) -> Any:
        """Calls the kernel by name."""
        query, key, value = as_given(arrays)
        others: dict[str, Any] = {name: array for name, array in arrays.items() if name not in (*QKV, TABLE)}
        others |= {"mask": mask, "kernel": self.spec.name, "dropout_rng": rng, **call.arguments}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the soft cap caps bias too")  # the oracle does so, too
            return attention(query, key, value, **others)

    def program(self, call: AttentionCall) -> Callable[..., Answer]:
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
        if self.host.why_not is not None:
            raise Skip(self.host.why_not)
        with self.host.entered(self.spec, adapters=adapters):
            with record() as resolutions:
                lowered = jax.jit(function, **options).lower(*arguments)
            self._check_ran(resolutions, lowered, adapters)
            return compile_quickly(lowered, self.host.target.platform)

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

    def answer(self, call: AttentionCall, *, seed: int = 0, adapters: bool = False) -> Answer:
        """Runs the call, forward and backward in one program."""
        given = call.arrays(seed), call.mask, call.cotangents(seed)
        leaves, structure = jax.tree.flatten(given)
        key = call.request(self.host), adapters, structure, tuple(map(jax.typeof, leaves))
        if key not in self.programs:
            self.programs[key] = self.compiled(self.program(call), *given, adapters=adapters)
        found: Answer = self.programs[key](*given)
        return found


_QUICKLY: tuple[dict[str, Any], ...] = (
    {
        "xla_backend_optimization_level": 0,
        "xla_cpu_parallel_codegen_split_count": 1,
        "xla_cpu_use_fusion_emitters": False,  # an option until jaxlib 0.10
    },
    {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1},
)
"""The same program in a tenth of the time: most calls of the kit run once, on 16 tokens."""


@functools.cache
def _quick_options() -> dict[str, Any]:
    """The first options that this XLA knows."""
    program = jax.jit(lambda: 0).lower()
    for options in _QUICKLY:
        try:
            program.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError:
            continue
        return options
    return {}


def compile_quickly(lowered: Any, platform: str) -> Any:
    """Compiles for one run; as users do where the machine code is what is put to the test."""
    return lowered.compile(compiler_options=_quick_options() if platform == "cpu" else None)


def _returned(result: Any, call: AttentionCall) -> dict[str, Any]:
    if not call.partial:
        return {"out": result}
    assert isinstance(result, Partial), f"a Partial was asked for, got {type(result).__name__}"
    assert result.has_statistics, "it declares statistics and returned a Partial without any"
    with_lse = to_lse(result)
    return {"out": finalize(with_lse), "lse": with_lse.lse}
