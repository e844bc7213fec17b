"""Which kernel each kind of layer gets in each phase: the model traced, nothing computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.table import Table

import kernelry
from lm.generate import decode, prefill, prompt_of
from lm.mesh import divisible
from lm.model import Decoder
from lm.settings import Settings
from lm.train import loss_and_gradient


@dataclasses.dataclass(frozen=True)
class Choice:
    """One resolution and the layers it is for."""

    kind: str
    layers: tuple[int, ...]
    resolution: kernelry.Resolution

    @property
    def phase(self) -> str:
        """train, prefill or decode."""
        return self.resolution.request.mode.value

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        layers = {"kind": self.kind, "layers": list(self.layers), "phase": self.phase}
        return {**layers, **self.resolution.to_json()}


def choices(model: Decoder, settings: Settings) -> list[Choice]:
    """Traces a training step, a prefill and a decode step of the model as the config has it.

    Raises:
      NoKernelError: no kernel serves some call, before anything has run.
    """
    training, generation = settings.training, settings.generation
    windows = jnp.zeros((training.batch, training.seq_len + 1), jnp.int32)
    prompt = prompt_of(generation)
    capacity = prompt.shape[1] + generation.length
    caches = model.empty_caches(prompt.shape[0], divisible(capacity))
    return [
        *_traced(model, lambda model: loss_and_gradient(model, windows)),
        *_traced(model, lambda model: prefill(model, prompt, capacity)),
        *_traced(model, lambda model: decode(model, prompt[:, 0], caches)),
    ]


def _traced(model: Decoder, phase: Callable[[Decoder], Any]) -> Iterator[Choice]:
    with kernelry.record() as resolutions:
        nnx.eval_shape(phase, model)
    kinds = [block.kind for block in model.blocks]
    for kind in dict.fromkeys(kinds):
        layers = tuple(place for place, other in enumerate(kinds) if other == kind)
        yield Choice(kind, layers, resolutions[layers[0]])


def table_of(made: list[Choice]) -> Table:
    """Lays the choices out for the terminal."""
    table = Table(title=f"Attention on {jax.default_backend()}", title_justify="left", show_lines=True)
    cut = any(choice.resolution.shards is not None for choice in made)
    table.add_column("layers, phase, T × S, mask", ratio=3)
    if cut:
        table.add_column("on the mesh", ratio=3)
    table.add_column("kernel", style="bold green", no_wrap=True)
    table.add_column("because", ratio=4)
    table.add_column("passed over", ratio=5)
    for choice in made:
        resolution, request = choice.resolution, choice.resolution.request
        table.add_row(
            f"{choice.kind} {', '.join(map(str, choice.layers))}\n"
            f"{choice.phase} {request.q_len} × {request.kv_len}\n{request.mask}",
            *(["\n".join(on_mesh(resolution))] if cut else []),
            _chosen(resolution),
            resolution.rule,
            "\n".join(_passed_over(resolution)),
        )
    return table


def on_mesh(resolution: kernelry.Resolution) -> Iterator[str]:
    """How a call is cut, and what each device is asked about which pairs of shards."""
    if resolution.shards is None:
        return
    shards = resolution.shards.shards
    yield str(shards.sharding)
    own = shards.requests[0]
    yield f"a device: B={own.batch} T={own.q_len} S={own.kv_len} N={own.q_heads} K={own.kv_heads}"
    if shards.table is None:
        return
    pairs = [shards.pairs(place) for place in range(len(shards.requests))]
    yield "pairs of shards:"
    yield from (f"  {count} {part.mask}" for count, part in zip(pairs, shards.requests, strict=True))
    if skipped := sum(map(len, shards.table.table)) - sum(pairs):
        yield f"  {skipped} skipped"


def _chosen(resolution: kernelry.Resolution) -> str:
    """The kernel, the adapters around it and its tiling."""
    assert resolution.plan is not None  # record() holds only what was chosen
    plan = resolution.plan
    adapters = [f"through {step.adapter.name}" for step in plan.steps]
    tiling = [f"{name}={value}" for name, value in plan.tiling.values]
    return "\n".join([plan.kernel.name, *adapters, *tiling])


def _passed_over(resolution: kernelry.Resolution) -> Iterator[str]:
    """One line per reason, with the kernels it holds for."""
    kernels: dict[str, list[str]] = {}
    for candidate in resolution.candidates:
        if candidate.name != resolution.kernel:
            reason = str(candidate.refusals[0].detail) if candidate.refusals else "could serve, ranked lower"
            kernels.setdefault(reason, []).append(candidate.name)
    if resolution.excluded:
        kernels["not in this rule"] = list(resolution.excluded)
    return (f"{', '.join(names)}: {reason}" for reason, names in kernels.items())
