"""The verb `explain`: which kernel a request gets, or every phase of a model, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, final

import typer
from rich.console import RenderableType

from kernelry.cli import completion, models, options
from kernelry.cli.answer import Asked, resolution_parts
from kernelry.cli.output import Json, show
from kernelry.config.layer import AttentionConfig
from kernelry.kernel.spec import AUTO
from kernelry.masks import Mask
from kernelry.masks.base import Extent
from kernelry.masks.parse import names_in, parse_form
from kernelry.phases.calls import cached, mask_of, options_in, sharding_in
from kernelry.phases.model_shape import LARGEST_SIZE, CacheKind, CacheShape, ModelShape
from kernelry.registry import installed
from kernelry.request.checks import spelled
from kernelry.request.names import dtype_name
from kernelry.request.request import Mode, Request
from kernelry.request.target import Target, home_target
from kernelry.resolution.explanation import Resolution
from kernelry.resolution.resolver import explain as explain_request
from kernelry.storage import SEPARATE


def _usable_cap(soft_cap: float | None) -> float | None:
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise typer.BadParameter(f"must be a finite number above 0, got {soft_cap}; leave it out for no cap")
    return soft_cap


@final
@dataclasses.dataclass(frozen=True, slots=True)
class RequestOptions:
    """The options that say what is requested; those that the config or the model says are None where not given."""

    mode: Annotated[
        str | None,
        typer.Option(help="train, prefill or decode; default train; of a model all.", autocompletion=completion.modes),
    ] = None
    q_len: Annotated[int, typer.Option(min=0, max=LARGEST_SIZE, help="T, query tokens.")] = 1024
    kv_len: Annotated[
        int | None,
        typer.Option(min=0, max=LARGEST_SIZE, help="S, key tokens; of a model the slots of its cache; default T."),
    ] = None
    batch: Annotated[int, typer.Option(min=0, max=LARGEST_SIZE, help="B.")] = 1
    heads: options.QueryHeads = None
    kv_heads: options.KvHeads = None
    head_dim: options.HeadDim = None
    value_dim: options.ValueDim = None
    dtype: Annotated[str, typer.Option(help="of query, key and value.", autocompletion=completion.dtypes)] = "bfloat16"
    mask: Annotated[
        str | None,
        typer.Option(
            help="e.g. 'causal & segments', 'window(511)', 'full', or with the word config for the config's or the "
            "model's own mask: 'config & segments'; default: the config's, causal without a config. Where T and S "
            "differ, a mask without positions, as in 'causal.at(query_offset=7)', may be at any."
        ),
    ] = None
    soft_cap: Annotated[
        float | None, typer.Option(help="cap of the logits; default: the config's.", callback=_usable_cap)
    ] = None
    sinks: Annotated[
        bool | None, typer.Option("--sinks/--no-sinks", help="one sink logit per head; default: the config's.")
    ] = None
    kv_quantization: Annotated[str | None, typer.Option(help="of keys and values, e.g. int8, int4:head_dim.")] = None
    page_size: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_SIZE, help="slots of a page, for paged keys and values.")
    ] = None
    kv_layout: Annotated[
        str,
        typer.Option(
            help="how keys and values are stored: separate, value_in_key (values are the first columns of the keys) or "
            "interleaved (in pages)."
        ),
    ] = SEPARATE
    context_parallel: Annotated[
        str | None, typer.Option(help="what a kernel does across devices itself, e.g. ring:context:4.")
    ] = None
    sharding: options.Shards = None
    encoder_len: options.EncoderLength = None
    partial: Annotated[bool, typer.Option("--partial", help="return a Partial, with statistics.")] = False

    @property
    def phase(self) -> Mode:
        """The mode of a single request."""
        return Mode.parse(self.mode or Mode.TRAIN)

    def heads_for(self, config: AttentionConfig) -> dict[str, int | None]:
        """Returns the heads and head dims that a config leaves open; see `Heads`."""
        return options.Heads(self.heads, self.kv_heads, self.head_dim, self.value_dim).left_open_by(config)

    def shape_for(self, config: AttentionConfig) -> ModelShape:
        """Returns the sizes of a model's calls.

        Raises:
          BadParameter: an option that is not about a model was given.
        """
        alone = {
            "--partial": self.partial or None,
            "--soft-cap": self.soft_cap,
            "--sinks": self.sinks,
            "--context-parallel": self.context_parallel,
        }
        given = [name for name, value in alone.items() if value is not None]
        if given:
            raise typer.BadParameter(f"{', '.join(given)} with --model: the model says what its calls request")
        if self.kv_len is not None and self.kv_len < self.q_len:
            raise typer.BadParameter(
                f"--kv-len {self.kv_len} with --model: a cache of {self.kv_len} slots cannot hold the prompt, "
                f"--q-len {self.q_len} tokens"
            )
        options.check_axes(config, self.sharding)
        paged = CacheKind.CONTIGUOUS if self.page_size is None else CacheKind.PAGED
        return ModelShape(
            q_len=self.q_len,
            max_len=self.q_len if self.kv_len is None else self.kv_len,
            batch=self.batch,
            **self.heads_for(config),  # type: ignore[arg-type]
            dtype=_dtype(self.dtype),
            cache=CacheShape(paged, self.page_size, self.kv_quantization, self.kv_layout),
            mask="config" if self.mask is None else self.mask,
            sharding=self.sharding,
            encoder_len=self.encoder_len,
        )


@options.takes(RequestOptions)
def explain(
    asked: RequestOptions,
    *,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="platform[:kind[:topology]], e.g. gpu:h100; default: this machine; may be repeated.",
            autocompletion=completion.targets,
        ),
    ] = None,
    kernel: Annotated[
        str,
        typer.Option(help="a kernel's name, absolutely, or auto.", autocompletion=completion.kernels_or_auto),
    ] = AUTO,
    config: Annotated[
        Path | None,
        typer.Option(
            help="a config whose [attention] table decides, and whose mask, scale, soft cap, sinks, bias, MoBA, "
            "dropout, logits_dtype, precision and largest logits are asked for; options given here take precedence."
        ),
    ] = None,
    maxtext: options.MaxText = None,
    ignore: options.Ignored = None,
    model: options.ModelName = None,
    layer_kind: options.LayerKinds = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show the answers of all kernels in full; of a model, those about every call.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Which kernel a request gets and why, on hardware that need not be present. Status 2: none.

    With --model, a table of the kernels of every kind of its layers, in every phase, on each target. Status 2: a phase
    has none.
    """
    files = options.LayerFiles(options.ConfigFiles(config, maxtext, ignore), model, layer_kind)
    targets = list(dict.fromkeys(map(Target.parse, target or ()))) or [home_target()]
    if model is not None:
        mode = None if asked.mode is None else Mode.parse(asked.mode)
        whole = files.read_model()
        kinds = files.kinds_of(whole)
        found = models.ModelTable.of(
            whole, kinds, asked.shape_for, targets, mode=mode, kernel=kernel, everything=everything
        )
        show(as_json, found.to_json(), found.parts())
        raise typer.Exit(0 if found.is_served else 2)
    options.check_encoder(asked.encoder_len, model)
    if layer_kind:
        files.read()  # which says that there is no model
    read = files.files.read() if files.files else None
    answers = {str(where): _answered(asked, where, read, files.source(), kernel) for where in targets}
    data = {name: _json(*answer) for name, answer in answers.items()}
    show(as_json, data if len(data) > 1 else next(iter(data.values())), _parts(list(answers.values()), everything))
    raise typer.Exit(0 if all(resolution.plan for resolution, _ in answers.values()) else 2)


Answer = tuple[Resolution, Asked | None]


def _json(resolution: Resolution, asked: Asked | None) -> dict[str, Any]:
    return {**resolution.to_json(), **({} if asked is None else {"config": asked.to_json()})}


def _parts(answers: list[Answer], everything: bool) -> Iterator[RenderableType]:
    for number, answer in enumerate(answers):
        yield from ["", ""] if number else []
        yield from resolution_parts(*answer, everything=everything)


def _answered(asked: RequestOptions, target: Target, read: AttentionConfig | None, source: str, kernel: str) -> Answer:
    """Resolves one request, and says what of it came from the config."""
    config = AttentionConfig() if read is None else read
    options.check_axes(config, asked.sharding)
    phase = asked.phase
    kv_len = asked.q_len if asked.kv_len is None else asked.kv_len
    sizes = ModelShape(q_len=1, max_len=1, **asked.heads_for(config)).of(config)  # type: ignore[arg-type]
    q_heads, kv_heads, head_dim, value_dim = sizes.heads
    extent = Extent(batch=asked.batch, q_heads=q_heads, kv_heads=kv_heads, q_len=asked.q_len, kv_len=kv_len)
    names: dict[str, Callable[..., Mask]] = {**installed.registry().masks}
    anywhere = extent.q_len != extent.kv_len
    said: dict[str, Any] = {"mask": parse_form("causal", anywhere=anywhere)}
    if read is not None:
        own, said = _said_by(read, asked, extent)
        names["config"] = lambda: own
    form = None if asked.mask is None else parse_form(asked.mask, names, anywhere=anywhere)
    written = {"mask": form, "soft_cap": asked.soft_cap, "sinks": asked.sinks}
    given = {name: value for name, value in written.items() if value is not None}
    cut = sharding_in(phase, config) if asked.sharding is None else asked.sharding or None
    request = Request(
        target=target,
        mode=phase,
        **dataclasses.asdict(extent),
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=_dtype(asked.dtype),
        partial=asked.partial,
        kv_quantization=asked.kv_quantization,
        page_size=asked.page_size,
        kv_layout=asked.kv_layout,
        context_parallel=asked.context_parallel,
        sharding=cut,
        **{**said, **given},
    )
    resolution = explain_request(request, kernel=kernel, policy=None if read is None else read.policy)
    if read is None:
        return resolution, None
    uses_own = asked.mask is not None and "config" in names_in(asked.mask)
    return resolution, Asked.of(source, said, {**given, "mask": said["mask"]} if uses_own else given)


def _said_by(read: AttentionConfig, asked: RequestOptions, extent: Extent) -> tuple[Mask, dict[str, Any]]:
    """The mask of a config, and the fields of a request that it says."""
    own = mask_of(read, asked.phase, extent)
    if asked.page_size is not None:
        own = _mask_of_pages(read, extent, asked.page_size)
    fields = options_in(asked.phase, read, partial=asked.partial, from_cache=asked.page_size is not None).fields()
    bias = (1, extent.q_heads, extent.q_len, extent.kv_len) if read.bias else None
    said = {name: value for name, value in fields.items() if name not in ("mode", "partial")}
    return own, {"mask": own.form, "sinks": read.sinks and not asked.partial, "bias": bias, **said}


def _mask_of_pages(config: AttentionConfig, extent: Extent, page_size: int) -> Mask:
    """The mask that a paged cache asks for, as in `lock` and `check`."""
    shape = ModelShape(
        q_len=extent.q_len,
        max_len=extent.kv_len,
        batch=extent.batch,
        q_heads=extent.q_heads,
        kv_heads=extent.kv_heads,
        cache=CacheShape(CacheKind.PAGED, page_size),
    )
    [(mask, _, _)] = cached(config, shape, extent.q_len)
    return mask


def _dtype(name: str) -> str:
    import jax.numpy as jnp

    try:
        return dtype_name(jnp.dtype(name))
    except TypeError:
        instead = spelled(name) or "; write e.g. 'bfloat16' or 'float32'"
        raise typer.BadParameter(f"--dtype {name!r} is unknown{instead}") from None
