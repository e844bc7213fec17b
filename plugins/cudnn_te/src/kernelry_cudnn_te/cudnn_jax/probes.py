"""What is looked up on this machine, once per process, when `cudnn_jax` is about to be chosen.

The questions import JAX's cuDNN module; importing this file does not.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.plugin import Environment, Refusal, RefusalCode

UPGRADE = "pip install --upgrade nvidia-cudnn-cu12 (or -cu13)"

_INSTALL = 'pip install "jax[cuda12]" (or "jax[cuda13]")'
_CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")

_TWO_HEAD_DIMS_SINCE = 91000
"""cuDNN 9.10: JAX's check_is_flash_attention."""

_BIAS_IN_A_WINDOW_SINCE = 91002
"""cuDNN 9.10.2: cuDNN frontend's check of left bounds with a bias."""

_B300_SINCE = 91100
"""cuDNN 9.11, on compute capability 10.3: JAX's check_is_flash_attention."""


def refusals(environment: Environment) -> Iterator[Refusal]:
    """What this process lacks to run cuDNN attention at all."""
    reason = environment.probe(why_no_device)
    if reason is not None:
        yield _without_device(reason, environment)
        return
    reason = environment.probe(why_no_cudnn)
    if reason is not None:
        yield Refusal(RefusalCode.VENDOR_MISSING, reason, f"{_INSTALL}, which brings it")
    reason = environment.probe(why_not_on_this_device)
    if reason is not None:
        yield Refusal(RefusalCode.VENDOR_VERSION, reason, UPGRADE)


def _without_device(reason: str, environment: Environment) -> Refusal:
    if all(environment.vendor(plugin).missing for plugin in _CUDA_PLUGINS):
        detail = f"{reason}: neither {' nor '.join(_CUDA_PLUGINS)} is installed"
        return Refusal(RefusalCode.VENDOR_MISSING, detail, _INSTALL)
    remedy = "run where nvidia-smi lists a GPU, and look at JAX_PLATFORMS and CUDA_VISIBLE_DEVICES"
    return Refusal(RefusalCode.DRIVER, reason, remedy)


def why_no_device() -> str | None:
    """Says that JAX sees no GPU."""
    from kernelry_cudnn_te.cudnn_jax import _vendor

    return None if _vendor.sees_device() else "JAX sees no CUDA device"


def why_no_cudnn() -> str | None:
    """Says that JAX finds no cuDNN."""
    return "JAX finds no cuDNN" if _version() is None else None


def why_not_on_this_device() -> str | None:
    """Names a cuDNN that is too old for this machine's device."""
    from kernelry_cudnn_te.cudnn_jax import _vendor

    return _older_than(_B300_SINCE, "on compute capability 10.3") if _vendor.is_capability("10.3") else None


def why_no_two_head_dims() -> str | None:
    """Names a cuDNN that is too old for H ≠ D."""
    return _older_than(_TWO_HEAD_DIMS_SINCE)


def why_no_bias_in_a_window() -> str | None:
    """Names a cuDNN that is too old for a bias with a window."""
    return _older_than(_BIAS_IN_A_WINDOW_SINCE)


def _older_than(since: int, where: str = "") -> str | None:
    version = _version()
    if version is None or version >= since:
        return None
    return f"cuDNN {_shown(version)} < {_shown(since)} {where}".rstrip()


def _shown(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _version() -> int | None:
    from kernelry_cudnn_te.cudnn_jax import _vendor

    return _vendor.cudnn_version()
