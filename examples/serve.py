"""Serves many requests from one paged cache, with every storage type, and checks each byte of the answers.

python examples/serve.py
python examples/serve.py --requests 4 --quick

Trains a small language model for a few seconds, then continues prompts that arrive over time:
continuous batching with chunked prefill, eviction, preemption and, with --system, a system prompt
whose pages all sequences share. Each answer is compared with the same prompt continued alone, in
float32 and without pages.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence as Many

import jax.numpy as jnp
import numpy as np
from lm.data import load_text
from lm.generate import greedy
from lm.model import Decoder
from lm.serving import Request, Server, ServerSettings
from lm.settings import ModelSettings, Settings, TrainingSettings
from lm.train import train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

STORAGES = ("float32", "bfloat16", "int8", "int4", "float8_e4m3fn")
EXACT = "float32"  # in it serving changes no byte
PROMPTS = (24, 150, 60, 100)  # bytes; few different ones, since each is compiled when continued alone
ARRIVALS = 3  # a request every so many steps
DIFFERENT = 1  # the exit status where a float32 answer differs


@dataclasses.dataclass(frozen=True)
class Report:
    """How requests fared with one storage.

    Args:
      seconds: from the first step to the last, without compiling.
      tokens: produced.
      cache_bytes: of all pages and the table.
      equal: the share of bytes that are those of the prompts continued alone in float32.
      difference: the largest of any logit, up to the first byte that differs.
    """

    storage: str
    server: Server
    seconds: float
    tokens: int
    cache_bytes: int
    equal: float | None = None
    difference: float | None = None


def main(arguments: Many[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    model = trained(options.steps, options.seed, console)
    settings = server_settings(options)
    asked = requests(options.requests, options.length, options.seed)
    alone = continued_alone(model, asked, settings.system) if options.verify else None
    reports = []
    for storage in options.storages:
        report = serve(model, asked, dataclasses.replace(settings, storage=storage), console)
        reports.append(report if alone is None else compared(report, alone))
    console.print(table_of(reports))
    example = reports[0].server.done[0]
    shown = bytes(example.tokens).decode(errors="replace").splitlines()
    console.print("request 0:", *shown, sep="\n  ", markup=False, highlight=False)
    exact = [report for report in reports if report.storage == EXACT and report.equal not in (None, 1.0)]
    return DIFFERENT if exact else 0


def trained(steps: int, seed: int, console: Console) -> Decoder:
    """Returns a model that has seen some text, so that its answers are not noise."""
    model = Decoder(ModelSettings(), Settings().attention, seed=seed)
    if steps < 1:
        return model
    training = TrainingSettings(seq_len=256, steps=steps, evaluate_every=steps, evaluation_windows=4, seed=seed)
    history = list(train(model, load_text(), training))
    console.print(f"{model.size:,} parameters, trained {steps} steps: {history[-1].held_out:.2f} nats per byte")
    return model


def requests(count: int, length: int, seed: int) -> list[Request]:
    """Cuts prompts of different lengths from text the model has not seen, one arriving after another."""
    text, rng = load_text().held_out, np.random.default_rng(seed)
    made = []
    for name in range(count):
        size = PROMPTS[name % len(PROMPTS)]
        at = int(rng.integers(0, len(text) - size))
        share = (4, 2, 3)[name % 3]
        made.append(Request(name, tuple(text[at : at + size].tolist()), max(1, length * share // 4), name * ARRIVALS))
    return made


def serve(model: Decoder, asked: list[Request], settings: ServerSettings, console: Console) -> Report:
    """Serves all requests under a progress bar."""
    server = Server(model, settings)
    server.warm_up()
    server.submit(asked)
    columns = (
        TextColumn(f"{settings.storage:14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
    )
    started = time.perf_counter()

    def tokens() -> int:
        return sum(len(one.produced) for one in (*server.done.values(), *server.running, *server.waiting))

    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(asked), state="")

        def show(server: Server) -> None:
            pages = f"{server.steps[-1].pages_used:3d} of {settings.pages} pages"
            speed = tokens() / (time.perf_counter() - started)
            progress.update(task, completed=len(server.done), state=f"{pages}  {speed:,.0f} tokens/s")

        server.run(show)
    return Report(settings.storage, server, time.perf_counter() - started, tokens(), server.cache.bytes)


Alone = dict[int, tuple[np.ndarray, np.ndarray]]


def continued_alone(model: Decoder, asked: list[Request], system: tuple[int, ...]) -> Alone:
    """Continues each prompt by itself, without pages: the bytes and their logits."""
    longest = max(request.length for request in asked)  # one length, since each is compiled
    answers: Alone = {}
    for request in asked:
        prompt = jnp.asarray([[*system, *request.prompt]], jnp.int32)
        tokens, logits = greedy(model, prompt, length=longest)
        answers[request.name] = np.asarray(tokens[0, : request.length]), np.asarray(logits[0, : request.length])
    return answers


def compared(report: Report, alone: Alone) -> Report:
    """Counts the bytes that are the same, and how far logits are apart where all bytes before them are."""
    same, largest = 0, 0.0
    for name, (tokens, logits) in alone.items():
        found = report.server.done[name]
        equal = np.array(found.produced) == tokens
        same += int(equal.sum())
        upto = len(equal) if equal.all() else int(equal.argmin()) + 1
        largest = max(largest, float(np.abs(np.stack(found.logits[:upto]) - logits[:upto]).max()))
    return dataclasses.replace(report, equal=same / report.tokens, difference=largest)


def table_of(reports: list[Report]) -> Table:
    """Lays the reports out for the terminal."""
    table = Table(title="One paged cache, against each prompt continued alone in float32", title_justify="left")
    for name in ("storage", "tokens/s", "cache bytes", "same bytes", "logits off by"):
        table.add_column(name, justify="left" if name == "storage" else "right")
    for name in ("steps", "chunks", "preempted", "most pages"):
        table.add_column(name, justify="right")
    for report in reports:
        steps = report.server.steps
        table.add_row(
            report.storage,
            f"{report.tokens / report.seconds:,.0f}",
            f"{report.cache_bytes:,}",
            "" if report.equal is None else f"{report.equal:.1%}",
            "" if report.difference is None else f"{report.difference:.2g}",
            str(len(steps)),
            str(sum(step.chunk_of is not None for step in steps)),
            str(sum(len(step.preempted) for step in steps)),
            f"{max(step.pages_used for step in steps)} of {report.server.settings.pages}",
        )
    return table


def server_settings(options: argparse.Namespace) -> ServerSettings:
    """The cache and the steps that the options ask for."""
    return ServerSettings(
        rows=options.rows,
        pages=options.pages,
        page_size=options.page_size,
        max_length=len(options.system.encode()) + max(PROMPTS) + options.length,
        chunk=options.chunk,
        system=tuple(options.system.encode()),
    )


QUICK = {"steps": 10, "requests": 6, "length": 12, "rows": 4, "pages": 20, "storages": ("float32", "int8")}
FULL = {"steps": 80, "requests": 24, "length": 48, "rows": 8, "pages": 40, "storages": STORAGES}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action=_Quick, help="a small run")
    parser.add_argument("--steps", type=int, help="of training; 0 serves an untrained model")
    parser.add_argument("--requests", type=int, help="how many")
    parser.add_argument("--length", type=int, help="the most bytes to add to a prompt")
    parser.add_argument("--rows", type=int, help="sequences at a time")
    parser.add_argument("--pages", type=int, help="of the cache; fewer preempt more")
    parser.add_argument("--page-size", type=int, default=16, help="tokens of a page (default: 16)")
    parser.add_argument("--chunk", type=int, default=32, help="bytes of a prompt read in one step (default: 32)")
    parser.add_argument("--storages", nargs="+", choices=STORAGES, metavar="STORAGE", help=", ".join(STORAGES))
    parser.add_argument("--system", default="", help="a system prompt, whose pages all sequences share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not continue the prompts alone")
    parser.set_defaults(**FULL)
    return parser


class _Quick(argparse.Action):
    """Replaces the defaults that no other option has replaced."""

    def __init__(self, *names: str, **settings: object) -> None:
        super().__init__(*names, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, *_: object) -> None:
        for name, value in QUICK.items():
            if getattr(options, name) == FULL[name]:
                setattr(options, name, value)


if __name__ == "__main__":
    raise SystemExit(main())
