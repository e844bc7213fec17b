"""Everything a plugin author imports.

A plugin is a module named by an entry point in group `kernelry.plugins`. It states the contract it was written for,
`contract = (1, 1)`, and implements the hooks of `kernelry.registry.hooks` with `@hookimpl`; a `Ranking` is a vote.

- A kernel is a `KernelSpec` with `Capabilities`, and a body that is a `Kernel`: `Inputs` in, a `Partial` out.
- What most specs repeat: `uneven_lengths`, `too_many_rows`, `array_refusals` and `Vendor.refusals` refuse a request,
  `standard_tolerances` declares what rounding costs and `signature_of` what a program must contain, `round_up` and
  `largest_divisor` choose blocks.
- What bodies share: `log_sum` and `with_sinks` for statistics, `named` and `REMAT_NAME` for `jax.checkpoint`,
  `cast_finite`, `static_block_map` and `decided_at_run_time` for the blocks that a mask leaves, `pytree` for their own
  containers.
- Keys and values are arrays, `QuantizedArray`s or `PagedArray`s, values also a `ValueInKey`; `QUANTIZATIONS` are the
  quantisations, `SEPARATE`, `VALUE_IN_KEY` and `INTERLEAVED` what `Request.kv_layout` may be.
- A mask is a `Mask`; it sees slots as a `Side` and says its `MaskForm`. A `Normalization` merges and finishes Partials.
"""

from kernelry._pytree import pytree
from kernelry.execution.normalization import Normalization, log_sum, with_sinks
from kernelry.kernel.capabilities import Capabilities, Dims, Feature, Gradient, ManualAxes, Statistic, Tolerance
from kernelry.kernel.common import (
    array_refusals,
    largest_divisor,
    round_up,
    signature_of,
    standard_tolerances,
    too_many_rows,
    uneven_lengths,
)
from kernelry.kernel.partial import REMAT_NAME, Partial, named
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import (
    Environment,
    Gradients,
    Inputs,
    Kernel,
    KernelSpec,
    Knowledge,
    Tiling,
    Vendor,
)
from kernelry.masks import Atom, AtomKind, Axis, Extent, Mask, MaskForm, PositionForm, PositionKind, Side
from kernelry.masks.base import Placeholder
from kernelry.masks.blocks import static_block_map
from kernelry.masks.composition import Conjunct
from kernelry.masks.padding import Padding
from kernelry.masks.predicate import is_lasting
from kernelry.masks.run_time import BlockGrid, Decided, decided_at_run_time
from kernelry.policy.policy import Policy
from kernelry.registry.hooks import CONTRACT, Ranking, hookimpl
from kernelry.request.arguments import cast_finite
from kernelry.request.context_parallel import ContextParallel, load_balanced_order
from kernelry.request.request import Mode, Operand, Request
from kernelry.request.target import Target
from kernelry.storage import (
    INTERLEAVED,
    QUANTIZATIONS,
    SEPARATE,
    VALUE_IN_KEY,
    PagedArray,
    Quantization,
    QuantizedArray,
    ValueInKey,
)

__all__ = [
    "CONTRACT",
    "INTERLEAVED",
    "QUANTIZATIONS",
    "REMAT_NAME",
    "SEPARATE",
    "VALUE_IN_KEY",
    "Atom",
    "AtomKind",
    "Axis",
    "BlockGrid",
    "Capabilities",
    "Conjunct",
    "ContextParallel",
    "Decided",
    "Dims",
    "Environment",
    "Extent",
    "Feature",
    "Gradient",
    "Gradients",
    "Inputs",
    "Kernel",
    "KernelSpec",
    "Knowledge",
    "ManualAxes",
    "Mask",
    "MaskForm",
    "Mode",
    "Normalization",
    "Operand",
    "Padding",
    "PagedArray",
    "Partial",
    "Placeholder",
    "Policy",
    "PositionForm",
    "PositionKind",
    "Quantization",
    "QuantizedArray",
    "Ranking",
    "Refusal",
    "RefusalCode",
    "Request",
    "Side",
    "Statistic",
    "Target",
    "Tiling",
    "Tolerance",
    "ValueInKey",
    "Vendor",
    "array_refusals",
    "cast_finite",
    "decided_at_run_time",
    "hookimpl",
    "is_lasting",
    "largest_divisor",
    "load_balanced_order",
    "log_sum",
    "named",
    "pytree",
    "round_up",
    "signature_of",
    "standard_tolerances",
    "static_block_map",
    "too_many_rows",
    "uneven_lengths",
    "with_sinks",
]
