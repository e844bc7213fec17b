"""The kernel under test, and the smallest call that tests it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import final

from kernelry.errors import KernelryError
from kernelry.kernel.capabilities import Capabilities, Dims, Feature, Gradient
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import KernelSpec
from kernelry.request.request import Mode, Operand
from kernelry.resolution.resolver import explain
from kernelry.storage import KV_LAYOUTS, VALUE_IN_KEY
from kernelry.testing.conformance.bench import Bench
from kernelry.testing.conformance.calls import AttentionCall
from kernelry.testing.conformance.host import KernelHost

_LENGTHS = (16, 32, 64, 128, 256, 512)
"""Tokens; the first length that a kernel accepts is used in most cases. Windows of 8 slots need 16 tokens."""

_SMALL_DIM = 8
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_MODES = (Mode.TRAIN, Mode.PREFILL, Mode.DECODE)
_SCALE = 1.3
"""Times H ** -0.5, which is not the default of any library."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A kernel, where it is tested, and the base of its calls.

    Args:
      spec: the kernel.
      bench: runs it.
      quick: whether the list of cases is thinned.
      base: the smallest call that it serves, with grouped heads, gradients and a scale where it declares them; in
        pages, or with values stored with the keys, where it serves no other; None where it serves none.
    """

    spec: KernelSpec
    bench: Bench
    quick: bool
    base: AttentionCall | None

    @classmethod
    def of(cls, spec: KernelSpec, quick: bool) -> Subject:
        """Finds the base call."""
        bench = Bench(spec, KernelHost.of(spec))
        subject = cls(spec, bench, quick, None)
        return dataclasses.replace(subject, base=subject.first(_base_calls(spec.capabilities)))

    @property
    def can(self) -> Capabilities:
        """What the kernel declares."""
        return self.spec.capabilities

    @property
    def host(self) -> KernelHost:
        """Where it is tested."""
        return self.bench.host

    @property
    def is_slow(self) -> bool:
        """Whether a call takes seconds, as with interpreted kernels, so that a quick run has fewer of them."""
        return self.host.interpreted

    @property
    def plainest(self) -> AttentionCall:
        """The first call that is tried as the base."""
        return next(iter(_base_calls(self.can)))

    def refusals(self, call: AttentionCall) -> tuple[Refusal, ...]:
        """Why the kernel itself refuses a call; none where it serves it."""
        try:
            return self.host.refusals(self.spec, call.request(self.host))
        except KernelryError as error:
            return (Refusal(RefusalCode.FAULT, str(error)),)
        except Exception as error:  # its refusals raised, which core reports as a refusal, too
            return (Refusal(RefusalCode.FAULT, repr(error)),)

    def serves(self, call: AttentionCall) -> bool:
        """Whether the kernel serves a call without adapters."""
        return not self.refusals(call)

    def serves_adapted(self, call: AttentionCall) -> bool:
        """Whether the kernel serves a call through adapters, or without."""
        try:
            request = call.request(self.host)
        except KernelryError:  # e.g. pages do not make up its length
            return False
        with self.host.entered(self.spec, adapters=True):
            return explain(request, kernel=self.spec.name).plan is not None

    def first(self, calls: Iterable[AttentionCall]) -> AttentionCall | None:
        """The first call that is served."""
        return next((call for call in calls if self.serves(call)), None)


def _base_calls(can: Capabilities) -> Iterator[AttentionCall]:
    plain = tuple(_plain_calls(can))
    yield from plain
    for layout in (layout for layout in KV_LAYOUTS if layout in can.kv_layouts):
        for call in plain if layout == VALUE_IN_KEY else ():
            yield dataclasses.replace(call, kv_layout=layout)
        for call in plain if can.pages else ():
            for size in dict.fromkeys(max(1, call.kv_len // count) for count in (4, 2, 1)):
                yield dataclasses.replace(call, kv_layout=layout, page_size=size)


def _plain_calls(can: Capabilities) -> Iterator[AttentionCall]:
    dims = can.head_dims or Dims()
    dim = dims.padded(_SMALL_DIM) or dims.maximum or _SMALL_DIM
    modes = [mode for mode in _MODES if mode in can.modes] or [Mode.TRAIN]
    dtypes = [dtype for dtype in _DTYPES if dtype in can.dtypes] or ["float32"]
    normalization = "softmax" if "softmax" in can.normalizations else min(can.normalizations, default="softmax")
    has_scale = Feature.SCALE in can.features
    make = functools.partial(
        AttentionCall,
        q_heads=4,
        kv_heads=2 if can.grouped_heads else 4,
        head_dim=dim,
        value_dim=dim,
        scale=_SCALE * dim**-0.5 if has_scale else None,
        gradients=gradients_of(can),
        normalization=normalization,
    )
    for mode in modes:
        for length in _LENGTHS if mode is not Mode.DECODE else (*_LENGTHS, 1):
            for dtype in dtypes:
                yield make(mode=mode, q_len=length, kv_len=length, dtype=dtype)
                yield make(mode=mode, q_len=1, kv_len=length, dtype=dtype)


def gradients_of(can: Capabilities) -> frozenset[Operand]:
    """The operands that the kernel has gradients of."""
    return can.gradients if can.gradient is not Gradient.NONE else frozenset()
