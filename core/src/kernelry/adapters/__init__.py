"""Generic wrappers that let a kernel serve a request it would refuse.

Each adapter is one file. `ADAPTERS` is the order in which the resolver tries them.
"""

from kernelry.adapters.base import Adapter, Cost
from kernelry.adapters.empty_rows_from_lse import EmptyRowsFromLse
from kernelry.adapters.lse_gradient_column import LseGradientColumn
from kernelry.adapters.repeat_kv_heads import RepeatKVHeads
from kernelry.adapters.sinks_from_lse import SinksFromLse

ADAPTERS: tuple[Adapter, ...] = (RepeatKVHeads(), SinksFromLse(), EmptyRowsFromLse(), LseGradientColumn())

__all__ = ["ADAPTERS", "Adapter", "Cost", "EmptyRowsFromLse", "LseGradientColumn", "RepeatKVHeads", "SinksFromLse"]
