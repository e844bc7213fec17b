"""The adapters, in the order in which the resolver tries them."""

from kernelry.execution.adapters.base import Adapter
from kernelry.execution.adapters.cast_inputs import CastInputs
from kernelry.execution.adapters.clean_hidden_slots import CleanHiddenSlots
from kernelry.execution.adapters.dense_mask import DenseMask
from kernelry.execution.adapters.dequantize_kv import DequantizeKV
from kernelry.execution.adapters.empty_rows_from_lse import EmptyRowsFromLse
from kernelry.execution.adapters.gather_pages import GatherPages
from kernelry.execution.adapters.lengths_as_segments import LengthsAsSegments
from kernelry.execution.adapters.lse_gradient_column import LseGradientColumn
from kernelry.execution.adapters.pad_head_dim import PadHeadDim
from kernelry.execution.adapters.pad_sequence import PadSequence
from kernelry.execution.adapters.repeat_kv_heads import RepeatKVHeads
from kernelry.execution.adapters.separate_kv import SeparateKV
from kernelry.execution.adapters.sinks_from_lse import SinksFromLse

ADAPTERS: tuple[Adapter, ...] = (
    GatherPages(),
    DequantizeKV(),
    SeparateKV(),
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
