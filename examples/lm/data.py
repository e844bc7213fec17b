"""English text that every CPython carries: the language reference behind `help()`, as bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pydoc_data.topics import topics

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
