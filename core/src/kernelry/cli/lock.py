"""The verb `lock`: writes the resolutions of a config to a file, or checks that they stand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kernelry.cli import shape
from kernelry.cli.output import Json, print_json
from kernelry.config import load_config
from kernelry.lock import Lock
from kernelry.phases import resolve_phases
from kernelry.policy import Policy
from kernelry.resolver import explain
from kernelry.switches import LOCK_FILE


def lock(
    config: Annotated[Path, typer.Argument(help="a config whose [attention] table decides.")],
    target: Annotated[str, typer.Option(help="platform[:kind[:topology]]; default: this machine.")] = "",
    q_len: shape.QueryLength = 1024,
    max_len: shape.MaxLength = None,
    batch: shape.Batch = 1,
    heads: shape.Heads = 8,
    kv_heads: shape.KVHeads = None,
    head_dim: shape.HeadDim = 128,
    value_dim: shape.ValueDim = None,
    dtype: shape.DType = "bfloat16",
    two_part: shape.TwoPart = False,
    file: Annotated[Path, typer.Option(help="the lock file.")] = Path(LOCK_FILE),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; status 1 when a resolution changed.")] = False,
    as_json: Json = False,
) -> None:
    """The kernels of train, prefill and decode, written down for strict mode; --check compares."""
    read = load_config(config)
    if check:
        _check(Lock.read(file), read.policy, as_json)
        return
    sizes = shape.model_shape(q_len, max_len, batch, heads, kv_heads, head_dim, value_dim, dtype, two_part)
    phases = resolve_phases(read, sizes, target=target or None)
    locked = Lock.of(phases.all)
    locked.write(file)
    if as_json:
        print_json({"file": str(file), **locked.to_json(), "disagreements": list(phases.disagreements)})
        return
    for entry in locked.entries:
        sys.stdout.write(f"{entry.request.mode.value}: {entry.choice}\n")
    for text in phases.disagreements:
        sys.stdout.write(f"disagreement: {text}\n")


def _check(locked: Lock, policy: Policy, as_json: bool) -> None:
    """Asks every locked request again, so that no option needs repeating."""
    found = [locked.difference(explain(entry.request, policy=policy)) for entry in locked.entries]
    differences = [text for text in found if text is not None]
    if as_json:
        print_json({"file": locked.source, "checked": len(found), "differences": differences})
    else:
        sys.stdout.write("".join(f"{text}\n" for text in differences) or f"{len(found)} resolutions stand.\n")
    raise typer.Exit(1 if differences else 0)
