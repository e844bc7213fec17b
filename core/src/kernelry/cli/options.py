"""The options that verbs share: the config, and the model whose phases are resolved."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, final

import typer

from kernelry.config.layer import AttentionConfig
from kernelry.config.loading import load_config, read_maxtext
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

Shards = Annotated[
    str | None,
    typer.Option(
        "--sharding",
        help="the mesh axes that cut batch, heads and sequences, with their sizes, a strategy and an order of tokens, "
        "e.g. 'batch=d:4 heads=t:2 sequence=c:8 ring dual'; default: the config's, or one device, which '' is, too.",
    ),
]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class ConfigFiles:
    """The config, or MaxText's files and the options to leave out of them, that a verb was given."""

    config: Path | None
    maxtext: Sequence[Path] | None
    ignore: Sequence[str] | None

    def __bool__(self) -> bool:
        return self.config is not None or bool(self.maxtext or self.ignore)

    def read(self) -> AttentionConfig:
        """Reads them.

        Raises:
          BadParameter: both or neither were given, or options to ignore without MaxText's files.
          ConfigError: a file cannot be read, has no [attention] table, or has a wrong key or value.
        """
        if (self.config is None) == (not self.maxtext):
            raise typer.BadParameter("name either a config or, with --maxtext, MaxText's files")
        if self.config is None:
            return read_maxtext(self.maxtext or (), self.ignore or (), Caller.COMMAND)
        if self.ignore:
            raise typer.BadParameter("--ignore is for MaxText's files, named with --maxtext")
        return load_config(self.config, required=True)

    def source(self, start: Path | None = None) -> str:
        """Returns the files as text, relative to a folder where one is given, and what is left out of them."""
        paths = [self.config] if self.config is not None else list(self.maxtext or ())
        named = (str(path) if start is None else Path(os.path.relpath(path, start)).as_posix() for path in paths)
        return self._with_ignored(" + ".join(named), sorted(set(self.ignore or ())))

    def arguments(self) -> str:
        """Returns the files, and what is left out of them, as arguments of the command."""
        if self.config is not None:
            return shlex.join([str(self.config)])
        files = shlex.join(word for file in self.maxtext or () for word in ("--maxtext", str(file)))
        return self._with_ignored(files, self.ignore or ())

    def _with_ignored(self, files: str, names: Sequence[str]) -> str:
        return " ".join([files, *([Caller.COMMAND.ignoring(names)] if names else [])])


def _size(name: str, text: str) -> Any:
    return typer.Option(name, min=1, help=text)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class ModelOptions:
    """The options that say which config and which model; `takes_model` adds them to a verb."""

    config: Config = None
    maxtext: MaxText = None
    ignore: Ignored = None
    q_len: Annotated[int, _size("--q-len", "T, tokens of a training sequence and of a prompt.")] = 1024
    max_len: Annotated[
        int | None, _size("--max-len", "slots of the cache; default T, and 2 T with --cache two-part.")
    ] = None
    batch: Annotated[list[int] | None, _size("--batch", "B, default 1; may be repeated.")] = None
    heads: Annotated[int, _size("--heads", "N, query heads.")] = 8
    kv_heads: Annotated[int | None, _size("--kv-heads", "K, key/value heads; default N.")] = None
    head_dim: Annotated[int, _size("--head-dim", "H.")] = 128
    value_dim: Annotated[int | None, _size("--value-dim", "D; default H.")] = None
    dtype: Annotated[str, typer.Option("--dtype", help="of query, key and value.")] = "bfloat16"
    two_part: Annotated[bool, typer.Option("--two-part", help="the same as --cache two-part.")] = False
    cache: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            help="contiguous (default), two-part, rolling or paged:PAGE_SIZE, with :int8 or another storage where keys "
            "are quantised; may be repeated.",
        ),
    ] = None
    mask: Annotated[
        list[str] | None,
        typer.Option(
            "--mask",
            help="what training and prefill see besides the config's mask, e.g. segments, or with the word config in "
            "it as a whole: '(config & segments) | spans'; may be repeated.",
        ),
    ] = None
    sharding: Shards = None

    @property
    def files(self) -> ConfigFiles:
        """The config, or MaxText's files."""
        return ConfigFiles(self.config, self.maxtext, self.ignore)

    @property
    def shapes(self) -> tuple[ModelShape, ...]:
        """A shape for every batch, cache and mask."""
        two_part = (CacheShape(CacheKind.TWO_PART),) if self.two_part else ()
        caches = (*map(CacheShape.parse, self.cache or ()), *two_part) or (CacheShape(),)
        return tuple(
            ModelShape(
                q_len=self.q_len,
                max_len=self.max_len or (2 * self.q_len if cache.kind is CacheKind.TWO_PART else self.q_len),
                batch=batch,
                q_heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                value_dim=self.value_dim,
                dtype=self.dtype,
                cache=cache,
                mask=mask,
                sharding=self.sharding,
            )
            for batch, cache, mask in itertools.product(self.batch or [1], caches, self.mask or ["config"])
        )


def takes_model(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives a verb the options of `ModelOptions`, which it receives as its first argument."""
    _, *own = inspect.signature(verb, eval_str=True).parameters.values()
    shared = inspect.signature(ModelOptions, eval_str=True).parameters

    @functools.wraps(verb)
    def with_model(**given: Any) -> None:
        model = ModelOptions(**{name: given.pop(name) for name in shared})
        verb(model, **given)

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*shared.values(), *own)]
    with_model.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_model


def advice_of(resolutions: Iterable[Resolution]) -> list[str]:
    """What to do where no kernel serves, each piece of advice once."""
    return list(dict.fromkeys(found.advice for found in resolutions if found.advice is not None))


def check_names(resolutions: Sequence[Resolution]) -> None:
    """Raises where a kernel was asked for by name that no installed plugin has.

    Raises:
      ConfigError: there is such a kernel.
    """
    for resolution in resolutions:
        for candidate in resolution.candidates:
            for refusal in candidate.refusals:
                if refusal.code is RefusalCode.NOT_INSTALLED:
                    asked = f"kernel {candidate.name!r}, by {resolution.rule}"
                    raise ConfigError(sentence(f"{asked}: {refusal}"))
