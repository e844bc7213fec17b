"""Which kernels MaxText's options name: a kernel, or rules, and tilings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelry.config.maxtext.options import BLOCKS, SHIPPED_BLOCK, SHIPPED_RAGGED_BLOCK, is_none
from kernelry.errors import ConfigError, nearest
from kernelry.kernel.spec import AUTO
from kernelry.policy.policy import Tilings
from kernelry.policy.rules import Condition, Range, Rule
from kernelry.policy.shipped import FLASH_MIN_Q_LEN
from kernelry.request.request import Mode

_NAMED = {
    "dot_product": "dot_product",
    "cudnn_flash_jax": "cudnn_jax",
    "cudnn_flash_te": "cudnn_te",
}
"""The values of `attention` that are a single kernel, and its name here. It refuses what MaxText ignores."""

_UNREAD_BY_TOKAMAX = ("block_q_dq", "block_kv_dq")
"""Blocks that tokamax's splash accepts and does not read, because its backward pass is a single kernel."""

_LAYOUTS = ("HEAD_DIM_MINOR", "SEQ_MINOR")
"""The vendors' QKVLayout; a tunable has its number, from 1."""

_STEPS = 3
"""Of dq_reduction_steps: the only number of steps that tokamax's backward pass has; 0 is its default."""

_OF_VLLM = ("vllm_rpa", "vllm_batched_rpa")
_FORWARD = (Mode.TRAIN, Mode.PREFILL)
_DECODE = (Mode.DECODE,)
_RAGGED = (("tpu", "ragged"), ("gpu", "pallas_decode"))


def kernel_and_rules(options: Mapping[str, Any]) -> tuple[str, tuple[Rule, ...]]:
    """Returns the kernel, or `auto`, and the rules that the options ask for.

    `flash` and `paged` are several kernels in MaxText, so their rules end in one that serves what the others refuse;
    MaxText ignores windows, soft caps or dropout there.

    Raises:
      ConfigError: `attention` is unknown, or two options name different kernels.
    """
    attention = options["attention"]
    source = f"MaxText: attention = {attention!r}"
    flash = _flash_on_tpu(options)
    rules = _ragged_rules(options)
    if attention == "autoselected":
        return AUTO, (*rules, *_variant_rules(options, flash))
    if attention == "flash":
        return AUTO, (*rules, *_flash_rules(flash, source))
    if attention == "paged":
        return AUTO, (*rules, *_paged_rules(source))
    kernel = _named(attention)
    if attention == "cudnn_flash_jax":
        rules = (*rules, Rule(Condition(platform=("gpu",), mode=_DECODE), ("dot_product",), source=source))
    if not rules:
        return kernel, ()
    return AUTO, (*rules, Rule(Condition(), (kernel,), source=source))


def _named(attention: str) -> str:
    if attention in _OF_VLLM:
        raise ConfigError(
            f"MaxText option attention = {attention!r} is not supported: it is a kernel that vLLM calls itself. "
            "Use 'paged' or 'autoselected'."
        )
    if attention not in _NAMED:
        known = ("autoselected", "flash", "paged", *_NAMED)
        raise ConfigError(f"MaxText option attention: unknown kernel {attention!r}{nearest(attention, known)}")
    return _NAMED[attention]


def _flash_on_tpu(options: Mapping[str, Any]) -> str:
    if options["use_tokamax_splash"] and options["use_jax_splash"]:
        raise ConfigError(
            "MaxText options use_tokamax_splash and use_jax_splash name two kernels for the same calls; set one false."
        )
    if options["use_tokamax_splash"]:
        return "tokamax_splash"
    return "blockwise" if options["use_jax_splash"] else "splash"


def _ragged_rules(options: Mapping[str, Any]) -> tuple[Rule, ...]:
    if not options["use_ragged_attention"]:
        return ()
    source = "MaxText: use_ragged_attention = True"
    return tuple(
        Rule(Condition(platform=(platform,), mode=_DECODE), (kernel, "dot_product"), source=source)
        for platform, kernel in _RAGGED
    )


def _variant_rules(options: Mapping[str, Any], flash: str) -> tuple[Rule, ...]:
    """With `autoselected`, MaxText uses flash on TPU from FLASH_MIN_Q_LEN tokens on; a variant replaces it."""
    if flash == "splash":
        return ()
    name = "use_tokamax_splash" if options["use_tokamax_splash"] else "use_jax_splash"
    when = Condition(platform=("tpu",), mode=_FORWARD, q_len=Range(minimum=FLASH_MIN_Q_LEN.value))
    return (Rule(when, (flash, AUTO), source=f"MaxText: {name} = True"),)


def _flash_rules(flash: str, source: str) -> tuple[Rule, ...]:
    """One rule for decode, which MaxText leaves to dot_product, and one per platform for the rest."""
    on_tpu = tuple(dict.fromkeys((flash, "blockwise")))
    return (
        Rule(Condition(mode=_DECODE), ("dot_product",), source=source),
        Rule(Condition(platform=("tpu",)), on_tpu, source=source),
        Rule(Condition(platform=("gpu",)), ("pallas_mha", "pallas_flash", "blockwise"), source=source),
        Rule(Condition(platform=("cpu",)), ("blockwise",), source=source),
    )


def _paged_rules(source: str) -> tuple[Rule, ...]:
    """The kernel for pages, which MaxText has in decode on TPU; it uses dot_product everywhere else."""
    return (
        Rule(Condition(platform=("tpu",), mode=_DECODE), ("paged", "dot_product"), source=source),
        Rule(Condition(), ("dot_product",), source=source),
    )


def tilings(options: Mapping[str, Any], *, local: bool) -> Tilings:
    """Returns the tunables that differ from base.yml's, by kernel, and all block sizes where one of them differs.

    Block sizes are chosen together: those of base.yml leave the choice to the kernel, whose defaults are predicted for
    the device, and no size of another choice is mixed in where a config has its own.

    Args:
      options: the values.
      local: whether the layer is local_sliding, whose local_sa_* take precedence over sa_*.

    Raises:
      ConfigError: one has a value that no kernel takes.
    """
    tokamax = options["use_tokamax_splash"]
    blocks = {f"block_{name}": _block(options, name, local) for name in BLOCKS}
    read = {name: block for name, block in blocks.items() if not tokamax or name not in _UNREAD_BY_TOKAMAX}
    differ = any(block != SHIPPED_BLOCK for block in read.values())
    found: dict[str, dict[str, int]] = {"tokamax_splash" if tokamax else "splash": read} if differ else {}
    if options["use_jax_splash"] and blocks["block_q"] != SHIPPED_BLOCK:
        found["blockwise"] = {"block_q": blocks["block_q"]}
    for kernel, tiling in _tunables(options, local).items():
        found[kernel] = found.get(kernel, {}) | tiling
    if options["use_ragged_attention"] and options["ragged_block_size"] != SHIPPED_RAGGED_BLOCK:
        found |= {kernel: {"block_kv": options["ragged_block_size"]} for _, kernel in _RAGGED}
    return tuple((kernel, tuple(sorted(tiling.items()))) for kernel, tiling in sorted(found.items()) if tiling)


def _tunables(options: Mapping[str, Any], local: bool) -> dict[str, dict[str, int]]:
    """The other tunables that differ from base.yml's, by kernel."""
    layouts = {f"{array}_layout": _layout(options, array, local) for array in "qkv"}
    changed = {name: layout for name, layout in layouts.items() if layout != _LAYOUTS[0]}
    numbered = {name: 1 + _LAYOUTS.index(layout) for name, layout in changed.items()}
    found = {"tokamax_splash" if options["use_tokamax_splash"] else "splash": numbered}
    if not options["use_tokamax_splash"] and _own(options, "sa_use_fused_bwd_kernel", local):
        found["splash"]["backward_kernels"] = 1
    steps, segments = options["dq_reduction_steps"], options["max_segments_per_seq"]
    if steps not in (0, _STEPS):
        raise ConfigError(f"MaxText option dq_reduction_steps must be 0 or {_STEPS}, got {steps}.")
    if steps:
        found.setdefault("tokamax_splash", {})["dq_reduction_steps"] = steps
    if segments < -1 or segments == 0:
        raise ConfigError(f"MaxText option max_segments_per_seq must be a positive integer, or -1, got {segments}.")
    if segments > 0:
        found["cudnn_te"] = {"max_segments": segments}
    return found


def _layout(options: Mapping[str, Any], array: str, local: bool) -> str:
    name = f"sa_{array}_layout"
    layout: str = _own(options, name, local)
    if layout not in _LAYOUTS:
        raise ConfigError(f"MaxText option {name} must be {' or '.join(_LAYOUTS)}, got {layout!r}.")
    return layout


def _block(options: Mapping[str, Any], name: str, local: bool) -> int:
    return int(_own(options, f"sa_block_{name}", local))


def _own(options: Mapping[str, Any], name: str, local: bool) -> Any:
    """The value of an option, of which local layers may have their own."""
    own = options[f"local_{name}"] if local else None
    return options[name] if is_none(own) else own
