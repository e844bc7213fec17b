"""The command's verbs list, doctor and explain, and how it runs; each of the other verbs has its own module."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kernelry import _version
from kernelry.cli import check, conformance, lock, mask, options, report
from kernelry.cli.output import Json, show, survive_narrow_encodings
from kernelry.config.layer import AttentionConfig
from kernelry.errors import KernelryError, followed, sentence
from kernelry.kernel.spec import AUTO
from kernelry.masks import Mask
from kernelry.masks.base import Extent
from kernelry.masks.parse import names_in, parse_form
from kernelry.phases.calls import cached, mask_of, options_in, sharding_in
from kernelry.phases.model_shape import LARGEST_SIZE, CacheKind, CacheShape, ModelShape
from kernelry.policy.policy import Switches
from kernelry.registry import installed
from kernelry.registry.contents import backend_fault
from kernelry.request.checks import spelled
from kernelry.request.request import Mode, Request, dtype_name
from kernelry.request.target import Target, home_target
from kernelry.resolution.resolver import explain as explain_request

app = typer.Typer(
    help="Which attention kernels are installed, what is wrong with them, which one a request gets.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def run() -> int:
    """Runs the command and returns its exit status: 2 for an error of kernelry, which is printed as one message."""
    survive_narrow_encodings()
    with warnings.catch_warnings():
        # Faults are what `doctor` prints; the other verbs point there.
        warnings.filterwarnings("ignore", message="kernelry plugin ")
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
        try:
            result = app(standalone_mode=False)
        except KernelryError as error:
            sys.stderr.write(f"{error}\n")
            return 2
        except typer.Exit as stop:
            return stop.exit_code
        except typer.Abort:
            return 1
        except Exception as error:
            return _status_of(error)
    return result if isinstance(result, int) else 0


def _status_of(error: Exception) -> int:
    """Prints a usage error, or that JAX can use no device, which makes everything fail that asks JAX for one."""
    if hasattr(error, "exit_code") and hasattr(error, "show"):
        error.show()
        return int(error.exit_code)
    fault = backend_fault()
    if fault is None:
        raise error
    sys.stderr.write(f"{sentence(followed(fault.detail, fault.fix))}\n")
    return 2


def _show_warning(
    otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any, **more: Any
) -> None:
    """Writes a warning for users as one line; others are shown with their place in the source."""
    if category is UserWarning:
        sys.stderr.write(f"warning: {message}\n")
    else:
        otherwise(message, category, *where, **more)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"kernelry {_version.__version__}\n")
        raise typer.Exit


@app.command("list")
def list_kernels(as_json: Json = False) -> None:
    """The installed kernels and what they declare."""
    found = installed.registry()
    show(as_json, report.kernels_json(found), report.kernels_parts(found))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, plugins, environment switches, and what is wrong, with a fix for each fault."""
    found, switches = installed.registry(), Switches.unchecked()
    show(as_json, report.doctor_json(found, switches), report.doctor_parts(found, switches))
    raise typer.Exit(1 if report.all_faults(found, switches) else 0)


def _usable_cap(soft_cap: float | None) -> float | None:
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise typer.BadParameter(f"must be a finite number above 0, got {soft_cap}; leave it out for no cap")
    return soft_cap


@app.command()
def explain(
    target: Annotated[str, typer.Option(help="platform[:kind[:topology]], e.g. gpu:h100; default: this machine.")] = "",
    mode: Annotated[str, typer.Option(help="train, prefill or decode.")] = "train",
    q_len: Annotated[int, typer.Option(min=0, max=LARGEST_SIZE, help="T, query tokens.")] = 1024,
    kv_len: Annotated[int | None, typer.Option(min=0, max=LARGEST_SIZE, help="S, key tokens; default T.")] = None,
    batch: Annotated[int, typer.Option(min=0, max=LARGEST_SIZE, help="B.")] = 1,
    heads: Annotated[int, typer.Option(min=1, max=LARGEST_SIZE, help="N, query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_SIZE, help="K, key/value heads; default N.")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, max=LARGEST_SIZE, help="H.")] = 128,
    value_dim: Annotated[int | None, typer.Option(min=1, max=LARGEST_SIZE, help="D; default H.")] = None,
    dtype: Annotated[str, typer.Option(help="of query, key and value.")] = "bfloat16",
    mask: Annotated[
        str | None,
        typer.Option(
            help="e.g. 'causal & segments', 'window(511)', 'full', or with the word config for the config's own mask: "
            "'config & segments'; default: the config's, causal without a config. Where T and S differ, a mask without "
            "positions, as in 'causal.at(query_offset=7)', may be at any."
        ),
    ] = None,
    soft_cap: Annotated[
        float | None, typer.Option(help="cap of the logits; default: the config's.", callback=_usable_cap)
    ] = None,
    sinks: Annotated[
        bool | None, typer.Option("--sinks/--no-sinks", help="one sink logit per head; default: the config's.")
    ] = None,
    kv_quantization: Annotated[str | None, typer.Option(help="of keys and values, e.g. int8, int4:head_dim.")] = None,
    page_size: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_SIZE, help="slots of a page, for paged keys and values.")
    ] = None,
    context_parallel: Annotated[
        str | None, typer.Option(help="what a kernel does across devices itself, e.g. ring:context:4.")
    ] = None,
    sharding: options.Shards = None,
    partial: Annotated[bool, typer.Option("--partial", help="return a Partial, with statistics.")] = False,
    kernel: Annotated[str, typer.Option(help="a kernel's name, absolutely, or auto.")] = AUTO,
    config: Annotated[
        Path | None,
        typer.Option(
            help="a config whose [attention] table decides, and whose mask, scale, soft cap, sinks, MoBA, dropout, "
            "logits_dtype, precision and largest logits are asked for; options given here take precedence."
        ),
    ] = None,
    maxtext: options.MaxText = None,
    ignore: options.Ignored = None,
    as_json: Json = False,
) -> None:
    """Which kernel a request gets and why, on hardware that need not be present. Status 2: none."""
    files = options.ConfigFiles(config, maxtext, ignore)
    read = files.read() if files else None
    phase = Mode.parse(mode)
    extent = Extent(
        batch=batch,
        q_heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        q_len=q_len,
        kv_len=q_len if kv_len is None else kv_len,
    )
    names: dict[str, Callable[..., Mask]] = {**installed.registry().masks}
    anywhere = extent.q_len != extent.kv_len
    said: dict[str, Any] = {"mask": parse_form("causal", anywhere=anywhere)}
    if read is not None:
        own = mask_of(read, phase, extent) if page_size is None else _mask_of_pages(read, extent, page_size)
        names["config"] = lambda: own
        fields = options_in(phase, read, partial=partial, from_cache=page_size is not None).fields()
        fields = {name: value for name, value in fields.items() if name not in ("mode", "partial")}
        said = {"mask": own.form, "sinks": read.sinks and not partial, **fields}
    form = None if mask is None else parse_form(mask, names, anywhere=anywhere)
    written = {"mask": form, "soft_cap": soft_cap, "sinks": sinks}
    given = {name: value for name, value in written.items() if value is not None}
    request = Request(
        target=Target.parse(target) if target else home_target(),
        mode=phase,
        **dataclasses.asdict(extent),
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
        dtype=_dtype(dtype),
        partial=partial,
        kv_quantization=kv_quantization,
        page_size=page_size,
        context_parallel=context_parallel,
        sharding=sharding_in(phase, read) if sharding is None and read is not None else sharding or None,
        **{**said, **given},
    )
    resolution = explain_request(request, kernel=kernel, policy=None if read is None else read.policy)
    instead = given if mask is None or "config" not in names_in(mask) else {**given, "mask": said["mask"]}
    asked = None if read is None else report.Asked.of(files.source(), said, instead)
    data = {**resolution.to_json(), **({} if asked is None else {"config": asked.to_json()})}
    show(as_json, data, report.resolution_parts(resolution, asked))
    raise typer.Exit(0 if resolution.plan else 2)


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


app.command("mask")(mask.draw)
app.command("lock")(lock.lock)
app.command("check")(check.check)
app.command("conformance")(conformance.check)


def _dtype(name: str) -> str:
    import jax.numpy as jnp

    try:
        return dtype_name(jnp.dtype(name))
    except TypeError:
        instead = spelled(name) or "; write e.g. 'bfloat16' or 'float32'"
        raise typer.BadParameter(f"--dtype {name!r} is unknown{instead}") from None
