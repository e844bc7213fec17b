"""The shape of a config's attention table, for pydantic and for editors; imported only when one of them asks.

What pydantic checks is said by types. The options of the layer are Any to it: AttentionConfig checks them, with better
messages. What editors are told of them is written next to them, as a JSON schema.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema

from kernelry.config.layer import AttentionType
from kernelry.execution.adapters.order import ADAPTERS
from kernelry.kernel.spec import AUTO
from kernelry.masks.form import AtomKind
from kernelry.policy.rules import FULL
from kernelry.policy.shipped import SHIPPED_THRESHOLDS
from kernelry.registry import installed
from kernelry.request.checks import DTYPES
from kernelry.request.request import Mode
from kernelry.request.sharding import STRATEGIES, TOKEN_ORDERS
from kernelry.request.target import KINDS, PLATFORMS

Told = dict[str, JsonValue]
"""A JSON schema."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _any_of(*schemas: Told) -> Told:
    return {"anyOf": list(schemas)}


def _words(*names: str) -> Told:
    return {"type": "string", "enum": list(names)}


def _or_null(schema: Told) -> Told:
    """What may be absent may be YAML's null, too."""
    return _any_of(schema, {"type": "null"})


def _or_listed(name: Told) -> Told:
    return _any_of(name, {"type": "array", "items": name})


def _suggested(*names: str) -> Told:
    """Any name; editors offer these."""
    return _any_of(_words(*names), {"type": "string", "minLength": 1})


def _table(properties: Told, **more: JsonValue) -> Told:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Count = Annotated[int, Field(strict=True, ge=1)]
Threshold = Annotated[int, Field(strict=True, ge=0)]

_SIZE: Told = {"type": "integer", "minimum": 1}
_LENGTH: Told = {"type": "integer", "minimum": 0}
_RANGE = _any_of(
    _LENGTH, {"type": "string", "pattern": r"^\s*((>=|>|<=|<)?\s*\d+|\d+\s*\.\.\s*\d+)\s*$", "examples": [">=1024"]}
)
_RANGES = _any_of(_RANGE, {"type": "array", "items": _RANGE, "minItems": 1}, {"type": "null"})
_READ = "128, >=1024, <64 or 128..1024"
_SIDES: Told = {"type": "array", "items": _LENGTH, "minItems": 2, "maxItems": 2}
_NUMBER: Told = {"type": "number"}
_BOOLEAN: Told = {"type": "boolean"}
_AXES = _any_of({"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"})
_PRECISIONS = ("default", "high", "highest", "bfloat16", "bfloat16_3x", "tensorfloat32", "float32", "fastest")
_THRESHOLDS: Told = {
    each.name: {**_LENGTH, "default": each.value, "description": f"{each.unit[0].upper()}{each.unit[1:]}."}
    for each in SHIPPED_THRESHOLDS
}
_SHARDING = _table(
    {
        "batch": _AXES | {"description": "The mesh axes that cut the batch."},
        "heads": _AXES | {"description": "The mesh axes that cut the heads."},
        "sequence": _AXES | {"description": "The mesh axes that cut the queries' tokens, and the keys' unless told."},
        "kv_sequence": _AXES | {"description": "The mesh axes that cut the keys' tokens; [] leaves them whole."},
        "ulysses": _AXES | {"description": "With strategy usp: the last of the axes of sequence."},
        "strategy": _words(*STRATEGIES) | {"description": "How queries meet the keys of other devices."},
        "order": _words(*TOKEN_ORDERS, "auto", "dual") | {"description": "Where the tokens stand."},
        "sizes": {
            "type": "object",
            "additionalProperties": _SIZE,
            "description": "The sizes of these axes, where no mesh tells them.",
        },
    }
)


def _said(schema: Told, description: str) -> Any:
    """What editors are told of a key whose value is checked elsewhere."""
    return WithJsonSchema({**schema, "description": description})


def _kernel_name() -> Told:
    """Any kernel's name; editors offer those that are installed here."""
    return _suggested(AUTO, *installed.registry().kernels)


def _kernel(told: Told) -> None:
    told.pop("type", None)
    told |= _kernel_name()


def _kernels(told: Told) -> None:
    name = _kernel_name()
    for key in ("type", "items"):
        told.pop(key, None)
    told |= _any_of(name, {"type": "array", "items": name, "minItems": 1})


def _without_default(told: Told) -> None:
    told.pop("default", None)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class WhenTable(_Table):
    """When a rule applies: all that is named here must hold; `AnyRange.parse` reads the numbers."""

    platform: Annotated[Names, _said(_or_listed(_words(*PLATFORMS)), "Any of these platforms.")] = ()
    kind: Annotated[
        Names, _said(_or_listed(_suggested(*KINDS)), "Any of these devices; a glob such as v5* names several.")
    ] = ()
    mode: Annotated[
        Names, _said(_or_listed(_words(*(mode.value for mode in Mode), "autoregressive")), "Any of these modes.")
    ] = ()
    q_len: Annotated[Any, _said(_RANGES, f"Query tokens T: {_READ}.")] = None
    kv_len: Annotated[Any, _said(_RANGES, f"Key tokens S: {_READ}.")] = None
    batch: Annotated[Any, _said(_RANGES, f"Sequences of the batch, B: {_READ}.")] = None
    groups: Annotated[Any, _said(_RANGES, f"Query heads of a key/value head, G = N // K: {_READ}.")] = None
    head_dim: Annotated[Any, _said(_RANGES, f"Head dim H of queries and keys: {_READ}.")] = None
    dtype: Annotated[Names, _said(_or_listed(_words(*DTYPES)), "Any of these dtypes of the arrays.")] = ()
    mask: Annotated[
        Names,
        _said(
            _or_listed(_words(FULL, *(kind.value for kind in AtomKind))),
            "The mask has all of these parts; full means that it hides nothing.",
        ),
    ] = ()


class RuleTable(_Table):
    """One rule: when a condition holds, use these kernels."""

    when: Annotated[
        WhenTable,
        Field(description="The condition; without one the rule always applies.", json_schema_extra=_without_default),
    ] = WhenTable()
    use: Annotated[
        Names,
        Field(
            description="Kernels, best first: no other one is chosen unless the last is auto.",
            json_schema_extra=_kernels,
        ),
    ]
    tiling: Annotated[dict[str, Count], Field(description="Block sizes of these kernels, by tunable.")] = Field(
        default_factory=dict
    )


class MoBATable(_Table):
    """Mixture of block attention."""

    chunk_size: Annotated[Count, Field(description="Keys of one block.")]
    top_k: Annotated[Count, Field(description="Blocks that a query sees, its own included.")]


class AttentionTable(_Table):
    """The attention of a layer, and how its kernels are chosen."""

    kernel: Annotated[str, Field(description="The only kernel to use, or auto.", json_schema_extra=_kernel)] = AUTO
    rules: Annotated[tuple[RuleTable, ...], Field(description="The first that applies decides.")] = ()
    thresholds: Annotated[
        dict[str, Threshold],
        _said(_table(_THRESHOLDS), "Numbers at which the shipped policy takes another kernel."),
    ] = Field(default_factory=dict)
    forbid_adapters: Annotated[
        tuple[str, ...],
        _said({"type": "array", "items": _words(*(adapter.name for adapter in ADAPTERS))}, "Adapters not to be used."),
    ] = ()
    type: Annotated[
        Any, _said(_words(*(each.value for each in AttentionType)), "Which keys a query sees, by position.")
    ] = AttentionType.GLOBAL.value
    window: Annotated[
        Any,
        _said(
            _any_of(_SIZE, _SIDES, {"type": "null"}),
            "Of type local_sliding: keys that a query sees, its own included; or [left, right], the keys before and "
            "after its own.",
        ),
    ] = None
    chunk_size: Annotated[Any, _said(_or_null(_SIZE), "Of type chunk: keys of one chunk.")] = None
    block_size: Annotated[Any, _said(_or_null(_SIZE), "Of type block_diffusion: tokens of one block.")] = None
    soft_cap: Annotated[
        Any,
        _said(_or_null({**_NUMBER, "exclusiveMinimum": 0}), "Logits become soft_cap · tanh(logits / soft_cap)."),
    ] = None
    scale: Annotated[Any, _said(_or_null(_NUMBER), "Of the logits; by default head_dim ** -0.5.")] = None
    sinks: Annotated[Any, _said(_BOOLEAN, "Whether there is one sink logit per query head.")] = False
    bias: Annotated[Any, _said(_BOOLEAN, "Whether calls add a bias to the logits, such as ALiBi.")] = False
    bias_after_cap: Annotated[Any, _said(_BOOLEAN, "Whether the bias is added after the soft cap.")] = False
    q_heads: Annotated[Any, _said(_or_null(_SIZE), "Query heads N.")] = None
    kv_heads: Annotated[Any, _said(_or_null(_SIZE), "Key/value heads K, which divide q_heads.")] = None
    head_dim: Annotated[Any, _said(_or_null(_SIZE), "Head dim H of queries and keys.")] = None
    value_dim: Annotated[Any, _said(_or_null(_SIZE), "Head dim D of values; by default head_dim.")] = None
    moba: Annotated[
        MoBATable | None, Field(description="Mixture of block attention: each query sees the best blocks of keys.")
    ] = None
    record_max_logits: Annotated[Any, _said(_BOOLEAN, "Whether calls return the largest logits, for QK-clip.")] = False
    dropout_rate: Annotated[
        Any, _said({**_NUMBER, "minimum": 0, "exclusiveMaximum": 1}, "Of the probabilities, in training.")
    ] = 0.0
    logits_dtype: Annotated[Any, _said(_words(*DTYPES), "Of logits, softmax and statistics.")] = "float32"
    precision: Annotated[Any, _said(_or_null(_words(*_PRECISIONS)), "Of matrix products, as JAX names it.")] = None
    tilings: Annotated[
        dict[str, dict[str, Count]],
        Field(description="Block sizes by kernel and tunable, where that kernel is chosen."),
    ] = Field(default_factory=dict)
    sharding: Annotated[
        Any,
        _said(
            _any_of({"type": "string", "examples": ["batch=data sequence=context ring"]}, _SHARDING, {"type": "null"}),
            "Which axes of a mesh cut the calls: a table, or a text such as batch=data sequence=context ring.",
        ),
    ] = None


KEYS = {
    "attention": tuple(AttentionTable.model_fields),
    "rules": tuple(RuleTable.model_fields),
    "moba": tuple(MoBATable.model_fields),
    "when": tuple(WhenTable.model_fields),
}
