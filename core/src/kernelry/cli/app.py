"""The command: its verbs, what it does with errors, and its exit statuses."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Annotated, Any, final

import typer
import typer.core
import typer.main

from kernelry import _version
from kernelry.cli import completion
from kernelry.cli.output import survive_narrow_encodings
from kernelry.errors import KernelryError, followed, nearest, sentence
from kernelry.registry.contents import backend_fault

VERBS = {
    "list": ("kernels:show_list", "The installed kernels, and what they declare."),
    "doctor": ("doctor:doctor", "What this machine has, what extras would add, and what is wrong."),
    "explain": ("explain:explain", "Which kernel a request or a model gets, and why."),
    "mask": ("mask:draw", "Draws a mask."),
    "lock": ("lock:lock", "Writes down which kernels a config or a model gets, or compares."),
    "check": ("check:check", "Compiles a config or a model for TPUs and GPUs."),
    "tune": ("tune:tune", "Finds and stores the fastest kernels on this device."),
    "bench": ("bench:bench", "Times kernels on this device."),
    "conformance": ("conformance:check", "Tests kernels against what they declare."),
    "new-plugin": ("new_plugin:write", "Writes a plugin distribution with a kernel that works."),
    "schema": ("schema:schema", "Prints the JSON schema of configs, for editors."),
}
"""The module and the function of each verb, and its line in the help; a module is imported when its verb is used."""

STATUSES = """Exit status: 0 all is well; 1 the command ran and found something wrong; 2 wrong usage, an error of
kernelry, or no kernel serves the request; 130 interrupted; 141 what reads the output was closed."""

_SETTINGS: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}


@final
class _Verb(typer.core.TyperCommand):
    """A verb that is imported when it is used: to list verbs needs none of them."""

    def __init__(self, name: str) -> None:
        self._place, line = VERBS[name]
        super().__init__(name, help=line, short_help=line, rich_markup_mode=None)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        module, _, function = self._place.partition(":")
        verb = typer.Typer(add_completion=False, **_SETTINGS)
        verb.command(self.name)(getattr(importlib.import_module(f"kernelry.cli.{module}"), function))
        return typer.main.get_command(verb).make_context(info_name, args, parent, **extra)


@final
class _Verbs(typer.core.TyperGroup):
    """The verbs of the table."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _Verb(cmd_name) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in VERBS and not name.startswith("-") and not ctx.resilient_parsing:
            ctx.fail(sentence(f"there is no verb {name!r}{nearest(name, VERBS)}"))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Verbs,
    help="Which attention kernels are installed, what is wrong with them, which one a request gets.",
    epilog=STATUSES,
    **_SETTINGS,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        sys.stdout.write(f"kernelry {_version.__version__}\n")
    elif context.invoked_subcommand is None:
        sys.stdout.write(f"{context.get_help()}\n")


def run(name: str = "kernelry") -> int:
    """Runs the command and returns its exit status; an error of kernelry is printed as one message.

    Args:
      name: the command's, for messages about its usage.
    """
    survive_narrow_encodings()
    otherwise = sys.unraisablehook
    sys.unraisablehook = functools.partial(_unraisable, otherwise)
    try:
        with warnings.catch_warnings():
            # Faults are what `doctor` prints; the other verbs point there.
            warnings.filterwarnings("ignore", message="kernelry plugin ")
            warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
            status = _status(name)
        sys.stdout.flush()
    except BrokenPipeError:
        return _unread()
    except OSError as error:
        return _unwritten(error)
    except KeyboardInterrupt:
        status = 130
    finally:
        sys.unraisablehook = otherwise
    return status


def _status(name: str) -> int:
    try:
        with completion.answered():
            result = app(prog_name=name, standalone_mode=False)
    except KernelryError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort as stop:
        return 130 if isinstance(stop.__cause__, KeyboardInterrupt) else 1
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich and click raise it in its place
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else 0
    except OSError:
        raise
    except Exception as error:
        return _status_of(error)
    return result if isinstance(result, int) else 0


def _unread() -> int:
    """The status where what reads the output was closed, as `| head` is: that of a shell for SIGPIPE."""
    _leave_the_rest()
    return 141


def _unwritten(error: OSError) -> int:
    """The status where a file or the output could not be read or written, e.g. as the disk is full."""
    _leave_the_rest()
    where = "the output" if error.filename is None else error.filename
    sys.stderr.write(f"cannot read or write {where}: {error.strerror or error}; free space there, or name another.\n")
    return 2


def _leave_the_rest() -> None:
    """What is left of the output is flushed when Python ends: to nowhere."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unraisable(otherwise: Callable[[Any], object], ignored: Any) -> None:
    """Interrupts once more where Ctrl-C met a callback of the garbage collector, as JAX has one: it is lost there."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        again = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
        again.daemon = True
        again.start()
    else:
        otherwise(ignored)


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
