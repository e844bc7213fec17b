"""The public names; a change here is a change of the API and wants a line in CHANGELOG.md."""

import pytest

import kernelry
from kernelry import errors, plugin

pytestmark = pytest.mark.versions

TOP = {
    "Mode",
    "ModelShape",
    "Partial",
    "Plan",
    "Request",
    "Resolution",
    "Target",
    "__version__",
    "attention",
    "cache",
    "errors",
    "explain",
    "finalize",
    "kernels",
    "masks",
    "merge",
    "moba",
    "parallel",
    "plugins",
    "record",
    "resolve",
    "resolve_phases",
    "use",
}
MASKS = {
    "Atom",
    "AtomKind",
    "Axis",
    "BidirectionalSpans",
    "BlockCausal",
    "BlockKind",
    "BlockSelection",
    "Causal",
    "Chunked",
    "Dense",
    "Extent",
    "Full",
    "Lengths",
    "Mask",
    "MaskForm",
    "PositionForm",
    "PositionKind",
    "Predicate",
    "PrefixLM",
    "Segments",
    "Side",
    "SlidingWindow",
}
CACHE = {
    "KVCache",
    "PagedArray",
    "PagedCache",
    "PagedView",
    "Quantization",
    "QuantizedArray",
    "RollingCache",
    "SharedPrefix",
    "TwoPartCache",
    "ValueInKey",
}
PARALLEL = {
    "ContextParallel",
    "Sharding",
    "choose_order",
    "load_balanced_order",
    "reorder_for_load_balance",
    "shard_attention",
    "undo_reorder",
}
PLUGIN = {
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
    "static_block_map",
    "too_many_rows",
    "uneven_lengths",
    "load_balanced_order",
    "log_sum",
    "named",
    "pytree",
    "round_up",
    "signature_of",
    "standard_tolerances",
    "with_sinks",
}
ERRORS = {
    "KernelryError": Exception,
    "ArgumentError": ValueError,
    "ShapeError": ValueError,
    "ConfigError": ValueError,
    "PluginError": RuntimeError,
    "CacheFullError": RuntimeError,
    "NoKernelError": LookupError,
    "KernelRefusedError": LookupError,
}


def test_names_of_kernelry_are_pinned():
    assert set(kernelry.__all__) == TOP


def test_names_of_masks_are_pinned():
    assert set(kernelry.masks.__all__) == MASKS


def test_names_of_cache_are_pinned():
    assert set(kernelry.cache.__all__) == CACHE


def test_names_of_parallel_are_pinned():
    assert set(kernelry.parallel.__all__) == PARALLEL


def test_names_of_plugin_are_pinned():
    assert set(plugin.__all__) == PLUGIN


def test_names_of_errors_are_pinned():
    assert {name for name, value in vars(errors).items() if _is_ours(value)} == set(ERRORS)


def _is_ours(value):
    return isinstance(value, type) and value.__module__ == errors.__name__


def test_errors_are_the_builtins_a_caller_expects():
    assert {name for name, builtin in ERRORS.items() if not issubclass(getattr(errors, name), builtin)} == set()


def test_errors_share_one_base():
    assert {name for name in ERRORS if not issubclass(getattr(errors, name), errors.KernelryError)} == set()


def test_every_pinned_name_exists():
    rooms = ((kernelry, TOP), (kernelry.masks, MASKS), (kernelry.cache, CACHE), (plugin, PLUGIN))
    assert [name for room, names in rooms for name in names if not hasattr(room, name)] == []


def test_attention_is_the_function():
    assert callable(kernelry.attention)
