"""One program, compiled for one target."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from kernelry.aot.gpus import GPUS, check_assembler
from kernelry.aot.outcome import Outcome, asked_of_device, left_to_device
from kernelry.aot.reasons import Reason
from kernelry.aot.topology import topology_of
from kernelry.errors import ConfigError, KernelryError
from kernelry.policy.scope import use
from kernelry.request.target import Target


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Compilation:
    """The result of compiling a program.

    Args:
      target: what it was compiled for.
      seconds: tracing, lowering and compiling.
      memory: bytes per device: arguments, outputs, temporaries; empty where it did not compile.
      compiled: the compiled program, `jax.stages.Compiled`; None where there is none.
      reason: why it does not compile, or does not fit; None where it does, as far as anything was checked.
      unchecked: what of it only a device can compile; empty where there is nothing.
    """

    target: Target
    seconds: float
    memory: dict[str, int]
    compiled: Any
    reason: Reason | None = None
    unchecked: str = ""

    @property
    def outcome(self) -> Outcome:
        """Whether it compiled, as far as that can be said without a device."""
        if self.reason is not None:
            return Outcome.FAILED
        return Outcome.UNCHECKED if self.unchecked else Outcome.OK

    @property
    def ok(self) -> bool:
        """Whether it compiled, all of it."""
        return self.outcome is Outcome.OK

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, without the program."""
        reason = None if self.reason is None else dataclasses.asdict(self.reason)
        return {
            "target": str(self.target),
            "ok": self.ok,
            "outcome": str(self.outcome),
            "reason": reason,
            "unchecked": self.unchecked,
            "seconds": self.seconds,
            "memory": self.memory,
        }


def compile_for(
    target: Target | str,
    function: Callable[..., Any],
    *arguments: Any,
    mesh_shape: dict[str, int] | None = None,
    specs: Any = None,
) -> Compilation:
    """Compiles a function for a target, which need not be present, with the vendor's compiler.

    Args:
      target: e.g. `tpu:v5e:2x2` or `gpu:h100:4`. kernelry resolves for it while the function is traced.
      function: what is compiled; it is jitted here.
      *arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s: only shapes and dtypes matter.
      mesh_shape: axis names and sizes of a mesh over the target's first devices; None is one device.
      specs: a PartitionSpec per argument, a tree prefix; None replicates.

    Returns:
      The compilation; a program that cannot be lowered or compiled does not raise, but has a reason,
      and one that calls cuDNN says that it was not checked.

    Raises:
      NoCompilerError: the target's compiler is not installed.
      ConfigError: no such target, or it has fewer devices than the mesh.
      KernelryError: the function asked for attention that no kernel serves there.
    """
    where = Target.parse(target) if isinstance(target, str) else target
    mesh = _mesh(where, mesh_shape or {"device": 1})
    placed = _placed(mesh, arguments, PartitionSpec() if specs is None else specs)  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    compiled, reason, unchecked = None, None, ""
    try:
        with use(target=where), use_abstract_mesh(mesh.abstract_mesh):
            compiled = jax.jit(function).lower(*placed).compile()
        unchecked, reason = left_to_device(compiled), _too_large(where, _memory(compiled))
    except (KernelryError, Warning):  # a warning that is made an error does not come from a compiler
        raise
    except Exception as error:  # vendors' compilers raise exceptions of many classes
        check_assembler(error)
        unchecked = asked_of_device(error)
        reason = None if unchecked else Reason.of(error)
    return Compilation(where, time.perf_counter() - start, _memory(compiled), compiled, reason, unchecked)


def _mesh(target: Target, shape: dict[str, int]) -> Mesh:
    devices, wanted = topology_of(target), math.prod(shape.values())
    if wanted > len(devices):
        raise ConfigError(
            f"target {str(target)!r} has {len(devices)} of the {wanted} devices that a mesh of {shape} needs; "
            "name more, e.g. tpu:v5e:4x4 or gpu:h100:8."
        )
    return Mesh(np.array(devices[:wanted]).reshape(tuple(shape.values())), tuple(shape))


def _placed(mesh: Mesh, arguments: Any, specs: Any) -> Any:
    def described(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(mesh, spec)

        def placed(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # type: ignore[no-untyped-call]

        return jax.tree.map(placed, tree)

    return jax.tree.map(described, specs, arguments, is_leaf=lambda node: isinstance(node, PartitionSpec))


def _too_large(target: Target, memory: dict[str, int]) -> Reason | None:
    """Whether the program fits into the memory of a GPU: XLA's compiler for GPUs does not say; libtpu does."""
    if target.kind not in GPUS:
        return None
    wanted, available = sum(memory.values()), GPUS[target.kind].memory
    return Reason.of_memory(wanted, available) if wanted > available else None


def _memory(compiled: Any) -> dict[str, int]:
    if compiled is None:
        return {}
    found = compiled.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "temporaries": "temp"}
    return {name: int(getattr(found, f"{word}_size_in_bytes")) for name, word in names.items()}
