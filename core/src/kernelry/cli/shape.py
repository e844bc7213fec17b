"""The options that say which config and which model, the same for every verb that resolves its phases."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from kernelry.config.loading import AttentionConfig, load_config, read_maxtext
from kernelry.config.maxtext import Caller
from kernelry.errors import ConfigError, sentence
from kernelry.kernel.refusal import RefusalCode
from kernelry.phases.model_shape import CacheKind, CacheShape, ModelShape
from kernelry.resolution.explanation import Resolution

Config = Annotated[Path | None, typer.Argument(help="a config whose [attention] table decides.")]
MaxText = Annotated[
    list[Path] | None,
    typer.Option("--maxtext", help="a YAML file of MaxText's options in place of a config; later ones over earlier."),
]
Ignored = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="an option to leave out of MaxText's files; may be repeated."),
]
QueryLength = Annotated[int, typer.Option("--q-len", min=1, help="T, tokens of a training sequence and of a prompt.")]
MaxLength = Annotated[
    int | None, typer.Option("--max-len", min=1, help="slots of the cache; default T, and 2 T with --cache two-part.")
]
Batch = Annotated[list[int] | None, typer.Option("--batch", min=1, help="B, default 1; may be repeated.")]
Heads = Annotated[int, typer.Option("--heads", min=1, help="N, query heads.")]
KVHeads = Annotated[int | None, typer.Option("--kv-heads", min=1, help="K, key/value heads; default N.")]
HeadDim = Annotated[int, typer.Option("--head-dim", min=1, help="H.")]
ValueDim = Annotated[int | None, typer.Option("--value-dim", min=1, help="D; default H.")]
DType = Annotated[str, typer.Option("--dtype", help="of query, key and value.")]
TwoPart = Annotated[bool, typer.Option("--two-part", help="the same as --cache two-part.")]
Cache = Annotated[
    list[str] | None,
    typer.Option(
        "--cache",
        help="contiguous (default), two-part, rolling or paged:PAGE_SIZE, with :int8 or another storage where keys are "
        "quantised; may be repeated.",
    ),
]
Masks = Annotated[
    list[str] | None,
    typer.Option(
        "--mask",
        help="what training and prefill see besides the config's mask, e.g. segments, or with the word config in it "
        "as a whole: '(config & segments) | spans'; may be repeated.",
    ),
]


def read_config(
    config: Path | None, maxtext: Sequence[Path] | None, ignore: Sequence[str] | None = None
) -> AttentionConfig:
    """Reads the config, or MaxText's files without the options to ignore, that a command was given.

    Raises:
      BadParameter: both or neither were given, or options to ignore without MaxText's files.
      ConfigError: a file cannot be read, has no [attention] table, or holds a wrong key or value.
    """
    if (config is None) == (not maxtext):
        raise typer.BadParameter("name either a config or, with --maxtext, MaxText's files")
    if config is None:
        return read_maxtext(maxtext or (), ignore or (), Caller.COMMAND)
    if ignore:
        raise typer.BadParameter("--ignore is for MaxText's files, named with --maxtext")
    return load_config(config, required=True)


def source_of(
    config: Path | None, maxtext: Sequence[Path] | None, ignore: Sequence[str] | None, *, start: Path | None = None
) -> str:
    """The files that a command was given and what it leaves out of them, as text.

    Args:
      config, maxtext, ignore: as for `read_config`.
      start: the folder that they are relative to; None is as they were given.
    """
    paths = [config] if config is not None else list(maxtext or ())
    named = " + ".join(str(path) if start is None else Path(os.path.relpath(path, start)).as_posix() for path in paths)
    return " ".join([named, *([Caller.COMMAND.ignoring(sorted(set(ignore)))] if ignore else [])])


def arguments_of(config: Path | None, maxtext: Sequence[Path] | None, ignore: Sequence[str] | None) -> str:
    """The files that a command was given and what it leaves out of them, as they are written on a command line."""
    if config is not None:
        return shlex.join([str(config)])
    files = shlex.join(word for file in maxtext or () for word in ("--maxtext", str(file)))
    return " ".join([files, *([Caller.COMMAND.ignoring(ignore)] if ignore else [])])


def model_shapes(
    q_len: int,
    max_len: int | None,
    batches: list[int] | None,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    value_dim: int | None,
    dtype: str,
    two_part: bool,
    caches: list[str] | None,
    masks: list[str] | None,
) -> tuple[ModelShape, ...]:
    """What the options above say together: a shape for every batch, cache and mask."""
    held = list(map(CacheShape.parse, caches or ())) or [CacheShape()]
    if two_part:
        held = [CacheShape(CacheKind.TWO_PART)] if not caches else [*held, CacheShape(CacheKind.TWO_PART)]
    return tuple(
        ModelShape(
            q_len=q_len,
            max_len=max_len or (2 * q_len if cache.kind is CacheKind.TWO_PART else q_len),
            batch=batch,
            q_heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=dtype,
            cache=cache,
            mask=mask,
        )
        for batch, cache, mask in itertools.product(batches or [1], held, masks or ["config"])
    )


def advice_of(resolutions: Iterable[Resolution]) -> list[str]:
    """What to do where no kernel serves, each once."""
    return list(dict.fromkeys(found.advice for found in resolutions if found.advice is not None))


def check_names(resolutions: Sequence[Resolution]) -> None:
    """Refuses a kernel that was asked for by name and that no installed plugin brings.

    Raises:
      ConfigError: there is one.
    """
    for resolution in resolutions:
        for candidate in resolution.candidates:
            for refusal in candidate.refusals:
                if refusal.code is RefusalCode.NOT_INSTALLED:
                    asked = f"kernel {candidate.name!r}, by {resolution.rule}"
                    raise ConfigError(sentence(f"{asked}: {refusal}"))
