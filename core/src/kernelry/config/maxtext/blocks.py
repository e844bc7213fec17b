"""MaxText's decoder blocks: how the layers of each attend, which options they read, and the options of whole models.

Source: MaxText 0.2.5, found by building the decoder of every block under many options and recording what each layer
passes to AttentionOp: tests/fixtures/maxtext_layers.json has the record.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, final

from kernelry.config.layer import AttentionType
from kernelry.config.maxtext.options import Fate, Kind, Option
from kernelry.errors import ConfigError, nearest

GLOBAL, LOCAL, CHUNK, MLA = (
    kind.value for kind in (AttentionType.GLOBAL, AttentionType.LOCAL_SLIDING, AttentionType.CHUNK, AttentionType.MLA)
)
BLOCK_DIFFUSION = AttentionType.BLOCK_DIFFUSION.value
LINEAR, COMPRESSED = "linear", "compressed"
"""Layers without a config: a gated delta net, and attention to keys that were compressed before."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A decoder block.

    Args:
      types: the attention types of its layers, repeated.
      interval: the option that replaces the repetition: every so many layers, the last is of `types[1]`, and the others
        are of `types[0]`. "" means that there is none.
      ratios: the option that replaces it by a number for each layer: `types[0]` where it is 0, else `types[1]`.
      of_model: the types by `model_name`, where MaxText takes them from there.
      attention_type: the value that `attention_type` must have; None means that its layers do not read it.
      soft_cap: whether its layers read attn_logits_soft_cap.
      sinks: whether its layers have sinks; None means that attention_sink says it.
      kv_heads: the heads of keys and values that it needs: "all" are as many as those of queries, "one" is one, "any"
        leaves them to base_num_kv_heads.
      global_sizes: whether global layers read global_num_kv_heads and global_head_dim.
      without_rope: the types whose layers do not rotate queries and keys.
      shares: whether it reads num_kv_shared_layers.
      bidirectional: the types in which the tokens of an image see each other.
      attentions: the layers of attention in one of MaxText's layers.
      cycles: whether a step of scan_layers has inhomogeneous_layer_cycle_interval layers, or one; None means that all
        layers are kept whatever the option is.
    """

    types: tuple[str, ...] = (GLOBAL,)
    interval: str = ""
    ratios: str = ""
    of_model: tuple[tuple[str, tuple[str, ...]], ...] = ()
    attention_type: str | None = None
    soft_cap: bool = False
    sinks: bool | None = None
    kv_heads: Literal["any", "all", "one"] = "any"
    global_sizes: bool = False
    without_rope: tuple[str, ...] = ()
    shares: bool = False
    bidirectional: tuple[str, ...] = ()
    attentions: int = 1
    cycles: bool | None = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The different types of its layers, in their order."""
        return tuple(dict.fromkeys(self.types))


def _local(number: int) -> tuple[str, ...]:
    """Returns the types of layers of which the last of every `number` + 1 is global."""
    return (*[LOCAL] * number, GLOBAL)


BLOCKS = {
    "default": Block(),
    "llama2": Block(soft_cap=True),
    "mistral": Block(),
    "mixtral": Block(),
    "deepseek": Block((MLA,), attention_type=MLA, soft_cap=True, sinks=False, kv_heads="all", cycles=None),
    "deepseek4": Block(
        (LOCAL, COMPRESSED),
        ratios="compress_ratios",
        attention_type=COMPRESSED,
        sinks=True,
        kv_heads="one",
        cycles=None,
    ),
    "envy": Block(cycles=True),
    "gemma": Block(),
    "gemma2": Block(_local(1), soft_cap=True, attentions=2),
    "gemma3": Block(_local(5), soft_cap=True, bidirectional=(LOCAL, GLOBAL), cycles=None),
    "gemma4": Block(_local(5), soft_cap=True, global_sizes=True, bidirectional=(LOCAL,), cycles=None),
    "gemma4_small": Block(
        _local(5),
        of_model=(("gemma4-e2b", _local(4)), ("gemma4-e4b", _local(5))),
        soft_cap=True,
        global_sizes=True,
        shares=True,
        cycles=None,
    ),
    "gpt3": Block(sinks=False, kv_heads="all", without_rope=(GLOBAL,)),
    "gpt_oss": Block(_local(1), cycles=True),
    "llama4": Block((CHUNK, GLOBAL), interval="nope_layer_interval", without_rope=(GLOBAL,), cycles=True),
    "olmo3": Block(_local(3), cycles=True),
    "qwen2": Block(),
    "qwen3": Block(),
    "qwen3_moe": Block(),
    "qwen3_custom_moe": Block(),
    "qwen3_next": Block((LINEAR, GLOBAL), interval="inhomogeneous_layer_cycle_interval", cycles=None),
    "qwen3_5": Block((LINEAR, GLOBAL), interval="inhomogeneous_layer_cycle_interval", cycles=True),
}
"""Every decoder block that attends, by its name."""

WITHOUT_ATTENTION = ("simple", "simple_mlp")
"""The decoder blocks for tests of MaxText itself, which have no attention."""

LAYERS = {name: block.kinds for name, block in BLOCKS.items() if len(block.kinds) > 1 and LINEAR not in block.kinds}
"""The attention types of a block's layers, where they are several: MaxText does not take them from `attention_type`."""


def _option(name: str, default: Any, kind: Kind, meaning: str) -> Option:
    return Option(name, default, kind, meaning, Fate.MAPPED)


MODEL = {
    option.name: option
    for option in (
        _option("model_name", "default", Kind.TEXT, "the types of layers, where the block takes them from it"),
        _option("base_num_decoder_layers", 16, Kind.SIZE, "layers"),
        _option("base_num_query_heads", 16, Kind.SIZE, "q_heads"),
        _option("base_num_kv_heads", 16, Kind.SIZE, "kv_heads"),
        _option("global_parameter_scale", 1, Kind.SIZE, "a power of 2 that multiplies heads and layers"),
        _option("head_dim", 128, Kind.SIZE, "head_dim"),
        _option("global_num_kv_heads", 0, Kind.COUNT, "kv_heads of global layers; 0 is as in others"),
        _option("global_head_dim", 0, Kind.COUNT, "head_dim of global layers; 0 is as in others"),
        _option("qk_nope_head_dim", 128, Kind.SIZE, "head_dim of mla, with qk_rope_head_dim"),
        _option("qk_rope_head_dim", 64, Kind.SIZE, "head_dim of mla, with qk_nope_head_dim"),
        _option("v_head_dim", 128, Kind.SIZE, "value_dim of mla"),
        _option("use_mla_absorbed_mqa", False, Kind.FLAG, "not supported"),
        _option("nope_layer_interval", -1, Kind.INTEGER, "which layers of llama4 are global, without RoPE"),
        _option("inhomogeneous_layer_cycle_interval", 1, Kind.SIZE, "which layers of qwen3_next and qwen3_5 attend"),
        _option("scan_layers", True, Kind.FLAG, "checked: whether the interval before makes the same layers"),
        _option("num_kv_shared_layers", 0, Kind.COUNT, "shared_kv"),
        _option("compress_ratios", [], Kind.LIST, "which layers of deepseek4 are compressed"),
        _option("first_num_hash_layers", 0, Kind.COUNT, "checked, where scan_layers: the layers before the steps"),
        _option("temperature_tuning", False, Kind.FLAG, "a remark"),
        _option("use_multimodal", False, Kind.FLAG, "bidirectional, and a remark"),
        _option("use_audio", False, Kind.FLAG, "a remark"),
        _option("mtp_num_layers", 0, Kind.COUNT, "a remark"),
    )
}
"""The options of base.yml that say how many layers a model has, of which types and sizes."""


def block_of(name: str) -> Block:
    """Returns the decoder block of a name.

    Raises:
      ConfigError: there is none, or its layers have no attention.
    """
    if name in WITHOUT_ATTENTION:
        raise ConfigError(f"MaxText option decoder_block = {name!r}: its layers have no attention.")
    if name not in BLOCKS:
        raise ConfigError(f"MaxText option decoder_block: unknown block {name!r}{nearest(name, BLOCKS)}")
    return BLOCKS[name]
