"""The command's verbs list and doctor, and how it runs; each of the other verbs has its own module."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kernelry import _version
from kernelry.cli import check, conformance, explain, lock, mask, new_plugin, report, tune
from kernelry.cli.output import Json, show, survive_narrow_encodings
from kernelry.errors import KernelryError, followed, sentence
from kernelry.policy.policy import Switches
from kernelry.registry import installed
from kernelry.registry.contents import backend_fault

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


app.command("explain")(explain.explain)
app.command("mask")(mask.draw)
app.command("lock")(lock.lock)
app.command("check")(check.check)
app.command("tune")(tune.tune)
app.command("conformance")(conformance.check)
app.command("new-plugin")(new_plugin.write)
