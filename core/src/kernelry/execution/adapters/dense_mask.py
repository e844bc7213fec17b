"""Serves any mask with a kernel that takes a boolean array."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from kernelry.execution.adapters.base import Adapter, Cost, visible_of
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.masks.dense import Dense
from kernelry.masks.form import Atom, AtomKind, MaskForm
from kernelry.request.request import Request

_DENSE = MaskForm((Atom(AtomKind.DENSE),))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class DenseMask(Adapter):
    """Evaluates the mask beforehand; batch and heads stay 1 where it does not differ by them."""

    name: ClassVar[str] = "dense_mask"
    cures: ClassVar[frozenset[RefusalCode]] = frozenset({RefusalCode.MASK_ATOM, RefusalCode.POSITIONS})

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        if AtomKind.DENSE not in capabilities.atoms or request.mask == _DENSE:
            return None
        return request.rewritten(mask=_DENSE)

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        return dataclasses.replace(inputs, mask=(Dense(visible_of(inputs.mask, before)),))

    def cost(self, before: Request, after: Request) -> Cost:
        atoms = [atom for atom in before.mask.walk() if atom.kind not in (AtomKind.ANY_OF, AtomKind.NOT)]
        rows = before.batch if any(_differs_by_row(atom) for atom in atoms) else 1
        heads = before.q_heads if any(_may_differ_by_head(atom) for atom in atoms) else 1
        pairs = rows * heads * before.q_len * before.kv_len
        return Cost(extra_bytes=pairs, extra_flops=pairs * len(before.mask.atoms))


def _may_differ_by_head(atom: Atom) -> bool:
    axes = atom.mask_class.axes
    return axes is None or any("N" in letters for letters in axes.values())


def _differs_by_row(atom: Atom) -> bool:
    static_rows = (side.value for side in (atom.query, atom.kv) if isinstance(side.value, tuple))
    return not atom.is_static or any(len(rows) > 1 for rows in static_rows)
