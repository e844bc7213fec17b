"""The table of MaxText's options about attention: name, default, valid values, and how each is handled."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Any, final

from kernelry.request.checks import is_finite


@final
class Kind(enum.Enum):
    """The valid values of an option; the text is what an error says was expected."""

    FLAG = "true or false"
    SIZE = "a positive integer"
    COUNT = "an integer, 0 or more"
    INTEGER = "an integer"
    NUMBER = "a finite number"
    TEXT = "a text"
    LIST = "a list"
    DEVICES = "a positive integer, or -1 for the rest of the devices"

    def accepts(self, value: Any) -> bool:
        """Returns whether a value is of this kind."""
        if self in (Kind.FLAG, Kind.TEXT):
            return isinstance(value, bool if self is Kind.FLAG else str)
        if self is Kind.NUMBER:
            return is_finite(value)
        if self is Kind.LIST:
            return isinstance(value, list | tuple)
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        least = {Kind.SIZE: 1, Kind.COUNT: 0, Kind.INTEGER: value, Kind.DEVICES: -1}[self]
        return value >= least and (self is not Kind.DEVICES or value != 0)


@final
class Fate(enum.Enum):
    """How an option is handled."""

    MAPPED = "goes into the AttentionConfig"
    PER_CALL = "belongs to the arrays of a call: accepted, with no effect on the config"
    UNREAD = "changes how MaxText runs and not what attention means: accepted, with a warning unless at its default"
    FOREIGN = "is not supported: accepted at its default only"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Args:
      name: in base.yml.
      default: in base.yml, as YAML reads it (an unquoted None is the text "None").
      kind: the valid values; where `optional`, None and "None" are valid as well.
      meaning: what it is mapped to; for an unread or foreign option why it is not, and what to do instead.
      neutral: values of an unread option that mean the same as its default.
    """

    name: str
    default: Any
    kind: Kind
    meaning: str
    fate: Fate
    optional: bool = False
    neutral: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Returns whether a value is valid."""
        return (self.optional and is_none(value)) or self.kind.accepts(value)

    def says(self, value: Any) -> bool:
        """Returns whether a valid value asks for something else than the default does."""
        return value not in (self.default, *self.neutral)

    @property
    def expected(self) -> str:
        """The valid values, in words."""
        return f"{self.kind.value}, or none" if self.optional else self.kind.value


def is_none(value: Any) -> bool:
    """Returns whether a value means none in base.yml: null, or None, which YAML reads as a text."""
    return value is None or (isinstance(value, str) and value == "None")


SIZES = {
    "local_sliding": "sliding_window_size",
    "chunk": "chunk_attn_window_size",
    "block_diffusion": "causal_block_size",
}
"""The option that each attention type needs; no other type reads it."""

BLOCKS = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
"""The suffixes of sa_block_*; with `block_` before them they are splash's tunables."""

ULYSSES_AXIS = "context_usp_ulysses"
"""The axis of MaxText's mesh along which `usp` exchanges heads."""

PARALLELISM = {
    "diloco": "diloco",
    "data": "data",
    "pipeline": "stage",
    "fsdp": "fsdp",
    "fsdp_transpose": "fsdp_transpose",
    "sequence": "sequence",
    "context": "context",
    ULYSSES_AXIS: ULYSSES_AXIS,
    "context_autoregressive": "context_autoregressive",
    "tensor": "tensor",
    "tensor_sequence": "tensor_sequence",
    "expert": "expert",
    "autoregressive": "autoregressive",
}
"""The mesh axis whose sizes each ici_…_parallelism and dcn_…_parallelism is."""

_AXES = [axis for axis in PARALLELISM.values() if axis != "sequence"]
_BATCH = ["data", "fsdp", "fsdp_transpose", "expert"]
_TENSOR = ["tensor", "tensor_sequence"]
_RULES = [
    ["activation_batch_attn", _BATCH],
    ["activation_heads", [*_TENSOR, "autoregressive"]],
    ["activation_kv", _TENSOR],
    ["activation_length", ["context", ULYSSES_AXIS]],
]
"""Of logical_axis_rules in base.yml, those of the names that attention has, in their order."""

SHIPPED_BLOCK, SHIPPED_RAGGED_BLOCK = 512, 256
"""Elements and keys; the defaults of every sa_block_* and of ragged_block_size in base.yml."""


_mapped, _foreign, _unread, _per_call = (
    functools.partial(Option, fate=fate) for fate in (Fate.MAPPED, Fate.FOREIGN, Fate.UNREAD, Fate.PER_CALL)
)


def _unread_local(name: str, default: Any, kind: Kind, why: str) -> Option:
    """An option of local layers; none means that the global option applies, whose default has no effect."""
    return _unread(name, "None", kind, why, optional=True, neutral=(None, default))


_LAYER = (
    _mapped("attention_type", "global", Kind.TEXT, "type"),
    _mapped("decoder_block", "llama2", Kind.TEXT, "a warning, where its layers are of several types: see blocks"),
    _mapped("sliding_window_size", 0, Kind.COUNT, "window, for local_sliding; 0 is none"),
    _mapped("chunk_attn_window_size", 0, Kind.COUNT, "chunk_size, for chunk; 0 is none"),
    _mapped("causal_block_size", 32, Kind.SIZE, "block_size, for block_diffusion"),
    _mapped("attn_logits_soft_cap", 0.0, Kind.NUMBER, "soft_cap; 0 is none", optional=True),
    _mapped("attention_sink", False, Kind.FLAG, "sinks"),
    _mapped("float32_qk_product", False, Kind.FLAG, "logits are float32 either way"),
    _mapped("float32_logits", False, Kind.FLAG, "logits and softmax are float32 either way"),
    _mapped("matmul_precision", "default", Kind.TEXT, "precision"),
    _mapped("dropout_rate", 0.0, Kind.NUMBER, "dropout_rate, where enable_dropout"),
    _mapped("enable_dropout", True, Kind.FLAG, "false: dropout_rate is 0"),
    _mapped("use_qk_clip", False, Kind.FLAG, "record_max_logits"),
    _mapped("moba", False, Kind.FLAG, "moba"),
    _mapped("moba_chunk_size", 1024, Kind.SIZE, "moba.chunk_size, where moba"),
    _mapped("moba_topk", 8, Kind.SIZE, "moba.top_k, where moba"),
)
_KERNELS = (
    _mapped("attention", "autoselected", Kind.TEXT, "kernel or rules"),
    _mapped("use_tokamax_splash", False, Kind.FLAG, "the flash kernel on TPU is tokamax_splash"),
    _mapped("use_jax_splash", False, Kind.FLAG, "the flash kernel on TPU is blockwise"),
    _mapped("use_ragged_attention", False, Kind.FLAG, "rules for decode: ragged on TPU, pallas_decode on GPU"),
    _mapped("ragged_block_size", SHIPPED_RAGGED_BLOCK, Kind.SIZE, "tilings of these two: block_kv"),
    *(_mapped(f"sa_block_{name}", SHIPPED_BLOCK, Kind.SIZE, f"tilings: block_{name}") for name in BLOCKS),
    *(
        _mapped(f"local_sa_block_{name}", "None", Kind.SIZE, f"the same for local_sliding: block_{name}", optional=True)
        for name in BLOCKS
    ),
)

_MINOR = "HEAD_DIM_MINOR"
_TUNABLES = (
    _mapped("sa_use_fused_bwd_kernel", False, Kind.FLAG, "tilings of splash: backward_kernels; tokamax's is fused"),
    _mapped("local_sa_use_fused_bwd_kernel", "None", Kind.FLAG, "the same for local_sliding", optional=True),
    *(_mapped(f"sa_{array}_layout", _MINOR, Kind.TEXT, f"tilings: {array}_layout") for array in "qkv"),
    *(
        _mapped(
            f"local_sa_{array}_layout", "None", Kind.TEXT, f"the same for local_sliding: {array}_layout", optional=True
        )
        for array in "qkv"
    ),
    _mapped("dq_reduction_steps", 0, Kind.COUNT, "tilings of tokamax_splash: dq_reduction_steps, where it is 3"),
    _mapped("max_segments_per_seq", -1, Kind.INTEGER, "tilings of cudnn_te: max_segments; -1 is its default"),
)

_DATA = "the segment ids of a call are a mask, kernelry.masks.Segments"
_CHUNKS = "the positions of a chunk's queries are part of the mask: mask.at(query_offset=…)"
_PER_CALL = (
    _per_call("packing", True, Kind.FLAG, f"{_DATA}; the order of a ring on GPUs follows it"),
    _per_call("use_chunked_prefill", False, Kind.FLAG, _CHUNKS),
    _per_call("prefill_chunk_size", 256, Kind.SIZE, _CHUNKS),
    _per_call("use_indexer", False, Kind.FLAG, "the indexer's choice is a mask, kernelry.masks.Dense"),
)

_CACHE = "a cache is quantised where it is made: kernelry.cache.TwoPartCache.create(storage='int8:heads_and_head_dim')"
_CUSTOM = "its rules are in a file of MaxText: pass mesh_axes and logical_axis_rules as they are there"
_EVAL_RULES = "there is one sharding per config: build a second config for evaluation, with these as logical_axis_rules"
_EVAL = "there is one tiling per config: build a second config for evaluation, with these values as sa_* and local_sa_*"
_LAYOUT = "layouts are internal to kernels, and arrays are [batch, length, heads, dim] everywhere else"
_TUNING = "kernels here have no such tunable"
_QUANTISED = "kernels do not quantise their inputs: quantise query and key before the call"

_SHARDED = (
    _mapped("mesh_axes", _AXES, Kind.LIST, "sharding: axes that are not among them cut nothing"),
    _mapped("logical_axis_rules", _RULES, Kind.LIST, "sharding: the axes of batch, heads and sequence"),
    *(
        _mapped(
            f"{network}_{kind}_parallelism",
            -1 if (network, kind) in (("ici", "fsdp"), ("dcn", "data")) else 1,
            Kind.DEVICES,
            f"sharding: ici × dcn is the size of {axis}, unless it is 1 or has the rest of the devices",
        )
        for network in ("dcn", "ici")
        for kind, axis in PARALLELISM.items()
    ),
    _mapped("context_parallel_size", None, Kind.SIZE, "sharding: the size of context_sharding's axis", optional=True),
    _mapped("context_parallel_strategy", "all_gather", Kind.TEXT, "sharding: strategy"),
    _mapped("context_parallel_load_balance", True, Kind.FLAG, "sharding: order; false is contiguous"),
    _mapped("context_parallel_reorder_strategy", "auto", Kind.TEXT, "sharding: order; auto as in MaxText's training"),
    _mapped("context_sharding", "context", Kind.TEXT, "sharding: checked against the axes of the sequence"),
    _mapped("ulysses_context_sharding", ULYSSES_AXIS, Kind.TEXT, "sharding: ulysses, where the strategy is usp"),
    _mapped("shard_mode", "auto", Kind.TEXT, "a sharding holds for axes of either kind"),
)
MESH = frozenset(option.name for option in _SHARDED)
"""The options of which any one makes a sharding of all."""

_AROUND_THE_MESH = (
    _mapped("hardware", "tpu", Kind.TEXT, "sharding: order auto is striped for packed rings on GPUs"),
    _mapped(
        "using_pipeline_parallelism",
        None,
        Kind.FLAG,
        "nothing: calls may be mapped over stages by jax.vmap(…, spmd_axis_name='stage')",
        optional=True,
    ),
    _mapped("override_logical_axis_rules", False, Kind.FLAG, "load_maxtext: whether a file's rules replace all others"),
    _foreign("custom_mesh_and_rule", "", Kind.TEXT, _CUSTOM),
    _unread("custom_mesh_and_rule_for_eval", "", Kind.TEXT, _EVAL_RULES),
    _unread("logical_axis_rules_for_eval", [], Kind.LIST, _EVAL_RULES),
    _unread("ring_scan_unroll", 1, Kind.INTEGER, "steps of a ring are not unrolled here"),
)
_STORED = (
    _foreign("quantize_kvcache", False, Kind.FLAG, _CACHE),
    _foreign("kv_quant_axis", "heads_and_dkv", Kind.TEXT, _CACHE),
    _foreign("kv_quant_dtype", "int8", Kind.TEXT, _CACHE),
    _unread("prefill_cache_axis_order", "1,2,0,3", Kind.TEXT, _LAYOUT),
    _unread("ar_cache_axis_order", "1,2,0,3", Kind.TEXT, _LAYOUT),
    _unread("compute_axis_order", "0,1,2,3", Kind.TEXT, _LAYOUT),
    _unread("reshape_q", False, Kind.FLAG, _LAYOUT),
    _unread("force_q_layout", False, Kind.FLAG, _LAYOUT),
    *(_unread(f"eval_sa_{array}_layout", _MINOR, Kind.TEXT, _EVAL) for array in "qkv"),
    *(_unread_local(f"eval_local_sa_{array}_layout", _MINOR, Kind.TEXT, _EVAL) for array in "qkv"),
)
_TUNED = (
    *(_unread(f"eval_sa_block_{name}", SHIPPED_BLOCK, Kind.SIZE, _EVAL) for name in BLOCKS[:3]),
    *(_unread_local(f"eval_local_sa_block_{name}", SHIPPED_BLOCK, Kind.SIZE, _EVAL) for name in BLOCKS[:3]),
    _unread("sa_bwd_dkv_megacore", False, Kind.FLAG, _TUNING),
    _unread("use_splash_scheduler", False, Kind.FLAG, _TUNING),
    _unread_local("local_use_splash_scheduler", False, Kind.FLAG, _TUNING),
    _unread("sa_fuse_reciprocal", True, Kind.FLAG, _TUNING),
    _unread_local("local_sa_fuse_reciprocal", True, Kind.FLAG, _TUNING),
    _unread("sa_use_base2_exp", True, Kind.FLAG, _TUNING),
    _unread_local("local_sa_use_base2_exp", True, Kind.FLAG, _TUNING),
    _unread("cost_estimate_flops_fwd", -1, Kind.INTEGER, _TUNING),
    _unread("cost_estimate_flops_bwd", -1, Kind.INTEGER, _TUNING),
    _unread("use_max_logit_estimate", -1, Kind.NUMBER, "the largest logit is computed here, never assumed"),
    _foreign("experimental_sa_quant_q_fp8", False, Kind.FLAG, _QUANTISED),
    _foreign("experimental_sa_quant_k_fp8", False, Kind.FLAG, _QUANTISED),
    _foreign("enable_padding_causal_mask", True, Kind.FLAG, "padding is always masked: see kernelry.masks.Segments"),
)

OPTIONS = (*_KERNELS, *_LAYER, *_TUNABLES, *_PER_CALL, *_SHARDED, *_AROUND_THE_MESH, *_STORED, *_TUNED)
"""Every option of base.yml that is about attention."""
