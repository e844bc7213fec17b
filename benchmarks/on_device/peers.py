"""Others' attention, called directly. What a peer has no argument for is not timed: it would compute something else."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp

from on_device.calls import AbsentError, Contender, custom_calls, lowered, one_line
from on_device.shapes import Shape

XLA, CUDNN, MHA = "jax.nn xla", "jax.nn cudnn", "jax pallas mha"
TOKAMAX_MOSAIC, TOKAMAX_TRITON = "tokamax mosaic", "tokamax triton"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """A peer.

    Args:
      name: as reports show it.
      attend: (shape, query, key, value, ids) -> output.
      why_not: why it cannot express a shape; None where it can.
      notes: what it does to express a shape.
      gpu_only: whether it needs an NVIDIA GPU.
      library: the package that has to be installed.
    """

    name: str
    attend: Callable[..., jax.Array]
    why_not: Callable[[Shape], str | None]
    notes: Callable[[Shape], list[str]]
    gpu_only: bool = True
    library: str = "jax"

    def lower(self, shape: Shape, which: str, arrays: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        """Its program, or why there is none."""
        if importlib.util.find_spec(self.library) is None:
            raise AbsentError("not installed", f"{self.library} is not installed")
        if self.gpu_only and jax.default_backend() != "gpu":
            raise AbsentError("not here", f"needs an NVIDIA GPU; this is {jax.default_backend()}")
        if (reason := self.why_not(shape)) is not None:
            raise AbsentError("inexpressible", reason)
        try:
            program = lowered(functools.partial(self.attend, shape), which, arrays)
        except Exception as error:  # each library has its own way to say no
            raise AbsentError("refused", one_line(error)) from error
        return program, {"notes": self.notes(shape), "custom_calls": custom_calls(program)}


def _pairs(ids: jax.Array | None) -> jax.Array | None:
    """Documents as the boolean mask [B, 1, T, S] that takes the place of ids."""
    return None if ids is None else ids[:, None, :, None] == ids[:, None, None, :]


def _arguments(shape: Shape, ids: jax.Array | None) -> dict[str, Any]:
    window = None if shape.window is None else (shape.window - 1, 0)
    return {"mask": _pairs(ids), "is_causal": shape.causal, "local_window_size": window}


def _jax_nn(implementation: Any, shape: Shape, query: Any, key: Any, value: Any, ids: Any) -> jax.Array:
    arguments = _arguments(shape, ids)
    return jax.nn.dot_product_attention(query, key, value, implementation=implementation, **arguments)


def _why_not_jax_nn(shape: Shape) -> str | None:
    if shape.soft_cap is not None:
        return f"soft_cap={shape.soft_cap}: jax.nn.dot_product_attention has no soft cap"
    return None


def _tokamax(implementation: Any, shape: Shape, query: Any, key: Any, value: Any, ids: Any) -> jax.Array:
    """One implementation alone: from several, tokamax silently goes on to the next."""
    import tokamax

    found: jax.Array = tokamax.dot_product_attention(
        query, key, value, logits_soft_cap=shape.soft_cap, implementation=implementation, **_arguments(shape, ids)
    )
    return found


def _mha(shape: Shape, query: Any, key: Any, value: Any, ids: Any) -> jax.Array:
    """JAX's Pallas mha; it reads the wrong heads of grouped keys, so they are repeated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*attention is deprecated", category=DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha
    key, value = (jnp.repeat(array, shape.groups, axis=2) for array in (key, value))
    found: jax.Array = mha(query, key, value, ids, sm_scale=shape.head_dim**-0.5, causal=shape.causal)
    return found


def _why_not_mha(shape: Shape) -> str | None:
    if shape.window is not None:
        return f"window={shape.window}: mha has no window"
    if shape.soft_cap is not None:
        return f"soft_cap={shape.soft_cap}: mha has no soft cap"
    if shape.out_dim != shape.head_dim:
        return f"H={shape.head_dim} D={shape.out_dim}: mha needs H = D"
    if shape.q_len < 16:
        return f"T={shape.q_len}: mha's products need 16 queries"
    return None


def _dense_documents(shape: Shape) -> list[str]:
    return [] if shape.documents is None else ["documents as a dense boolean mask"]


def _repeats(shape: Shape) -> list[str]:
    return [] if shape.groups == 1 else [f"keys and values are repeated {shape.groups} times inside the call"]


def _expresses_all(_: Shape) -> str | None:
    return None


PEERS = (
    Peer(XLA, functools.partial(_jax_nn, "xla"), _why_not_jax_nn, _dense_documents, gpu_only=False),
    Peer(CUDNN, functools.partial(_jax_nn, "cudnn"), _why_not_jax_nn, _dense_documents),
    Peer(MHA, _mha, _why_not_mha, _repeats),
    Peer(TOKAMAX_MOSAIC, functools.partial(_tokamax, "mosaic"), _expresses_all, _dense_documents, library="tokamax"),
    Peer(TOKAMAX_TRITON, functools.partial(_tokamax, "triton"), _expresses_all, _dense_documents, library="tokamax"),
)


def contenders() -> list[Contender]:
    return [Contender(peer.name, "peer", peer.lower) for peer in PEERS]
