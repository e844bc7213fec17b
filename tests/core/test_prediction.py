"""Predictions by another process: what happens where a job ends it, takes too long, or cannot be sent."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest

import kernelry
from kernelry import ModelShape
from kernelry.aot import NoCompilerError
from kernelry.aot.prediction import Candidate, predict
from kernelry.aot.worker import WorkerEndedError, answers
from kernelry.config.layer import AttentionConfig
from kernelry.errors import ConfigError, KernelryError
from kernelry.phases.calls import calls
from kernelry.plugin import Capabilities, KernelSpec, signature_of
from kernelry.request.target import Target

SUPPORT = Path(__file__).parents[1] / "support"
WORKER = (sys.executable, str(SUPPORT / "careless_worker.py"))
SHAPE = ModelShape(q_len=64, max_len=64, q_heads=2, head_dim=32, dtype="float32")


def _answers(jobs, limit=60.0, shared="shared"):
    return answers(shared, jobs, limit=limit, command=WORKER)


def _is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_job_that_ends_its_process_costs_no_other_answer():
    jobs = [("say", 0), ("say", 1), ("abort", "Unsupported DMA direction"), ("print", 2), ("exit", 3), ("say", 4)]
    before, first, aborted, second, ended, last = _answers(jobs)
    assert [first[:2], second[:2], last[:2]] == [("shared", 1), ("shared", 2), ("shared", 4)]
    assert before[2] == first[2]  # one process does them all
    assert len({first[2], second[2], last[2]}) == 3  # but for a new one after each that ended
    assert isinstance(aborted, WorkerEndedError)
    assert str(aborted) == (
        "the compiler ended its process: signal SIGABRT: F0000 00:00:00 compiler.cc:1] "
        "Check failed: Unsupported DMA direction"
    )
    assert str(ended).startswith("the compiler ended its process: status 3")


def test_a_job_that_takes_too_long_is_ended():
    slow, next_one = _answers([("sleep", 600), ("say", 1)], limit=2.0)
    assert str(slow) == "it took more than 2 s, and was ended"
    assert next_one[1] == 1


def test_an_interrupt_ends_the_process():
    found = _answers([("say", 1), ("say", 2)])
    _, _, process = next(found)
    with pytest.raises(KeyboardInterrupt):
        found.throw(KeyboardInterrupt)
    assert not _is_running(process)


@pytest.mark.parametrize(
    ("job", "error", "words"),
    [(("raise", "no such slice"), ConfigError, "no such slice"), (("unpicklable", 0), KernelryError, "OSError")],
)
def test_what_a_job_raises_is_raised(job, error, words):
    with pytest.raises(error, match=words):
        list(_answers([job]))


def test_what_cannot_be_pickled_is_said():
    with pytest.raises(ConfigError, match=r"cannot be sent to it .*at the top level of a module"):
        list(_answers([("say", lambda: 0)]))


def test_the_environment_of_a_process_that_compiles(monkeypatch, tmp_path):
    monkeypatch.setenv("KERNELRY_STRICT", "1")
    seen = (sys.executable, "-c", _SEES_ITS_ENVIRONMENT)
    [found] = answers(None, [0], limit=60.0, command=seen)
    assert found["JAX_PLATFORMS"] == "cpu"
    assert "KERNELRY_STRICT" not in found
    assert not Path(found["TMPDIR"]).exists()


_SEES_ITS_ENVIRONMENT = """
import os
from kernelry.aot.worker import serve
serve(lambda shared, job: dict(os.environ))
"""


def _candidates(target="tpu:v5e"):
    return [Candidate(call, "dot_product") for call in calls(AttentionConfig(), SHAPE, Target.parse(target))]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compiler is installed")
def test_a_missing_compiler_is_said_as_everywhere():
    with pytest.raises(NoCompilerError, match=r"pip install 'kernelry\[aot-tpu\]'"):
        list(predict(_candidates(), "tpu:v5e"))


def test_a_wrong_target_is_an_error():
    with pytest.raises(ConfigError, match="unknown tpu kind 'v17'"):
        list(predict(_candidates(), "tpu:v17"))


def test_a_process_that_cannot_start_is_an_error():
    dies = (sys.executable, "-c", "import os; os._exit(7)")
    with pytest.raises(WorkerEndedError, match="no process that compiles can be started: status 7"):
        list(predict(_candidates(), "tpu:v5e", command=dies))


def test_a_kernel_of_a_notebook_cannot_be_sent():
    spec = KernelSpec(name="mine", capabilities=Capabilities(), load=lambda: None, signature=lambda _: ())
    with kernelry.use(kernels=[spec]), pytest.raises(ConfigError, match=r"use\(kernels=…\)"):
        list(predict(_candidates(), "tpu:v5e"))


def test_a_kernel_that_the_other_process_cannot_import_is_named(monkeypatch):
    module = types.ModuleType("only_here")
    exec("def load(): ...", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = KernelSpec(name="mine", capabilities=Capabilities(), load=module.load, signature=signature_of("mine"))
    with (
        kernelry.use(kernels=[spec]),
        pytest.raises(ConfigError, match="No module named 'only_here'"),
    ):
        list(predict(_candidates(), "tpu:v5e"))


def test_nothing_is_started_for_no_candidates():
    assert list(predict([], "tpu:v5e", command=("no-such-program",))) == []
