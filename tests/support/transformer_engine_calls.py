"""What a lowered program asks of transformer_engine's kernels.

    lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
    forward, backward = te_calls(lowered)          # in the program's order
    forward["call"]                                # "te_fused_attn_forward_ffi", or …backward_ffi
    forward["mask_type"], forward["window_size_left"], forward["scaling_factor"], forward["deterministic"]
    forward["operands"]                            # ["2x8x4x16xbf16", …]: query, key, value, bias, sinks, …

Attributes are integers, floats and booleans as in the program; `named(forward)` gives enums' names instead of numbers.
Under a mesh the calls appear when a program is partitioned, not when it is lowered: there the list is empty.
"""

import re
import sys
from typing import Any

import jax

_CALL = re.compile(
    r"custom_call @(te_fused_attn_\w+_ffi)\(.*?mhlo\.backend_config = \{(.*?)\}.*? : \((.*?)\) -> ", re.DOTALL
)
_ATTRIBUTE = re.compile(r"(\w+) = ([^,\s]+)")
_TENSOR = re.compile(r"tensor<([^>]*)>")
_ENUMS = {
    "bias_type": "NVTE_Bias_Type",
    "mask_type": "NVTE_Mask_Type",
    "qkv_layout": "NVTE_QKV_Layout",
    "softmax_type": "NVTE_Softmax_Type",
}


def te_calls(lowered: jax.stages.Lowered) -> list[dict[str, Any]]:
    """The attributes of each call of a fused-attention kernel in a lowered program."""
    return [
        {
            "call": name,
            "operands": _TENSOR.findall(operands),
            **{key: _parsed(value) for key, value in _ATTRIBUTE.findall(attributes)},
        }
        for name, attributes, operands in _CALL.findall(lowered.as_text())
    ]


def named(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with the native module's names: mask_type "NVTE_CAUSAL_MASK" for 2."""
    native = sys.modules["transformer_engine_jax"]
    return call | {key: getattr(native, enum)(call[key]).name for key, enum in _ENUMS.items()}


def _parsed(value: str) -> bool | int | float:
    if value in ("true", "false"):
        return value == "true"
    return float(value) if "." in value else int(value)
