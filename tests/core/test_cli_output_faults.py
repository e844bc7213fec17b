"""Output that cannot be written, an interrupt that is lost, and a bench that has nothing to time."""

import signal
import sys
import types

import numpy as np
import pytest

from kernelry import cli
from kernelry.bench.truth import _error
from kernelry.cli import app


class _Full:
    encoding = "utf-8"

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        pass


def test_a_full_disk_is_a_message_and_status_two(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernelry", "schema"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "stdout", _Full())
    assert cli.main() == 2
    assert capsys.readouterr().err.startswith("cannot read or write the output: No space left on device")


def test_an_interrupt_that_a_callback_loses_is_raised_again(monkeypatch):
    lost = types.SimpleNamespace(exc_type=KeyboardInterrupt)
    raised, told = [], []

    class Timer:
        daemon = False

        def __init__(self, seconds, function, arguments):
            self.call = function, arguments

        def start(self):
            raised.append(self.call)

    monkeypatch.setattr(app.threading, "Timer", Timer)
    app._unraisable(told.append, lost)
    assert raised == [(signal.raise_signal, [signal.SIGINT])]
    assert not told
    app._unraisable(told.append, other := types.SimpleNamespace(exc_type=ValueError))
    assert told == [other]


def test_a_bench_of_a_kernel_that_refuses_is_a_fault(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    (tmp_path / "c.toml").write_text('[attention]\nkernel = "splash"\n')
    sizes = ("--q-len", "8", "--heads", "1", "--head-dim", "8", "--pass", "forward", "--turns", "1")
    monkeypatch.setattr(sys, "argv", ["kernelry", "bench", str(tmp_path / "c.toml"), *sizes])
    assert cli.main() == 1
    assert "auto serves no case" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_rounding_of_a_gradient_that_is_zero_is_no_error(scale):
    truth = scale * np.random.default_rng(0).standard_normal((1, 16, 2, 8)).astype(np.float32)
    truth[:, 0] = 0
    assert _error(truth + scale * 1e-6, truth) < 1e-4
    wrong = truth.copy()
    wrong[:, 0] = scale
    assert _error(wrong, truth) > 0.5
