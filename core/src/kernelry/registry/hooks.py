"""The hooks of a kernelry plugin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

import pluggy

if TYPE_CHECKING:
    from kernelry.execution.normalization import Normalization
    from kernelry.kernel.spec import KernelSpec
    from kernelry.masks.base import Mask
    from kernelry.request.request import Request
    from kernelry.resolution.explanation import Resolution

PROJECT = "kernelry"
CONTRACT = 1
"""The version of the plugin contract that this core honours."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """A vote with its source: what the hook `kernelry_rank` may return instead of a list.

    Args:
      kernels: names of candidates, best first.
      source: how it is known, e.g. `predicted by libtpu 0.0.50.1`; explanations tell it where the vote decides.
    """

    kernels: tuple[str, ...]
    source: str


@hookspec
def kernelry_kernels() -> Sequence[KernelSpec]:  # type: ignore[empty-body]
    """Returns the kernels of this plugin. Must import no vendor library."""


@hookspec
def kernelry_masks() -> Mapping[str, type[Mask]]:  # type: ignore[empty-body]
    """Returns mask classes by the name under which configs and commands know them."""


@hookspec
def kernelry_normalizations() -> Mapping[str, Normalization]:  # type: ignore[empty-body]
    """Returns normalizations by the name that `attention(normalization=…)` takes."""


@hookspec
def kernelry_rank(request: Request, candidates: Sequence[str]) -> Sequence[str] | Ranking | None:
    """Returns some of the candidates' names, best first, a Ranking that says how it knows, or None to abstain.

    Votes rank below config rules and measurements. All plugins' votes count the same: a kernel
    earns the number of candidates it was placed before. A vote lifts no reservation.
    """


@hookspec
def kernelry_resolved(resolution: Resolution) -> None:
    """Observes each new resolution."""
