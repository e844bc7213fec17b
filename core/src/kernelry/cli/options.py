"""The options that verbs share: the config, the model, and the sizes of the calls whose phases are resolved."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
import shlex
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, final

import typer

from kernelry.cli import completion
from kernelry.config.layer import HEADS, AttentionConfig
from kernelry.config.loading import load_config, read_maxtext
from kernelry.config.maxtext import Caller
from kernelry.errors import ArgumentError
from kernelry.models.model import LayerKind, Model, config_of
from kernelry.models.named import model_from
from kernelry.phases.model_shape import CacheKind, CacheShape, ModelShape
from kernelry.policy.lock import Lock

Config = Annotated[Path | None, typer.Argument(help="a config whose [attention] table decides.")]
MaxText = Annotated[
    list[Path] | None,
    typer.Option("--maxtext", help="a YAML file of MaxText's options in place of a config; later ones over earlier."),
]
Ignored = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="an option to leave out of MaxText's files; may be repeated."),
]

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="FILE|NAME",
        autocompletion=completion.models,
        help="a model's config.json, or a folder that has one, or a name such as llama-3-8b: every kind of its layers, "
        "with its mask, scale, heads and so on. A config, or MaxText's files, then only choose the kernels. Or a "
        "model's file of MaxText, read over the files that --maxtext names.",
    ),
]
LayerKinds = Annotated[
    list[str] | None,
    typer.Option("--layer-kind", metavar="NAME", help="a kind of the model's layers, e.g. sliding; may be repeated."),
]

Shards = Annotated[
    str | None,
    typer.Option(
        "--sharding",
        help="the mesh axes that cut batch, heads and sequences, with their sizes, a strategy and an order of tokens, "
        "e.g. 'batch=d:4 heads=t:2 sequence=c:8 ring dual'; default: the config's, or one device, which '' is, too.",
    ),
]


def check_axes(config: AttentionConfig, given: str | None) -> None:
    """Checks that a config that cuts calls over a mesh says the sizes of its axes, as MaxText's base.yml does not.

    Args:
      config: the config.
      given: what --sharding says instead; None where it was not given.

    Raises:
      ArgumentError: it does not.
    """
    if given is not None or config.sharding is None:
        return
    try:
        config.sharding.located  # noqa: B018  # it checks
    except ArgumentError as error:
        where = f"{config.source}: {error}"
        raise ArgumentError(f"{where} Pass such a text as --sharding; --sharding '' is one device.") from error


EncoderLength = Annotated[
    int | None,
    typer.Option("--encoder-len", min=1, help="S of a model's cross attention, tokens of its encoder; default T."),
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


Layer = AttentionConfig | LayerKind
"""The layer of a config, or a kind of a model's layers."""

_OF_LAYERS = {field.name for field in dataclasses.fields(AttentionConfig)} - {
    *("kernel", "rules", "thresholds", "forbid_adapters", "source", "tilings", "sharding")
}
"""The options of a config that say what a layer is."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class LayerFiles:
    """The layers that a verb is about: that of a config, or those of a model whose kernels a config may choose."""

    files: ConfigFiles
    model: str | None
    kinds: Sequence[str] | None

    def read(self) -> tuple[Layer, ...]:
        """Reads them: one config, or the kinds of the model's layers that were named, else all.

        Raises:
          BadParameter: files or options that do not go together.
          ConfigError: a file cannot be read, or there is no such kind.
        """
        if self.model is None and self.kinds:
            raise typer.BadParameter("--layer-kind is for a model, named with --model")
        if self.model is None:
            return (self.files.read(),)
        return self.kinds_of(self.read_model())

    def kinds_of(self, model: Model) -> tuple[LayerKind, ...]:
        """Returns the kinds of a model's layers that were named, else all.

        Raises:
          ConfigError: there is no such kind.
        """
        return tuple(map(model.kind, dict.fromkeys(self.kinds or ()))) or model.kinds

    def read_model(self) -> Model:
        """Reads the model, with kernels chosen as the config says, where there is one."""
        if Path(self.model or "").suffix in (".yml", ".yaml"):
            return self._read_maxtext_model(Path(self.model or ""))
        model = model_from(self.model or "")
        return model.choosing(self._choosing()) if self.files else model

    def _read_maxtext_model(self, model: Path) -> Model:
        """Reads a model's file of MaxText, over the other files of MaxText that were named."""
        from kernelry.models.maxtext import read_maxtext_model  # imported here, because it imports the decoder blocks

        if self.files.config is None:
            return read_maxtext_model((*(self.files.maxtext or ()), model), self.files.ignore or (), Caller.COMMAND)
        return read_maxtext_model((model,), (), Caller.COMMAND).choosing(self._choosing())

    def _choosing(self) -> AttentionConfig:
        """Reads the config that chooses the kernels of a model, and warns of what it says of a layer."""
        config = self.files.read()
        shipped = AttentionConfig()
        unread = sorted(name for name in _OF_LAYERS if getattr(config, name) != getattr(shipped, name))
        if unread and self.files.config is not None:  # MaxText's files always say what a layer is
            warnings.warn(
                f"{self.files.source()}: not read, because the model says what its layers are: {', '.join(unread)}.",
                stacklevel=2,
            )
        return config

    def source(self, start: Path | None = None) -> str:
        """Returns the model, and the files, as text, relative to a folder where one is given."""
        if self.model is None:
            return self.files.source(start)
        path = Path(self.model)
        if path.exists():
            path = path / "config.json" if path.is_dir() else path
            own = str(path) if start is None else Path(os.path.relpath(path, start)).as_posix()
        else:
            own = self.model
        return f"{own} with {self.files.source(start)}" if self.files else own

    def origin(self, layer: Layer, start: Path | None = None) -> str:
        """Returns what a lock file calls a layer: the files, and the kind in a model."""
        return f"{self.source(start)}: {layer.name}" if isinstance(layer, LayerKind) else self.source(start)

    def gone(self, locked: Lock, own: Iterable[str], start: Path) -> list[str]:
        """Returns the kinds in a lock file that the model no longer has; none where only some of its kinds were named.

        Args:
          locked: the lock file's content.
          own: what it calls the layers that the model has.
          start: its folder.
        """
        if self.model is None or self.kinds:
            return []
        names = {origin.config for entry in locked.entries for origin in entry.origins}
        return sorted(name for name in names.difference(own) if name.startswith(f"{self.source(start)}: "))

    def arguments(self) -> str:
        """Returns the model, its kinds and the files as arguments of the command."""
        if self.model is None:
            return self.files.arguments()
        kinds = (word for name in self.kinds or () for word in ("--layer-kind", name))
        named = shlex.join(["--model", self.model, *kinds])
        return f"{named} {self.files.arguments()}" if self.files else named


def _size(name: str, text: str) -> Any:
    return typer.Option(name, min=1, help=text)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Heads:
    """The heads and head dims that were given; None where they were not."""

    q_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    value_dim: int | None

    def left_open_by(self, config: AttentionConfig) -> dict[str, int | None]:
        """Returns those that a config leaves open, by their names in a ModelShape; of the others None.

        Raises:
          BadParameter: one is not the config's.
        """
        found: dict[str, int | None] = {}
        for name in HEADS:
            given, said = getattr(self, name), getattr(config, name)
            if None not in (given, said) and given != said:
                option = _HEAD_OPTIONS[name]
                raise typer.BadParameter(
                    f"{option} {given} contradicts {name}={said} of {config.source}: leave {option} out"
                )
            found[name] = None if said is not None else _DEFAULTS.get(name) if given is None else given
        return found


_HEAD_OPTIONS = {
    "q_heads": "--heads",
    "kv_heads": "--kv-heads",
    "head_dim": "--head-dim",
    "value_dim": "--value-dim",
}
_DEFAULTS = {"q_heads": 8, "head_dim": 128}

QueryHeads = Annotated[int | None, _size("--heads", "N, query heads; default: the model's or config's, else 8.")]
KvHeads = Annotated[int | None, _size("--kv-heads", "K, key/value heads; default: the model's or config's, else N.")]
HeadDim = Annotated[int | None, _size("--head-dim", "H; default: the model's or config's, else 128.")]
ValueDim = Annotated[int | None, _size("--value-dim", "D; default: the model's or config's, else H.")]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class ModelOptions:
    """The options that say which config, which model and which sizes; `takes` adds them to a verb."""

    config: Config = None
    maxtext: MaxText = None
    ignore: Ignored = None
    model: ModelName = None
    layer_kind: LayerKinds = None
    q_len: Annotated[int, _size("--q-len", "T, tokens of a training sequence and of a prompt.")] = 1024
    max_len: Annotated[
        int | None, _size("--max-len", "slots of the cache; default T, and 2 T with --cache two-part.")
    ] = None
    batch: Annotated[list[int] | None, _size("--batch", "B, default 1; may be repeated.")] = None
    heads: QueryHeads = None
    kv_heads: KvHeads = None
    head_dim: HeadDim = None
    value_dim: ValueDim = None
    dtype: Annotated[
        str, typer.Option("--dtype", help="of query, key and value.", autocompletion=completion.dtypes)
    ] = "bfloat16"
    two_part: Annotated[bool, typer.Option("--two-part", help="the same as --cache two-part.")] = False
    cache: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            help="contiguous (default), two-part, rolling or paged:PAGE_SIZE, with :value_in_key or :interleaved where "
            "values are stored with the keys, and with :int8 or another storage where they are quantised; may be "
            "repeated.",
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
    encoder_len: EncoderLength = None

    @property
    def files(self) -> LayerFiles:
        """The config, or MaxText's files, and the model."""
        return LayerFiles(ConfigFiles(self.config, self.maxtext, self.ignore), self.model, self.layer_kind)

    def shapes(self, layer: Layer) -> tuple[ModelShape, ...]:
        """A shape for every batch, cache and mask; heads that the layer has are left to it."""
        check_axes(config_of(layer), self.sharding)
        check_encoder(self.encoder_len, self.model)
        heads = Heads(self.heads, self.kv_heads, self.head_dim, self.value_dim).left_open_by(config_of(layer))
        two_part = (CacheShape(CacheKind.TWO_PART),) if self.two_part else ()
        caches = (*map(CacheShape.parse, self.cache or ()), *two_part) or (CacheShape(),)
        return tuple(
            ModelShape(
                q_len=self.q_len,
                max_len=self.max_len or (2 * self.q_len if cache.kind is CacheKind.TWO_PART else self.q_len),
                batch=batch,
                **heads,  # type: ignore[arg-type]
                dtype=self.dtype,
                cache=cache,
                mask=mask,
                sharding=self.sharding,
                encoder_len=self.encoder_len,
            )
            for batch, cache, mask in itertools.product(self.batch or [1], caches, self.mask or ["config"])
        )


def check_encoder(encoder_len: int | None, model: str | None) -> None:
    """Raises BadParameter for the length of an encoder without a model, which alone has cross attention."""
    if encoder_len is not None and model is None:
        raise typer.BadParameter("--encoder-len is for a model, named with --model")


_Options = TypeVar("_Options")


def takes(options: Callable[..., _Options], *without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that gives a verb the options of a dataclass, which it receives as its first argument.

    Those that it is `without` keep their defaults.
    """

    def decorated(verb: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(verb, eval_str=True).parameters.values()
        every = inspect.signature(options, eval_str=True).parameters
        shared = {name: each for name, each in every.items() if name not in without}

        @functools.wraps(verb)
        def with_options(**given: Any) -> None:
            verb(options(**{name: given.pop(name) for name in shared}), **given)

        taken = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*shared.values(), *own)]
        with_options.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
        return with_options

    return decorated
