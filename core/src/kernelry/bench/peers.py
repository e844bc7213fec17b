"""Attention that JAX itself has, called directly.

What it has no argument for is not timed: it would compute something else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp

from kernelry.bench.cases import Case
from kernelry.masks.band import Causal, Full, SlidingWindow
from kernelry.masks.base import Mask
from kernelry.request.request import NEUTRAL, Request

_IMPLEMENTATIONS = ("xla", "cudnn")
_NO_ARGUMENT = (
    *("soft_cap", "sinks", "dropout_rate", "normalization", "logits_dtype", "precision"),
    *("partial", "max_logits"),
)
"""Fields of a request that `jax.nn.dot_product_attention` has no argument for."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """An implementation of `jax.nn.dot_product_attention`.

    Args:
      implementation: as that function names it.
    """

    implementation: str

    @property
    def name(self) -> str:
        """For display."""
        return f"jax.nn {self.implementation}"

    def why_not(self, request: Request) -> str | None:
        """Why it cannot compute a request; None where it can."""
        if self.implementation == "cudnn" and request.target.platform != "gpu":
            return f"needs an NVIDIA GPU; this is {request.target.platform}"
        for name in _NO_ARGUMENT:
            if (value := getattr(request, name)) != NEUTRAL[name]:
                return f"{name}={value}: jax.nn.dot_product_attention has no such argument"
        if not request.has_plain_kv:
            return "keys and values that are not an array each"
        return None

    def note(self, mask: Mask) -> str:
        """What it does to express a mask."""
        return "" if _words_for(mask) is not None else "the mask as booleans"

    def attention_of(self, case: Case) -> Callable[..., Any]:
        """Attention as a function of the arguments of a case, as `kernelry.aot.layers.attention_of`."""
        request, structure = case.request, jax.tree.structure(case.call.mask)
        attend = functools.partial(
            jax.nn.dot_product_attention, implementation=self.implementation, scale=request.scale
        )

        def attention(query: Any, key: Any, value: Any, sinks: Any, bias: Any, leaves: Any) -> Any:
            del sinks
            mask: Mask = jax.tree.unflatten(structure, leaves)
            words = _words_for(mask)
            if words is None:
                visible = mask.materialize(request.q_len, request.kv_len, q_heads=request.q_heads)
                words = {"mask": jnp.asarray(visible)}
            return attend(query, key, value, bias, **words)

        return attention


def _words_for(mask: Mask) -> dict[str, Any] | None:
    """The arguments that say the same as a mask; None where there are none but booleans."""
    match mask:
        case Full():
            return {}
        case Causal():
            return {"is_causal": True}
        case SlidingWindow(left=int(left), right=int(right)):
            return {"local_window_size": (left, right)}
    return None


PEERS = tuple(map(Peer, _IMPLEMENTATIONS))
