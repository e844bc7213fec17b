"""Asks transformer-engine whether cuDNN serves a call; it alone knows, at run time."""

from __future__ import annotations

import dataclasses
from typing import Any, final

from kernelry.plugin import Request
from kernelry_cudnn_te.cudnn_te.settings import SEGMENTS, TeSettings


def why_not_here() -> str | None:
    """Returns what this process lacks to load transformer-engine; imports it."""
    import jax

    try:
        jax.devices("cuda")
    except RuntimeError:
        return "JAX sees no CUDA device"
    try:
        from kernelry_cudnn_te.cudnn_te import _vendor  # noqa: F401
    except (ImportError, FileNotFoundError, RuntimeError, AssertionError) as error:  # a part of it is missing
        return f"transformer-engine cannot be imported: {error}"
    except OSError as error:
        return f"transformer-engine cannot be loaded ({error}): no NVIDIA driver or CUDA library"
    return None


@final
@dataclasses.dataclass(frozen=True)
class Asked:
    """The question, by value: each is put once per process."""

    settings: TeSettings
    request: Request

    @classmethod
    def of(cls, request: Request) -> Asked:
        """The question of a request."""
        return cls(TeSettings.of(request), request)

    @property
    def __name__(self) -> str:
        return "is_fused_attn_kernel_available"

    def __call__(self) -> str | None:
        """Returns transformer-engine's reason for having no kernel, None where it has one."""
        from kernelry_cudnn_te.cudnn_te import _vendor

        try:
            message = _vendor.why_declined(**self.keywords())
        except (RuntimeError, OSError) as error:
            return f"transformer-engine cannot say whether cuDNN has a kernel: {error}"
        if message is None:
            return None
        return f"transformer-engine {_vendor.VERSION} has no cuDNN kernel for this call: {message or 'no reason given'}"

    def keywords(self) -> dict[str, Any]:
        """All that some release asks for, by the name it has there."""
        from kernelry_cudnn_te.cudnn_te import _vendor
        from kernelry_cudnn_te.cudnn_te.largest import request_of_heads

        request = request_of_heads(self.request) if self.request.max_logits else self.request
        segments = min(SEGMENTS, request.q_len) if self.settings.packed else 1
        bias = (None,) * 4 if request.bias is None else (*request.bias[:2], request.q_len, request.kv_len)
        return {
            **_vendor.static_arguments(self.settings, request, segments),
            "batch_size": request.batch,
            "q_dtype": request.dtype,
            "kv_dtype": request.dtype,
            "q_num_heads": request.q_heads,
            "kv_num_heads": request.kv_heads,
            "q_max_seqlen": request.q_len,
            "kv_max_seqlen": request.kv_len,
            "head_dim_qk": request.head_dim,
            "head_dim_v": request.value_dim,
            "bottom_right_diagonal": self.settings.bottom_right,
            "attn_scale": request.scale,
            **dict(zip(("bias_batch", "bias_heads", "bias_seqlen_q", "bias_seqlen_kv"), bias, strict=True)),
        }
