"""Generic wrappers that let a kernel serve a request it would refuse.

Each adapter is one file. `ADAPTERS` is the order in which the resolver tries them.
"""

from kernelry.adapters.base import Adapter, Cost
from kernelry.adapters.cast_inputs import CastInputs
from kernelry.adapters.clean_hidden_slots import CleanHiddenSlots
from kernelry.adapters.dense_mask import DenseMask
from kernelry.adapters.dequantize_kv import DequantizeKV
from kernelry.adapters.empty_rows_from_lse import EmptyRowsFromLse
from kernelry.adapters.gather_pages import GatherPages
from kernelry.adapters.lengths_as_segments import LengthsAsSegments
from kernelry.adapters.lse_gradient_column import LseGradientColumn
from kernelry.adapters.pad_head_dim import PadHeadDim
from kernelry.adapters.pad_sequence import PadSequence
from kernelry.adapters.repeat_kv_heads import RepeatKVHeads
from kernelry.adapters.sinks_from_lse import SinksFromLse

ADAPTERS: tuple[Adapter, ...] = (
    GatherPages(),
    DequantizeKV(),
    RepeatKVHeads(),
    PadHeadDim(),
    PadSequence(),
    LengthsAsSegments(),
    DenseMask(),
    CastInputs(),
    CleanHiddenSlots(),
    SinksFromLse(),
    EmptyRowsFromLse(),
    LseGradientColumn(),
)

__all__ = [
    "ADAPTERS",
    "Adapter",
    "CastInputs",
    "CleanHiddenSlots",
    "Cost",
    "DenseMask",
    "DequantizeKV",
    "EmptyRowsFromLse",
    "GatherPages",
    "LengthsAsSegments",
    "LseGradientColumn",
    "PadHeadDim",
    "PadSequence",
    "RepeatKVHeads",
    "SinksFromLse",
]
