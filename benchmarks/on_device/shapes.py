"""The shapes that are timed, with their work counted from the mask."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry import masks

FORWARD, BOTH = "forward", "forward+backward"


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A call.

    Args:
      batch, q_len, kv_len, q_heads, kv_heads, head_dim, value_dim: B, T, S, N, K, H and D; D of None is H.
      mode: of the request; only `train` has a backward pass.
      causal: whether queries see no later key; then T = S.
      window: how many keys a query sees at most, itself included; causal only.
      documents: lengths in tokens that are packed in a row and do not see each other; causal only.
      soft_cap: of the logits.
      dtype: of all arrays.
    """

    batch: int = 1
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    mode: str = "train"
    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] | None = None
    soft_cap: float | None = None
    dtype: str = "bfloat16"

    @property
    def out_dim(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def groups(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def passes(self) -> tuple[str, ...]:
        return (FORWARD, BOTH) if self.mode == "train" else (FORWARD,)

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees, in one batch row and head."""
        if not self.causal:
            return self.q_len * self.kv_len
        total = 0
        for length in self.documents or (self.q_len,):
            window = min(self.window or length, length)
            total += window * (window + 1) // 2 + (length - window) * window
        return total

    def flops(self, which: str) -> int:
        """Operations of the matrix products over visible pairs alone.

        Forward: logits (H) and output (D). Backward: logits again, d_query and d_key (H each), d_value and
        d_probabilities (D each). A pair costs a product and a sum per channel.
        """
        channels = self.head_dim + self.out_dim
        if which == BOTH:
            channels += 3 * self.head_dim + 2 * self.out_dim
        return 2 * self.batch * self.q_heads * self.visible * channels

    @property
    def bytes(self) -> int:
        """Least traffic of a forward call: query, key and value read, output written, once each."""
        tokens = self.q_len * self.q_heads + self.kv_len * self.kv_heads
        return jnp.dtype(self.dtype).itemsize * self.batch * tokens * (self.head_dim + self.out_dim)

    def arrays(self) -> tuple[Any, ...]:
        """query, key, value, the weights of the loss, and the documents' ids [B, T] or None."""
        query = (self.batch, self.q_len, self.q_heads, self.head_dim)
        key = (self.batch, self.kv_len, self.kv_heads, self.head_dim)
        sizes = (query, key, (*key[:3], self.out_dim), (*query[:3], self.out_dim))
        draws = zip(jax.random.split(jax.random.key(0), 4), sizes, strict=True)
        return *(jax.random.normal(seed, size, jnp.dtype(self.dtype)) for seed, size in draws), self.ids()

    def ids(self) -> jax.Array | None:
        if self.documents is None:
            return None
        row = np.repeat(np.arange(len(self.documents), dtype=np.int32), self.documents)
        return jnp.asarray(np.tile(row, (self.batch, 1)))

    def mask(self, ids: jax.Array | None) -> masks.Mask:
        if not self.causal:
            return masks.Full()
        found: masks.Mask = masks.Causal()
        if self.window is not None:
            found = found & masks.SlidingWindow(self.window - 1, 0)
        return found if ids is None else found & masks.Segments(ids)

    def to_json(self) -> dict[str, Any]:
        work = {f"{which}_flops": self.flops(which) for which in self.passes}
        return dataclasses.asdict(self) | {"value_dim": self.out_dim} | work | {"forward_bytes": self.bytes}


def _square(length: int, q_heads: int, kv_heads: int, head_dim: int, **others: Any) -> Shape:
    return Shape(q_len=length, kv_len=length, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, **others)


def _step(batch: int, slots: int, **others: Any) -> Shape:
    """A decode step of Llama 3 8B over a full cache."""
    sizes = {"q_heads": 32, "kv_heads": 8, "head_dim": 128} | others
    return Shape(batch=batch, q_len=1, kv_len=slots, mode="decode", causal=False, **sizes)


_PACKED = (1500, 300, 2100, 900, 2548, 844)
"""Tokens; documents of unequal lengths, none a multiple of a block, that fill 8192."""

ACCELERATOR = {
    "causal_8k": _square(8192, 32, 32, 128),
    "window_1024_16k": _square(16384, 32, 32, 128, window=1024),
    "causal_16k": _square(16384, 32, 32, 128),
    "decode_8k_batch64": _step(64, 8192),
    "decode_128k": _step(1, 131072),
    "decode_8k": _step(1, 8192),
    "llama3_8b_8k": _square(8192, 32, 8, 128),
    "llama3_70b_8k": _square(8192, 64, 8, 128),
    "packed_8k": _square(8192, 32, 8, 128, documents=_PACKED),
    "gemma2_9b_local_8k": _square(8192, 16, 8, 256, window=4096, soft_cap=50.0),
    "gemma2_9b_global_8k": _square(8192, 16, 8, 256, soft_cap=50.0),
    "mistral_window_8k": _square(8192, 32, 8, 128, window=4096),
    "mla_192_128_4k": _square(4096, 128, 128, 192, value_dim=128),
    "llama3_8b_4k": _square(4096, 32, 8, 128),
    "llama3_70b_4k": _square(4096, 64, 8, 128),
    "causal_8k_batch4": _square(8192, 32, 32, 128, batch=4),
    "mixtral_prefill_8k": _square(8192, 32, 8, 128, mode="prefill"),
    "vit_256_full": _square(256, 16, 16, 64, batch=64, causal=False),
    "decode_32k_batch8": _step(8, 32768),
}
"""What a GPU or TPU is timed on, in this order: those that the targets are about come first."""

CPU = {
    "small_train_1k": _square(1024, 8, 8, 64, dtype="float32"),
    "small_window_1k": _square(1024, 8, 2, 64, window=256, dtype="float32"),
    "small_packed_1k": _square(1024, 8, 2, 64, documents=(300, 20, 500, 204), dtype="float32"),
    "small_soft_cap_1k": _square(1024, 4, 2, 64, soft_cap=50.0, dtype="float32"),
    "small_mla_1k": _square(1024, 4, 4, 96, value_dim=64, dtype="float32"),
    "small_prefill_2k": _square(2048, 4, 1, 64, mode="prefill", dtype="float32"),
    "small_decode_4k": _step(1, 4096, q_heads=8, kv_heads=2, head_dim=64, dtype="float32"),
}
"""The same kinds of call for two CPU cores."""

SHAPES = ACCELERATOR | CPU
