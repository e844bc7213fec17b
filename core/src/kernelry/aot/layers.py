"""The layers of a config, compiled for a target: each phase forward, and training backward as well."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernelry.aot.compilation import Compilation, Outcome, compile_for
from kernelry.aot.devices import NoCompilerError
from kernelry.aot.dumps import Dumps, dumps_for
from kernelry.aot.kernel_speeds import speeds_of, total_seconds
from kernelry.aot.speed import KernelSpeed
from kernelry.aot.work import Work
from kernelry.api import attention_with_options
from kernelry.config.layer import AttentionConfig
from kernelry.errors import KernelryError, PluginError
from kernelry.masks.spread import leaf_axes
from kernelry.models.model import LayerKind, config_of
from kernelry.phases.calls import PhaseCall, calls
from kernelry.phases.model_shape import ModelShape
from kernelry.policy.scope import use
from kernelry.request.arguments import CallOptions
from kernelry.request.request import Mode, Request
from kernelry.request.sharding import Sharding
from kernelry.request.target import Target
from kernelry.resolution.explanation import Resolution
from kernelry.resolution.resolver import explain_call
from kernelry.storage import PagedArray


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LayerReport:
    """One phase of a config on one target.

    Args:
      name: which call of the model it is.
      resolution: the kernel, or why there is none.
      compilation: None where there is no kernel, or the kernel or its compiler is missing.
      work: what the call takes.
      missing: why it was not compiled, or the compiled program does not show that the kernel runs; else empty.
      has_compiler: whether the target's compiler is installed.
      speeds: what the compiler says of each kernel that the program calls through Pallas: static, not measured. Empty
        where that was not asked for, and of kernels that XLA makes of ordinary operations.
    """

    name: str
    resolution: Resolution
    compilation: Compilation | None
    work: Work
    missing: str = ""
    has_compiler: bool = True
    speeds: tuple[KernelSpeed, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """Whether the phase has a kernel that compiles and is in the program."""
        if self.resolution.plan is not None and not self.has_compiler:
            return Outcome.NO_COMPILER
        if self.compilation is None or self.missing:
            return Outcome.FAILED
        return self.compilation.outcome

    @property
    def ok(self) -> bool:
        """Whether everything was checked and is right."""
        return self.outcome is Outcome.OK

    @property
    def verdict(self) -> str:
        """`ok`, or why not on one line."""
        if self.compilation is None and self.missing:
            return self.missing
        if self.compilation is None:
            return self.resolution.unserved
        reason, plan = self.compilation.reason, self.resolution.plan
        if reason is None:
            left = self.compilation.unchecked
            return self.missing or (f"not checked without a device: {left}" if left else "ok")
        return str(reason if plan is None else reason.about(plan.kernel.name, dict(plan.tiling.values)))

    @property
    def predicted_seconds(self) -> float | None:
        """The time of all its kernels, static and not measured; None where one of them cannot be predicted."""
        return total_seconds(self.speeds)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "name": self.name,
            "mode": self.resolution.request.mode.value,
            "ok": self.ok,
            "outcome": str(self.outcome),
            "verdict": self.verdict,
            "resolution": self.resolution.to_json(),
            "compilation": None if self.compilation is None else self.compilation.to_json(),
            "work": self.work.to_json(),
            "predicted_seconds": self.predicted_seconds,
            "speeds": [speed.to_json() for speed in self.speeds],
        }


def check_layers(
    config: AttentionConfig | LayerKind,
    shape: ModelShape | Sequence[ModelShape],
    target: Target | str,
    *,
    tell: Callable[[str], object] | None = None,
    speed: bool = False,
) -> tuple[LayerReport, ...]:
    """Compiles training (forward and backward), prefill and a decode step of a config for a target.

    Args:
      config: a config or a kind of layers, as for `resolve_phases`.
      shape: as for `resolve_phases`, or several; a call that several of them need is compiled once.
      target: e.g. `tpu:v5e:2x2` or `gpu:h100`. The call is compiled for one of its devices, or, where the shape has a
        sharding, for as many as that names.
      tell: told the name of each phase before it is compiled.
      speed: whether the compilers also say what they schedule. libtpu is told where to write that when it is loaded:
        where this process has loaded it before, the report's speeds say so.

    Returns:
      A report for each call, which says so where the target's compiler or the kernel's package is missing.

    Raises:
      ConfigError: there is no such target.
    """
    where = Target.parse(target)
    shapes = (shape,) if isinstance(shape, ModelShape) else tuple(shape)
    asked: dict[Request, PhaseCall] = {}
    for sizes in shapes:
        for call in calls(config, sizes, where):
            name = f"{call.name}{_distinguished(sizes, shapes)}"
            asked.setdefault(call.request, dataclasses.replace(call, name=name))
    reports = []
    with contextlib.ExitStack() as stack:
        dumps = None
        if speed:
            with contextlib.suppress(NoCompilerError):  # the rows will say so
                dumps = stack.enter_context(dumps_for(where))
        for call in asked.values():
            if tell is not None:
                tell(call.name)
            reports.append(_report(config_of(config), call, dumps))
    return tuple(reports)


def _distinguished(shape: ModelShape, shapes: Sequence[ModelShape]) -> str:
    """What distinguishes a shape from the others, e.g. ` (batch=8)`."""
    names = [field.name for field in dataclasses.fields(ModelShape) if field.name != "two_part"]
    varied = [name for name in names if len({str(getattr(other, name)) for other in shapes}) > 1]
    return f" ({', '.join(f'{name}={getattr(shape, name)}' for name in varied)})" if varied else ""


def _report(config: AttentionConfig, call: PhaseCall, dumps: Dumps | None) -> LayerReport:
    work = Work.of(call.request, call.mask, config.moba)
    resolution = explain_call(call.request, config.policy)
    if resolution.plan is None:
        return LayerReport(call.name, resolution, None, work)
    try:
        with use(policy=config.policy):
            compilation = compile_call(call, dumps)
    except NoCompilerError as error:
        return LayerReport(call.name, resolution, None, work, str(error), has_compiler=False)
    except PluginError as error:
        return LayerReport(call.name, resolution, None, work, str(error))
    missing = ""
    if compilation.compiled is not None:
        try:
            resolution.verify(compilation.compiled)
        except KernelryError as error:
            missing = str(error)
    speeds = () if dumps is None else speeds_of(call, dict(resolution.plan.tiling.values), compilation)
    return LayerReport(call.name, resolution, compilation, work, missing, speeds=speeds)


def compile_call(call: PhaseCall, dumps: Dumps | None = None) -> Compilation:
    """Compiles a call of a phase, in training with its gradients, and keeps what the compiler writes of it."""
    request, arguments = call.request, arguments_of(call)
    compiled = compile_for if dumps is None else functools.partial(compile_for, dumps=dumps)
    if request.sharding is None:
        return compiled(request.target, program_of(call), *arguments)
    sharding = Sharding.parse(request.sharding)
    specs = _specs(call, sharding, arguments)
    return compiled(request.target, program_of(call), *arguments, specs=specs, sharding=sharding)


def _specs(call: PhaseCall, sharding: Sharding, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """How the arguments of a call lie on the devices: as it cuts them."""
    axes = {"B": sharding.batch, "N": sharding.heads, "T": sharding.sequence, "S": sharding.kv_axes}

    def placed(letters: str, array: Any) -> PartitionSpec:
        cut: list[tuple[str, ...] | None] = []
        for letter, size in zip(letters[len(letters) - len(array.shape) :], array.shape, strict=True):
            names = axes.get(letter, ())
            used = {name for others in cut for name in others or ()}  # what cuts T of a bias does not cut its S as well
            cut.append(names if names and not used & {*names} and size % sharding.size(names) == 0 else None)
        return PartitionSpec(*cut)  # type: ignore[no-untyped-call]

    def of_keys(keys: Any) -> Any:
        if isinstance(keys, PagedArray):  # pages may be anywhere, so only heads are cut
            pages = jax.tree.map(functools.partial(placed, "PLNH"), keys.pages)
            return PagedArray(pages, placed("PL", keys.table), keys.interleaved)  # type: ignore[arg-type]
        return jax.tree.map(functools.partial(placed, "BSNH"), keys)

    query, key, value, sinks, bias, leaves = arguments
    of_mask = [placed(letters, leaf) for letters, leaf in zip(leaf_axes(call.mask), leaves, strict=True)]
    of_sinks = None if sinks is None else placed("N", sinks)
    of_bias = None if bias is None else placed("BNTS", bias)
    return placed("BTNH", query), of_keys(key), of_keys(value), of_sinks, of_bias, of_mask


def attention_of(call: PhaseCall) -> Callable[..., Any]:
    """Attention as the phase calls it, a function of `arguments_of`; in training without its gradients."""
    request = call.request
    structure = jax.tree.structure(call.mask)
    options = CallOptions(**{field.name: getattr(request, field.name) for field in dataclasses.fields(CallOptions)})

    def attend(query: Any, key: Any, value: Any, sinks: Any, bias: Any, leaves: Any) -> Any:
        if isinstance(key, PagedArray) and isinstance(value, PagedArray):
            value = PagedArray(value.pages, key.table)  # as arguments they would be two tables
        return attention_with_options(
            query,
            key,
            value,
            mask=jax.tree.unflatten(structure, leaves),
            bias=bias,
            sinks=sinks,
            dropout_rng=jax.random.key(0) if request.dropout_rate else None,
            options=options,
        )

    return attend


def differentiated(request: Request) -> tuple[int, ...]:
    """Which of `arguments_of` training differentiates by."""
    return (0, 1, 2, *([3] if request.sinks else []), *([4] if request.bias else []))


def program_of(call: PhaseCall) -> Callable[..., Any]:
    """Attention as the phase calls it; in training with its gradients."""
    request, attend = call.request, attention_of(call)
    if request.mode is not Mode.TRAIN:
        return attend

    def loss(*operands: Any) -> Any:
        found = attend(*operands)
        return (found[0] if request.max_logits else found).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, argnums=differentiated(request))


def arguments_of(call: PhaseCall) -> tuple[Any, ...]:
    """The shapes of the arguments of `program_of`."""
    request = call.request

    def array(*shape: int, dtype: str = request.dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))  # type: ignore[no-untyped-call]

    query = array(request.batch, request.q_len, request.q_heads, request.head_dim)
    sinks = array(request.q_heads, dtype="float32") if request.sinks else None
    bias = None if request.bias is None else array(*request.bias)
    return query, call.key, call.value, sinks, bias, jax.tree.leaves(call.mask)
