"""Trains a small language model whose attention kernels kernelry chooses.

python examples/train_lm.py --config examples/configs/tiny.toml
python examples/train_lm.py --config examples/configs/tiny.toml --mesh data:2,context:4

Says which kernel every kind of layer gets in training, prefill and decode, and why, before
anything runs; a config that no kernel can serve stops there. Then trains, generates text, and
writes runs/<name>/{loss.png, resolutions.json, metrics.jsonl}.

With --mesh all of it runs on several devices, which the CPU simulates: rows are cut over `data`, heads over `tensor`,
and tokens over `context`, in training and in the prompt; a decode step has its query on all of `context`, and the keys
of its cache cut. The prompt is continued once for each device along `data`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from flax import nnx
from lm.choices import choices, table_of
from lm.data import load_text
from lm.generate import continue_text
from lm.mesh import MeshSettings, of_parameter, placed, simulate_devices
from lm.model import Decoder
from lm.report import plot_losses, write_metrics, write_resolutions
from lm.settings import Settings
from lm.train import Metrics, train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from kernelry.errors import KernelryError

CANNOT = 2  # the exit status for a config that is wrong or that no kernel can serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    console = _console()
    try:
        settings = _settings(options)
        with _mesh(options.mesh, settings):
            run(settings, options.runs, console)
    except KernelryError as error:
        Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
        return CANNOT
    return 0


def run(settings: Settings, runs: Path, console: Console) -> None:
    """Shows the choices, trains, generates, writes."""
    model = _model(settings)
    made = choices(model, settings)
    console.print(table_of(made))
    folder = runs / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    write_resolutions(folder / "resolutions.json", made)

    text = load_text()
    console.print(
        f"{model.size:,} parameters; {len(text.training):,} bytes to train on, {len(text.held_out):,} held out"
    )
    history = _watched(train(model, text, settings.training), settings.training.steps, console)
    write_metrics(folder / "metrics.jsonl", history)
    plot_losses(folder / "loss.png", history, settings, made, model.size)

    for continuation in continue_text(model, settings.generation, settings.training.seed):
        console.print(Text.assemble((settings.generation.prompt, "bold"), continuation), "", sep="\n")
    console.print(f"wrote {folder}/loss.png, resolutions.json and metrics.jsonl")


def _mesh(text: str | None, settings: Settings) -> contextlib.AbstractContextManager[object]:
    """The mesh of a run, active; simulated on a CPU."""
    if text is None:
        return contextlib.nullcontext()
    mesh = MeshSettings.parse(text)
    mesh.check(settings)
    simulate_devices(mesh.devices)
    return jax.set_mesh(mesh.make())


def _model(settings: Settings) -> Decoder:
    """The model before training, on the active mesh if there is one."""
    model = Decoder(settings.model, settings.attention, seed=settings.training.seed)
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        nnx.update(model, placed(nnx.state(model, nnx.Param), mesh, of_parameter(mesh)))
    return model


def _console() -> Console:
    """The terminal; a file or a pipe gets lines wide enough for the table."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _watched(metrics: Iterable[Metrics], steps: int, console: Console) -> list[Metrics]:
    """Runs the training under a progress bar; prints the held-out losses."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    history = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("training", total=steps, state="compiling")
        for now in metrics:
            history.append(now)
            if now.held_out is not None:
                console.print(f"step {now.step:4d}  held-out loss {now.held_out:.3f} nats per byte")
            if now.loss is not None:
                state = f"loss {now.loss:.3f}  {now.tokens_per_second:,.0f} tokens/s"
                progress.update(task, completed=now.step, state=state)
    first, last = history[0].held_out, history[-1].held_out
    if first is not None and last is not None:
        console.print(f"held-out loss {first:.3f} → {last:.3f} nats per byte ({last / math.log(2):.2f} bits)")
    return history


def _settings(options: argparse.Namespace) -> Settings:
    settings = Settings.load(options.config)
    if options.name is not None:
        settings = dataclasses.replace(settings, name=options.name)
    if options.steps is not None:
        settings = dataclasses.replace(settings, training=dataclasses.replace(settings.training, steps=options.steps))
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a TOML file, e.g. examples/configs/tiny.toml")
    parser.add_argument("--steps", type=int, help="instead of training.steps")
    parser.add_argument(
        "--mesh", help="devices along data, tensor and context, e.g. data:2,context:4; a CPU simulates them"
    )
    parser.add_argument("--name", help="instead of the config's name")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder for runs (default: runs)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
