"""English text that every CPython carries: the language reference behind `help()`, as bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pydoc_data.topics import topics

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out, uint8."""

    training: np.ndarray
    held_out: np.ndarray


def load_text(held_out: float = 0.1) -> Text:
    """Returns the text with its end held out.

    The topics repeat each other's sections, so that a paragraph counts once: none is in both parts.
    """
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))
    text = np.frombuffer("\n\n".join(paragraphs).encode(), np.uint8)
    split = int(len(text) * (1 - held_out))
    return Text(text[:split], text[split:])


def batches(text: np.ndarray, batch: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Yields int32 [batch, length + 1] from random places: inputs, and targets one byte on."""
    rng = np.random.default_rng(seed)
    while True:
        yield windows(text, rng.integers(0, len(text) - length, batch), length)


def evaluation_batch(text: np.ndarray, count: int, length: int) -> np.ndarray:
    """Returns the same evenly spread windows every time, int32 [count, length + 1]."""
    return windows(text, np.linspace(0, len(text) - length - 1, count).astype(int), length)


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Cuts windows of length + 1 bytes."""
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows as a mesh takes them: int32 [B, T], positions [T]."""

    inputs: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray | None

    @classmethod
    def of(cls, windows: np.ndarray, order: np.ndarray, *, packed: bool) -> Batch:
        """Puts windows [B, T + 1] into an order of tokens, [T]; packed, a paragraph does not see the others."""
        inputs, targets = windows[:, :-1], windows[:, 1:]
        segments = paragraphs(inputs)[:, order] if packed else None
        return cls(inputs[:, order], targets[:, order], order.astype(np.int32), segments)


def paragraphs(tokens: np.ndarray) -> np.ndarray:
    """Numbers the paragraphs of each row, int32 [B, T]: after an empty line begins another."""
    ends = tokens == ord("\n")
    ends[:, 1:] &= ends[:, :-1]
    ends[:, 0] = False
    begins = np.roll(ends, 1, axis=1)
    begins[:, 0] = False
    return begins.cumsum(axis=1, dtype=np.int32)
