"""A program compiled for a target: whether it compiles, why not, and what only a device can compile."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from kernelry.aot.devices import GPUS, check_assembler, topology_of
from kernelry.aot.dumps import Dumps, Written
from kernelry.errors import ConfigError, KernelryError
from kernelry.kernel.proof import custom_calls
from kernelry.policy.scope import use
from kernelry.request.sharding import Sharding
from kernelry.request.target import Target


@final
class Outcome(enum.Enum):
    """Whether a program compiles, as far as that can be said without a device."""

    OK = "ok"
    FAILED = "no"
    UNCHECKED = "unchecked"
    NO_COMPILER = "no compiler"

    def __str__(self) -> str:
        return self.value


@final
@dataclasses.dataclass(frozen=True, slots=True)
class CompileFailure:
    """Why a program does not compile.

    Args:
      text: the compiler's message, on one line.
      remedy: what to change; empty where that is not known.
    """

    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text

    def about(self, kernel: str, tiling: Mapping[str, int]) -> CompileFailure:
        """Returns the failure with a remedy for the config: blocks half as large as those that were too large.

        Args:
          kernel: its name.
          tiling: the tunables that it was compiled with.
        """
        blocks = [f"{name} = {size // 2}" for name, size in tiling.items() if name.startswith("block_") and size > 1]
        if self.remedy != _SMALLER or not blocks:
            return self
        return CompileFailure(self.text, f"{_SMALLER}, e.g. [attention.tilings] {kernel} = {{ {', '.join(blocks)} }}")

    @classmethod
    def of_memory(cls, needed: int, available: int) -> CompileFailure:
        """Says that a program needs more bytes than the device has, which the compiler for GPUs does not check."""
        sizes = f"{needed / _GIB:.1f} GiB for arguments, outputs and temporaries, of {available / _GIB:.1f} GiB"
        return cls(f"the program needs {sizes}", _LESS_MEMORY)

    @classmethod
    def of(cls, error: Exception) -> CompileFailure:
        """Finds the line of a message that gives the cause, and what to change."""
        words = str(error)
        for pattern, remedy in _KNOWN:
            if found := re.search(pattern, words):
                return cls(_one_line(found.group(0)).rstrip("."), remedy)
        return cls(_one_line(_first_sentence(words)) or type(error).__name__)


_SMALLER = "set smaller blocks"
_LESS_MEMORY = "shorten the sequence, shard it, or choose a kernel that keeps no T×S logits"
_KNOWN = (
    (r"Shared memory size limit exceeded: requested \d+, available:? \d+", _SMALLER),
    (r"Scoped allocation with size [^ ]+ and limit [^ ]+ exceeded scoped vmem limit by [\d.]+\w?", _SMALLER),
    (r"Ran out of memory in memory space vmem[^\n]*", _SMALLER),
    (r"Ran out of memory in memory space smem[^\n]*", "set larger blocks: the table of blocks fills the scalar memory"),
    (
        r"Ran out of memory (?:on HBM|in memory space hbm)[^\n]*",
        _LESS_MEMORY,
    ),
    (r"Invalid vector type for load", "the compiler has no such vectors: choose float32 or bfloat16"),
)


def _first_sentence(words: str) -> str:
    """The first line that is not a heading."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), lines[0] if lines else "")


def _one_line(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 1] + "…"


_GIB = 2**30
_LONGEST = 240
"""Characters of a reason."""


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Compilation:
    """The result of compiling a program.

    Args:
      target: what it was compiled for.
      seconds: tracing, lowering and compiling.
      memory: bytes per device: arguments, outputs, temporaries; empty where it did not compile.
      compiled: the compiled program, `jax.stages.Compiled`; None where there is none.
      reason: why it does not compile, or does not fit into memory; None where it does, as far as that was checked.
      unchecked: the part of it that only a device can compile; empty where there is none.
      traced: the program as it was traced, `jax.stages.Traced`; None where that failed.
      written: what the compiler wrote about it, where it was asked to.
    """

    target: Target
    seconds: float
    memory: dict[str, int]
    compiled: Any
    reason: CompileFailure | None = None
    unchecked: str = ""
    traced: Any = None
    written: Written = dataclasses.field(default_factory=Written)

    @property
    def outcome(self) -> Outcome:
        """Whether it compiled, as far as that can be said without a device."""
        if self.reason is not None:
            return Outcome.FAILED
        return Outcome.UNCHECKED if self.unchecked else Outcome.OK

    @property
    def ok(self) -> bool:
        """Whether all of it compiled."""
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
    sharding: Sharding | str | None = None,
    dumps: Dumps | None = None,
) -> Compilation:
    """Compiles a function for a target, which need not be present, with the vendor's compiler.

    Args:
      target: e.g. `tpu:v5e:2x2` or `gpu:h100:4`. kernelry resolves for it while the function is traced.
      function: what to compile; it is jitted by this function.
      *arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s; only their shapes and dtypes matter.
      mesh_shape: axis names and sizes of a mesh over the target's first devices; None means one device.
      specs: a PartitionSpec per argument, a tree prefix; None replicates.
      sharding: as in `kernelry.use`, or its text. It says the sizes of its axes, which are the mesh where no
        `mesh_shape` is given.
      dumps: where the compiler writes what it schedules, for `check_layers` and predictions; None: nowhere.

    Returns:
      The compilation. A program that cannot be lowered or compiled does not raise: its `reason` says why. One that
      calls cuDNN says in `unchecked` that this part was not checked.

    Raises:
      NoCompilerError: the target's compiler is not installed.
      ConfigError: there is no such target, or it has fewer devices than the mesh.
      KernelryError: the function asked for attention that no kernel serves there.
    """
    where = Target.parse(target)
    cut = None if sharding is None else Sharding.parse(sharding)
    mesh = _mesh(where, mesh_shape or (None if cut is None else dict(cut.located.sizes)) or {"device": 1})
    placed = _placed(mesh, arguments, PartitionSpec() if specs is None else specs)  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    traced, compiled, reason, unchecked = None, None, None, ""
    if dumps is not None:
        dumps.collect()  # what others have compiled since the last time
    try:
        with use(target=where, sharding=cut), use_abstract_mesh(mesh.abstract_mesh):
            traced = jax.jit(function).trace(*placed)
            compiled = traced.lower().compile(None if dumps is None else dumps.options or None)
        unchecked, reason = left_to_device(compiled), _too_large(where, _memory(compiled))
    except (KernelryError, Warning):  # a warning that is made an error does not come from a compiler
        raise
    except Exception as error:  # vendors' compilers raise exceptions of many classes
        check_assembler(error)
        unchecked = asked_of_device(error)
        reason = None if unchecked else CompileFailure.of(error)
    seconds = time.perf_counter() - start
    written = Written() if dumps is None else dumps.collect()
    return Compilation(where, seconds, _memory(compiled), compiled, reason, unchecked, traced, written)


def _mesh(target: Target, shape: dict[str, int]) -> Mesh:
    devices, needed = topology_of(target), math.prod(shape.values())
    if needed > len(devices):
        raise ConfigError(
            f"target {str(target)!r} has {len(devices)} of the {needed} devices that a mesh of {shape} needs; "
            "name more, e.g. tpu:v5e:4x4 or gpu:h100:8."
        )
    return Mesh(np.array(devices[:needed]).reshape(tuple(shape.values())), tuple(shape))


def _placed(mesh: Mesh, arguments: Any, specs: Any) -> Any:
    def described(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(mesh, spec)

        def placed(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # type: ignore[no-untyped-call]

        return jax.tree.map(placed, tree)

    return jax.tree.map(described, specs, arguments, is_leaf=lambda node: isinstance(node, PartitionSpec))


def _too_large(target: Target, memory: dict[str, int]) -> CompileFailure | None:
    """Why a program does not fit into a GPU's memory, which XLA's compiler does not check; libtpu does for TPUs."""
    if target.kind not in GPUS:
        return None
    needed, available = sum(memory.values()), GPUS[target.kind].memory
    return CompileFailure.of_memory(needed, available) if needed > available else None


def _memory(compiled: Any) -> dict[str, int]:
    if compiled is None:
        return {}
    found = compiled.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "temporaries": "temp"}
    return {name: int(getattr(found, f"{word}_size_in_bytes")) for name, word in names.items()}


_CUDNN_CALL = "__cudnn$"
_CUDNN_MISSING = ("cuDNN not found", "cuDNN is not detected")
"""What JAX says when it lowers a call of cuDNN where that is not installed, with its CUDA plugin and without."""


def left_to_device(program: Any) -> str:
    """Returns the part of a compiled program that no compiler has checked; empty where there is none."""
    calls = sorted(target for target in custom_calls(program) if target.startswith(_CUDNN_CALL))
    return f"the program calls {', '.join(calls)}, which cuDNN builds on the device" if calls else ""


def asked_of_device(error: Exception) -> str:
    """Returns what was not lowered because a device's libraries are missing; empty where that is not the reason."""
    if any(words in str(error) for words in _CUDNN_MISSING):
        return "the program calls cuDNN, which JAX lowers only where cuDNN is installed"
    return ""
