"""A call of the kit as data: its request, its arrays, its arguments."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.masks import Full, Mask
from kernelry.request import Mode, Operand, Request
from kernelry.testing.conformance.place import Place
from kernelry.testing.reference import reference_mask

QKV = ("query", "key", "value")
_FULL = Full()


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """One attention call; the arguments are those of `kernelry.attention`.

    Args:
      bias: its shape, B N T S or 1 each.
      gradients: the operands differentiated; those that the call lacks are left out.
      poison: whether NaN and inf stand in slots that no row may see, and NaN in rows that see nothing.
    """

    batch: int = 2
    q_len: int = 16
    kv_len: int = 16
    q_heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    value_dim: int = 8
    dtype: str = "float32"
    mask: Mask = _FULL
    mode: Mode = Mode.TRAIN
    scale: float | None = None
    bias: tuple[int, ...] | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dropout_rate: float = 0.0
    gradients: frozenset[Operand] = frozenset()
    normalization: str = "softmax"
    logits_dtype: str = "float32"
    precision: str | None = None
    partial: bool = False
    max_logits: bool = False
    poison: bool = False

    @property
    def wanted(self) -> frozenset[Operand]:
        """The operands with a gradient that this call passes."""
        absent = {Operand.BIAS} if self.bias is None else set()
        absent |= set() if self.sinks else {Operand.SINKS}
        return self.gradients - absent if self.mode is Mode.TRAIN else frozenset()

    def request(self, place: Place) -> Request:
        """The static facts."""
        return Request(
            target=place.target,
            mode=self.mode,
            batch=self.batch,
            q_len=self.q_len,
            kv_len=self.kv_len,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            mask=self.mask.form,
            scale=self.scale,  # type: ignore[arg-type]
            bias=self.bias,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
            dropout_rate=self.dropout_rate,
            gradients=self.wanted,
            normalization=self.normalization,
            logits_dtype=self.logits_dtype,
            precision=self.precision,
            partial=self.partial,
            max_logits=self.max_logits,
            interpret=place.interpreted,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `kernelry.attention` that are not arrays."""
        return {
            "mode": self.mode,
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "dropout_rate": self.dropout_rate,
            "gradients": tuple(sorted(operand.value for operand in self.wanted)),
            "normalization": self.normalization,
            "logits_dtype": self.logits_dtype,
            "precision": self.precision,
            "return_partial": self.partial,
            "return_max_logits": self.max_logits,
        }

    def arrays(self, seed: int = 0) -> dict[str, jax.Array]:
        """Draws the arrays from N(0, 1), by argument name."""
        rng = np.random.default_rng(seed)
        shapes: dict[str, tuple[int, ...]] = {
            "query": (self.batch, self.q_len, self.q_heads, self.head_dim),
            "key": (self.batch, self.kv_len, self.kv_heads, self.head_dim),
            "value": (self.batch, self.kv_len, self.kv_heads, self.value_dim),
        }
        shapes |= {} if self.bias is None else {"bias": self.bias}
        shapes |= {"sinks": (self.q_heads,)} if self.sinks else {}
        return {name: jnp.asarray(rng.standard_normal(shape), self.dtype) for name, shape in shapes.items()}

    def cotangents(self, seed: int = 0) -> dict[str, jax.Array]:
        """Draws d_out, and d_lse where the call returns a Partial."""
        rng = np.random.default_rng([seed, 1])
        d_out = rng.standard_normal((self.batch, self.q_len, self.q_heads, self.value_dim))
        drawn = {"out": jnp.asarray(d_out, self.dtype)}
        if self.partial:
            drawn["lse"] = jnp.asarray(rng.standard_normal((self.batch, self.q_heads, self.q_len)), jnp.float32)
        return drawn

    def poisoned(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Puts NaN and inf where no row may look, and NaN into queries that see nothing."""
        visible = reference_mask(self.mask, self.batch, self.q_heads, self.q_len, self.kv_len)
        groups = (self.batch, self.kv_heads, self.q_heads // self.kv_heads, self.q_len, self.kv_len)
        hidden = ~np.swapaxes(np.any(visible.reshape(groups), axis=(2, 3)), 1, 2)[..., None]
        dead = ~np.swapaxes(np.any(visible, axis=3), 1, 2)[..., None]
        odd = np.arange(self.kv_len).reshape(1, -1, 1, 1) % 2 == 1
        bad = np.where(odd, np.inf, np.nan)
        return arrays | {
            "query": jnp.asarray(np.where(dead, np.nan, np.asarray(arrays["query"], np.float64)), self.dtype),
            "key": jnp.asarray(np.where(hidden, bad, np.asarray(arrays["key"], np.float64)), self.dtype),
            "value": jnp.asarray(np.where(hidden, bad, np.asarray(arrays["value"], np.float64)), self.dtype),
        }
