"""Trains the example model over several processes: rows, heads and tokens are cut over one mesh of all their devices.

On this machine, two processes of two simulated CPU devices each, which find each other over loopback:

    python examples/multihost_train.py --processes 2 --devices 2 --mesh data:2,context:2

On a cluster, in every process (docs/mesh.md says how they are started under Slurm, on GKE and on TPU slices):

    python examples/multihost_train.py --distributed --mesh data:2,tensor:2,context:2

There are two runs. In `packed` a row holds several paragraphs, which do not see each other. In `balanced` each device
along `context` has a chunk from both ends of a sequence (`dual_chunk`), so that all have as much to do. The layers are
a scan, and each keeps only what is named `context` for its backward pass.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from lm.choices import on_mesh
from lm.data import Batch, batches, load_text
from lm.launch import LaunchError, launch
from lm.mesh import ROWS, MeshSettings, of_parameter, of_tokens, placed, simulate_devices
from lm.model import Decoder
from lm.scanned import ScannedDecoder
from lm.settings import ModelSettings, Settings, TrainingSettings

import kernelry
from kernelry.errors import KernelryError
from kernelry.parallel import Sharding, load_balanced_order

SETTINGS = Settings(
    model=ModelSettings(layers=("local", "global") * 2, window=32, width=64, head_dim=16, hidden=128),
    training=TrainingSettings(seq_len=256, batch=4, learning_rate=0.1, evaluation_windows=4),
)
RUNS = {"packed": "contiguous", "balanced": "dual_chunk"}
"""The order of tokens of each run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.process is None and options.processes > 1:
            launch(Path(__file__), _of_each(options), options.processes, seconds=options.time_limit)
            return 0
        mesh = MeshSettings.parse(options.mesh)
        mesh.check(SETTINGS)
        _join(options)
        losses = {name: run(name, mesh, options.steps) for name in RUNS}
    except (KernelryError, LaunchError) as error:
        raise SystemExit(f"multihost_train: {error}") from None
    if options.output is not None and jax.process_index() == 0:
        options.output.write_text(json.dumps(losses) + "\n", encoding="utf-8")
    return 0


def run(name: str, settings: MeshSettings, steps: int) -> list[float]:
    """Trains from the beginning; returns the loss before each step."""
    mesh = settings.make()
    sharding = Sharding(batch=ROWS.batch, heads=ROWS.heads, sequence=ROWS.sequence, order=RUNS[name])
    with jax.set_mesh(mesh):
        model = ScannedDecoder(Decoder(SETTINGS.model, SETTINGS.attention, seed=SETTINGS.training.seed))
        parameters = placed(model.parameters, mesh, of_parameter(mesh))
        cut = (placed(batch, mesh, of_tokens) for batch in itertools.islice(_batches(name, settings), steps))
        first = next(cut)
        with kernelry.record() as resolutions:
            step = _compiled(model, sharding, parameters, first)
        _say(*dict.fromkeys(map(_told, resolutions)))
        losses = []
        for batch in itertools.chain([first], cut):
            loss, parameters = step(parameters, batch)
            losses.append(float(loss))
            _say(f"{name}, step {len(losses)}: loss {losses[-1]:.6f} nats per byte")
    return losses


def _compiled(model: ScannedDecoder, sharding: Sharding, parameters: Any, batch: Batch) -> Any:
    """A step of training, which returns the loss before it and parameters that are cut as those before."""
    places = jax.tree.map(lambda array: array.sharding, parameters)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(None, places))
    def step(parameters: Any, batch: Batch) -> tuple[jax.Array, Any]:
        loss, gradient = jax.value_and_grad(model.loss)(parameters, batch, sharding)
        sgd = optax.sgd(SETTINGS.training.learning_rate)
        updates, _ = sgd.update(gradient, sgd.init(parameters))
        return loss, optax.apply_updates(parameters, updates)

    return step.lower(parameters, batch).compile()


def _batches(name: str, mesh: MeshSettings) -> Iterator[Batch]:
    """The same in every process: each device takes its part."""
    training = SETTINGS.training
    order = np.arange(training.seq_len)
    if RUNS[name] != "contiguous":
        order = load_balanced_order(training.seq_len, mesh.context, RUNS[name])
    for windows in batches(load_text().training, training.batch, training.seq_len, training.seed):
        yield Batch.of(windows, order, packed=name == "packed")


def _told(resolution: kernelry.Resolution) -> str:
    return "\n    ".join([f"{resolution.request.mask}: {resolution.kernel}", *on_mesh(resolution)])


def _say(*lines: str) -> None:
    if jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)


def _join(options: argparse.Namespace) -> None:
    """Joins the other processes; before JAX is first asked for devices."""
    if options.devices is not None:
        simulate_devices(options.devices)
    if options.process is not None:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    elif options.distributed:
        jax.distributed.initialize()


def _of_each(options: argparse.Namespace) -> list[str]:
    """The arguments that each process on this machine gets."""
    named = {"mesh": options.mesh, "steps": options.steps, "output": options.output, "devices": options.devices}
    return [f"--{name}={value}" for name, value in named.items() if value is not None]


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", required=True, help="devices along data, tensor and context, e.g. data:2,context:2")
    parser.add_argument("--steps", type=_positive, default=3, help="of each run (default: 3)")
    parser.add_argument("--output", type=Path, help="a JSON file for the losses")
    parser.add_argument("--distributed", action="store_true", help="this is one process of a cluster")
    parser.add_argument("--processes", type=_positive, default=1, help="start as many on this machine")
    parser.add_argument("--devices", type=_positive, help="CPU devices that each process simulates")
    parser.add_argument("--time-limit", type=float, default=300, help="of the processes on this machine, seconds")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)  # which of --processes this is
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
