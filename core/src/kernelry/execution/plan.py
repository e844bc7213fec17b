"""A plan: a kernel, the adapters around it, and how they run on the arrays of a call."""

from __future__ import annotations

import dataclasses
from typing import Any, final

from kernelry.execution.adapters.base import Adapter, Cost, Duty
from kernelry.execution.attend import BoundKernel, attend
from kernelry.kernel.partial import Partial
from kernelry.kernel.spec import Inputs, KernelSpec, Tiling
from kernelry.request.request import Request


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One adapter of a plan, with the request outside and inside it."""

    adapter: Adapter
    before: Request
    after: Request

    @property
    def cost(self) -> Cost:
        """What the adapter adds."""
        return self.adapter.cost(self.before, self.after)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A kernel, the adapters around it (outermost first) and its tiling.

    Args:
      kernel: what runs.
      steps: the adapters.
      request: what the caller asked.
      tiling: the kernel's tunables.
    """

    kernel: KernelSpec
    steps: tuple[Step, ...]
    request: Request
    tiling: Tiling

    @property
    def inner_request(self) -> Request:
        """What the kernel itself is asked, inside all adapters."""
        return self.steps[-1].after if self.steps else self.request

    @property
    def cost(self) -> Cost:
        """What the adapters add together."""
        return sum((step.cost for step in self.steps), Cost())

    @property
    def extra_work(self) -> float:
        """The FLOPs that the adapters add, as a multiple of the call's own."""
        asked = self.request
        pairs = asked.batch * asked.q_heads * asked.q_len * asked.kv_len
        own = 2 * pairs * (asked.head_dim + asked.value_dim)
        return self.cost.extra_flops / own if own else 0.0

    def run(self, inputs: Inputs) -> Partial:
        """Runs the plan on the arrays of the call."""
        for step in self.steps:
            inputs = step.adapter.prepare(inputs, step.before, step.after)
        duties = frozenset(step.adapter.duty for step in self.steps if step.adapter.duty is not None)
        kernel = BoundKernel(self.kernel, self.inner_request, self.tiling, duties - {Duty.SINKS})
        sinks = inputs.sinks if Duty.SINKS in duties else None
        if sinks is not None:
            inputs = dataclasses.replace(inputs, sinks=None)
        partial = attend((kernel,), (inputs,), sinks=sinks, statistics=self.request.partial)
        for step in reversed(self.steps):
            partial = step.adapter.restore(partial, step.before, step.after)
        return partial

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        adapters = [{"name": step.adapter.name, **dataclasses.asdict(step.cost)} for step in self.steps]
        tunables = {"tiling": dict(self.tiling.values), "tiling_source": self.tiling.source}
        return {"kernel": self.kernel.name, "adapters": adapters, "cost": dataclasses.asdict(self.cost), **tunables}
