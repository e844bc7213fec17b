"""MaxText's models: the kinds of layers that its decoder blocks build from base.yml and a model's yml."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from kernelry.config.layer import AttentionConfig
from kernelry.config.loading import maxtext_options
from kernelry.config.maxtext.blocks import (
    BLOCK_DIFFUSION,
    CHUNK,
    COMPRESSED,
    GLOBAL,
    LINEAR,
    LOCAL,
    MLA,
    MODEL,
    Block,
    block_of,
)
from kernelry.config.maxtext.options import OPTIONS, SIZES
from kernelry.config.maxtext.reading import (
    Caller,
    built,
    check_value,
    checked,
    checked_names,
    misspelt,
    not_attention,
    plain,
)
from kernelry.errors import ConfigError
from kernelry.models.model import MOST_LAYERS, LayerKind, Model, OtherLayers

_FACTS = "MaxText 0.2.5"

_NAMES = {GLOBAL: "full", MLA: "full", LOCAL: "sliding", CHUNK: "chunked", BLOCK_DIFFUSION: "block_diffusion"}
"""The kind of layers of each attention type."""

_OTHERS = {
    LINEAR: ("linear_attention", "a gated delta net, which is a recurrence over the tokens and not attention"),
    COMPRESSED: (
        "compressed_attention",
        "its keys and values are those of a window and others that were compressed before; compress them before the "
        "call, and pass what each query sees as a mask, with a config of type 'full'",
    ),
}
_SCALED = (
    "scale is 1.0: MaxText scales queries before attention, in their weights, by query_pre_attn_scalar or by mscale"
)
_INDEXER = "use_indexer: the indexer's choice of keys is a mask of the call, & kernelry.masks.Dense(chosen)"
_TUNED = "temperature_tuning: queries are scaled by their positions before the call"
_ATTENTION = {option.name: option.default for option in OPTIONS}


def from_maxtext_model(
    base: str | Path | Mapping[str, Any], model_yml: str | Path | Mapping[str, Any], *, ignore: Iterable[str] = ()
) -> Model:
    """Describes the layers of a model of MaxText: their masks, soft caps, sinks, heads and head dims.

    MaxText takes the types of the layers from the code of its decoder blocks, and their sizes from its options. All
    options about attention are read as `kernelry.config.from_maxtext` reads them, so each kind has the kernels, tilings
    and sharding of the options as well. `attention_type` is read by the decoder blocks deepseek and deepseek4, which
    need `mla` and `compressed`, and is else only read where it is `block_diffusion`; a warning names it, and other
    options that are set and that the block does not read.

    MaxText scales queries before attention, so `scale` is 1.0 in every kind. A layer of gemma2 has two attentions, and
    its layers are counted here: number i is in MaxText's layer i // 2.

    Args:
      base: base.yml, as a path or as a mapping of option names to values.
      model_yml: the model's file, e.g. configs/models/gemma3-27b.yml, or a mapping, over base.yml; of
        logical_axis_rules as in `load_maxtext`. Where `model_name` is not set, the name of the file is the model's.
      ignore: names of options to leave out, as if they were not set.

    Returns:
      The model; its `model_type` is the decoder block.

    Raises:
      ConfigError: a file cannot be read, a value is not valid, options contradict each other, or MaxText would build
        what cannot be described.

    Source: MaxText 0.2.5, models/*.py.
    """
    for source in (base, model_yml):
        if not isinstance(source, str | Path | Mapping):
            raise ConfigError(
                f"from_maxtext_model takes paths or mappings, got {type(source).__name__}; of a config of MaxText, "
                "pass config.get_keys() as base and {} as model_yml."
            )
    return read_maxtext_model((base, model_yml), ignore, Caller.PYTHON, stacklevel=3)


def read_maxtext_model(
    sources: Sequence[str | Path | Mapping[str, Any]], ignore: Iterable[str], caller: Caller, *, stacklevel: int = 2
) -> Model:
    """Does what `from_maxtext_model` does, of any number of sources, with messages for Python or for the command."""
    names, options = maxtext_options(sources)
    file_name = None if isinstance(sources[-1], Mapping) else Path(sources[-1]).stem
    try:
        question = _Question.of(options, ignore, names, file_name, caller)
        model = question.model()
    except ConfigError as error:
        raise ConfigError(f"{names}: {error}") from error
    for notice in question.notices():
        warnings.warn(f"{names}: {notice}", stacklevel=stacklevel)
    return model


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Question:
    """The options of a model, checked.

    Args:
      attention: the value of every option about attention.
      sizes: the value of every option in MODEL.
      given: the names of those that are set.
      unread: notices of options that are unknown or without effect anywhere.
      name, block: of the decoder block.
      source: where the options were read.
      vision: whether an option names a vision encoder.
      caller: who reads the messages.
    """

    attention: Mapping[str, Any]
    sizes: Mapping[str, Any]
    given: frozenset[str]
    unread: tuple[str, ...]
    name: str
    block: Block
    source: str
    vision: bool
    caller: Caller

    @classmethod
    def of(
        cls, options: Mapping[str, Any], ignore: Iterable[str], source: str, file_name: str | None, caller: Caller
    ) -> _Question:
        dropped = checked_names(ignore)
        kept = {name: plain(value) for name, value in options.items() if name not in dropped}
        _check_spelling(kept, caller)
        attention, given, unread = checked(kept, (), caller)
        for name in MODEL.keys() & kept.keys():
            check_value(MODEL[name], kept[name], caller)
        sizes = {name: kept.get(name, option.default) for name, option in MODEL.items()}
        if sizes["model_name"] == "default" and file_name is not None:
            sizes["model_name"] = file_name
        block = block_of(attention["decoder_block"])
        vision = kept.get("vision_encoder_block") not in (None, "None", "none", "")
        names = frozenset(given) | (MODEL.keys() & kept.keys())
        return cls(attention, sizes, names, unread, attention["decoder_block"], block, source, vision, caller)

    def model(self) -> Model:
        """Returns the description of all layers."""
        self._check_type()
        self._check_scan()
        layers: dict[str, list[int]] = {}
        for layer, type_ in enumerate(self._types()):
            layers.setdefault(type_, []).append(layer)
        donors = self._donors(layers)
        attending = [type_ for type_ in layers if type_ not in _OTHERS]
        return Model(
            model_type=self.name,
            kinds=tuple(self._kind(type_, tuple(layers[type_]), donors) for type_ in attending),
            others=tuple(
                OtherLayers(name, tuple(layers[type_]), why)
                for type_, (name, why) in _OTHERS.items()
                if type_ in layers
            ),
            source=self.source,
            facts=_FACTS,
            remarks=(_SCALED, *self._remarks()),
        )

    def _check_type(self) -> None:
        given, needed = self.attention["attention_type"], self.block.attention_type
        if needed is not None and given != needed:
            raise ConfigError(
                f"MaxText option attention_type = {given!r}: decoder_block {self.name!r} needs {needed!r}."
            )
        if given == MLA and needed is None:
            raise ConfigError(
                f"MaxText option attention_type = 'mla': decoder_block {self.name!r} has no latent attention, only "
                "'deepseek' has; leave it at 'global'."
            )
        if self.sizes["use_mla_absorbed_mqa"]:
            raise ConfigError(
                "MaxText option use_mla_absorbed_mqa = True is not supported: queries then meet the compressed keys. "
                "Set it to false: the layers attend alike."
            )

    def _check_scan(self) -> None:
        """Checks that steps of `cycle` layers, all alike, are the layers of the block."""
        block, cycle = self.block, self.sizes["inhomogeneous_layer_cycle_interval"]
        if block.cycles is None or not self.sizes["scan_layers"]:
            return
        count = self.sizes["base_num_decoder_layers"] * 2 ** self._doublings()[1]
        period = self.sizes[block.interval] if block.interval else len(block.types)
        period = max(period, 1) if block.cycles else 1
        if cycle % period or count % cycle or not (block.cycles or cycle == 1):
            expected = f"a multiple of {period} that divides {count}" if block.cycles else "1"
            raise ConfigError(
                f"MaxText options scan_layers = True and inhomogeneous_layer_cycle_interval = {cycle}: MaxText would "
                f"build {count // cycle} times the same step, and these are not the {count} layers of decoder_block "
                f"{self.name!r}. The interval must be {expected}; or set scan_layers to false."
            )

    def _types(self) -> list[str]:
        """The attention type of every layer."""
        block, sizes = self.block, self.sizes
        _, doublings = self._doublings()
        count = sizes["base_num_decoder_layers"] * 2**doublings * block.attentions
        if count > MOST_LAYERS:
            raise ConfigError(
                f"MaxText option base_num_decoder_layers = {sizes['base_num_decoder_layers']}: at most {MOST_LAYERS} "
                f"layers of attention are described, and these are {count}."
            )
        if block.ratios:
            return [block.types[ratio > 0] for ratio in self._ratios(count)]
        if block.interval:
            interval = sizes[block.interval]
            last = [interval > 0 and (layer + 1) % interval == 0 for layer in range(count)]
            found = [block.types[is_last] for is_last in last]
        else:
            types = self._repeated()
            found = [types[layer % len(types)] for layer in range(count)]
        if self.attention["attention_type"] == BLOCK_DIFFUSION:
            return [BLOCK_DIFFUSION if type_ == GLOBAL else type_ for type_ in found]
        return found

    def _repeated(self) -> tuple[str, ...]:
        if not self.block.of_model:
            return self.block.types
        name, known = self.sizes["model_name"], dict(self.block.of_model)
        if name not in known:
            raise ConfigError(
                f"MaxText option model_name = {name!r}: the layers of decoder_block {self.name!r} depend on it; set it "
                f"to {' or '.join(map(repr, known))}, or pass the path of a file of that name as model_yml."
            )
        return known[name]

    def _ratios(self, count: int) -> list[int]:
        name, sizes = self.block.ratios, self.sizes
        ratios = sizes[name]
        if not all(type(ratio) is int and (ratio == 0 or ratio >= 4) for ratio in ratios):
            raise ConfigError(f"MaxText option {name} must be integers, each 0, or 4 or more, got {ratios!r}.")
        if len(ratios) < count:
            raise ConfigError(f"MaxText option {name} has {len(ratios)} numbers for {count} layers.")
        scanned = list(ratios[sizes["first_num_hash_layers"] : count])
        if sizes["scan_layers"] and scanned != [128, 4] * (len(scanned) // 2):
            raise ConfigError(
                f"MaxText option scan_layers = True: after first_num_hash_layers = {sizes['first_num_hash_layers']}, "
                f"MaxText builds layers with {name} 128 and 4 by turns, got {scanned}; set scan_layers to false."
            )
        return list(ratios[:count])

    def _doublings(self) -> tuple[int, int]:
        """How often global_parameter_scale doubles the heads, and the layers."""
        scale: int = self.sizes["global_parameter_scale"]
        if scale & (scale - 1):
            raise ConfigError(f"MaxText option global_parameter_scale must be a power of 2, got {scale}.")
        layers, rest = divmod(scale.bit_length() - 1, 3)
        return layers + (rest > 0), layers

    def _donors(self, layers: Mapping[str, list[int]]) -> dict[int, int]:
        """The layer whose keys and values each of the last num_kv_shared_layers reads: the last of its type before."""
        count = sum(map(len, layers.values()))
        shared = self.sizes["num_kv_shared_layers"] if self.block.shares else 0
        shared = shared if shared < count else 0  # as in MaxText
        first = count - shared
        donors: dict[int, int] = {}
        for type_, numbers in layers.items():
            own = [layer for layer in numbers if layer < first]
            if len(own) < len(numbers) and not own:
                raise ConfigError(
                    f"MaxText option num_kv_shared_layers = {shared}: of {count} layers, none of type {type_!r} has "
                    "keys and values that the others of the type could read."
                )
            donors |= {layer: own[-1] for layer in numbers if layer >= first}
        return donors

    def _kind(self, type_: str, layers: tuple[int, ...], donors: Mapping[int, int]) -> LayerKind:
        of_block = GLOBAL if type_ == BLOCK_DIFFUSION else type_
        image = self.sizes["use_multimodal"] and of_block in self.block.bidirectional
        rope = of_block not in self.block.without_rope
        remarks = [_INDEXER] if type_ == MLA and self.attention["use_indexer"] else []
        if not rope and self.sizes["temperature_tuning"] and self.block.interval:
            remarks.append(_TUNED)
        return LayerKind(
            name=_NAMES[type_],
            layers=layers,
            config=self._config(type_),
            rope=rope,
            shared_kv=tuple((layer, donors[layer]) for layer in layers if layer in donors),
            bidirectional="image" if image else None,
            remarks=tuple(remarks),
        )

    def _config(self, type_: str) -> AttentionConfig:
        values = {**self.attention, "attention_type": type_}
        config = built(values, self.given)
        q_heads, kv_heads, head_dim, value_dim = self._heads(type_)
        return dataclasses.replace(
            config,
            source=self.source,
            soft_cap=config.soft_cap if self.block.soft_cap else None,
            sinks=config.sinks if self.block.sinks is None else self.block.sinks,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
        )

    def _heads(self, type_: str) -> tuple[int, int, int, int]:
        """Heads of queries and of keys, and the head dims of keys and of values."""
        sizes = self.sizes
        factor = 2 ** self._doublings()[0]
        q_heads, kv_heads = (factor * sizes[f"base_num_{array}_heads"] for array in ("query", "kv"))
        head_dim = value_dim = sizes["head_dim"]
        if self.block.global_sizes and type_ in (GLOBAL, BLOCK_DIFFUSION):
            kv_heads = sizes["global_num_kv_heads"] or kv_heads
            head_dim = value_dim = sizes["global_head_dim"] or head_dim
        if type_ == MLA:
            head_dim, value_dim = sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"], sizes["v_head_dim"]
        needed = {"any": kv_heads, "all": q_heads, "one": 1}[self.block.kv_heads]
        if kv_heads != needed:
            raise ConfigError(
                f"MaxText option base_num_kv_heads = {sizes['base_num_kv_heads']}: with decoder_block {self.name!r} "
                f"and {q_heads} heads of queries, {needed} heads of keys and values are needed, and not {kv_heads}."
            )
        if q_heads % kv_heads:
            raise ConfigError(
                f"MaxText options: {kv_heads} heads of keys (base_num_kv_heads, global_num_kv_heads) must divide "
                f"{q_heads} heads of queries (base_num_query_heads)."
            )
        return q_heads, kv_heads, head_dim, value_dim

    def _remarks(self) -> Iterator[str]:
        if self.block.attentions > 1:
            each = self.block.attentions
            yield f"each of MaxText's layers has {each} layers of attention: number i is in its layer i // {each}"
        if self.vision or self.sizes["use_multimodal"]:
            yield "the vision encoder is not described"
        if self.sizes["use_audio"]:
            yield "the audio encoder is not described"
        if self.sizes["mtp_num_layers"]:
            yield "the layers of multi-token prediction are not described"

    def notices(self) -> Iterator[str]:
        """Yields notices of options that are set, and that no layer of the block reads."""
        yield from self.unread
        unused = [name for name in self._unused() if name in self.given]
        if unused:
            listed = " and ".join(f"{name} = {({**self.attention, **self.sizes})[name]!r}" for name in unused)
            yield (
                f"MaxText: {listed} {'is' if len(unused) == 1 else 'are'} not used: the layers of decoder_block "
                f"{self.name!r}, which are {' and '.join(dict.fromkeys(self._types()))}, do not read "
                f"{'it' if len(unused) == 1 else 'them'}. If that is right for this model, pass "
                f"{self.caller.ignoring(unused)}."
            )

    def _unused(self) -> Iterator[str]:
        block, options, sizes = self.block, self.attention, self.sizes
        layers = self._types()
        types = set(layers)
        if options["attention_type"] not in (*types, *block.kinds, GLOBAL, block.attention_type):
            yield "attention_type"
        for type_, name in SIZES.items():
            if type_ not in (*types, *block.kinds) and options[name] not in (0, _ATTENTION[name]):
                yield name
        if options["attn_logits_soft_cap"] not in (None, "None", 0) and not block.soft_cap:
            yield "attn_logits_soft_cap"
        if options["attention_sink"] and block.sinks is False:
            yield "attention_sink"
        if sizes["nope_layer_interval"] > 0 and block.interval != "nope_layer_interval":
            yield "nope_layer_interval"
        if sizes["num_kv_shared_layers"] >= (len(layers) if block.shares else 1):
            yield "num_kv_shared_layers"
        yield from (
            name for name in ("global_num_kv_heads", "global_head_dim") if sizes[name] and not block.global_sizes
        )


def _check_spelling(options: Mapping[str, Any], caller: Caller) -> None:
    known = {*MODEL, *_ATTENTION, *not_attention()}
    unknown = [name for name in options if name not in known]
    meant = {name: option for name in unknown if (option := misspelt(str(name), MODEL)) is not None}
    if meant:
        described = " ".join(
            f"Unknown MaxText option {name!r}; did you mean {option!r}?" for name, option in meant.items()
        )
        raise ConfigError(f"{described} If it is not about layers, pass {caller.ignoring(meant)}.")
