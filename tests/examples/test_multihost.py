"""Training over several processes: examples/multihost_train.py, and how processes are started and watched."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from lm import launch  # noqa: E402
from lm.data import Batch, paragraphs  # noqa: E402
from lm.mesh import MeshSettings  # noqa: E402

from kernelry.errors import ConfigError  # noqa: E402
from kernelry.parallel import load_balanced_order  # noqa: E402

pytestmark = pytest.mark.xdist_group("flax")  # groups of many tests begin first, and this one takes long
TRAIN = EXAMPLES / "multihost_train.py"
LIMIT = 480  # seconds; a run takes 20 on two free cores


def losses(tmp_path, *options, name="losses"):
    output = tmp_path / f"{name}.json"
    environ = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # most of the time is compiling
    environ |= {key: value for key, value in os.environ.items() if not key.startswith("KERNELRY_")}
    environ |= {"KERNELRY_MEASUREMENTS": ""}
    command = [sys.executable, str(TRAIN), "--output", str(output), "--time-limit", str(LIMIT), *options]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=LIMIT + 60)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.versions
@pytest.mark.parametrize(
    ("mesh", "devices"),
    [("data:2,context:2", 4), pytest.param("data:2,tensor:2,context:2", 8, marks=pytest.mark.sweep)],
)
def test_two_processes_train_as_one_does_to_the_last_bit(tmp_path, mesh, devices):
    apart = losses(tmp_path, "--mesh", mesh, "--processes", "2", "--devices", str(devices // 2))
    together = losses(tmp_path, "--mesh", mesh, "--devices", str(devices))
    assert apart == together
    alone = losses(tmp_path, "--mesh", "data:1")
    for run in ("packed", "balanced"):
        np.testing.assert_allclose(together[run], alone[run], rtol=1e-6)
        assert alone[run][-1] < alone[run][0] - 0.5
    assert together["packed"] != together["balanced"]


def watched(tmp_path, body, seconds=60):
    program = tmp_path / "program.py"
    options = "import argparse, pathlib, sys, time\np = argparse.ArgumentParser()\n"
    options += "".join(f"p.add_argument('--{name}')\n" for name in ("coordinator", "processes", "process", "folder"))
    program.write_text(f"{options}o = p.parse_args()\nfolder = pathlib.Path(o.folder)\n{body}\n")
    launch.launch(program, ["--folder", str(tmp_path)], 2, seconds=seconds)


def test_each_process_knows_its_place_and_all_the_same_coordinator(tmp_path):
    watched(tmp_path, "(folder / o.process).write_text(f'{o.coordinator} {o.processes}')")
    first, second = ((tmp_path / place).read_text() for place in "01")
    assert first == second
    assert first.startswith("127.0.0.1:")
    assert first.endswith(" 2")


def test_a_process_that_fails_ends_the_others_and_is_named(tmp_path):
    body = "if o.process == '1':\n    sys.exit('no such data')\ntime.sleep(600)"
    with pytest.raises(launch.LaunchError, match=r"(?s)process 1 ended with status 1:.*no such data"):
        watched(tmp_path, body)


def test_processes_that_do_not_end_are_ended_and_named(tmp_path):
    body = "print('waiting for data', file=sys.stderr, flush=True)\nif o.process == '1':\n    time.sleep(600)"
    with pytest.raises(launch.LaunchError, match=r"(?s)processes \[1\] have not ended after 2 s:.*waiting for data"):
        watched(tmp_path, body, seconds=2)


def test_a_port_in_use_is_not_chosen(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", launch.free_port()))
        port = taken.getsockname()[1]
        monkeypatch.setattr(launch.random, "sample", lambda *_: [port, port + 1, port + 2, port + 3])
        assert launch.free_port() > port
        monkeypatch.setattr(launch.random, "sample", lambda *_: [port])
        with pytest.raises(launch.LaunchError, match="none of 100 ports between 20000 and 30000 is free"):
            launch.free_port()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dat:2", r"mesh 'dat:2': unknown axis 'dat'; did you mean 'data'\?"),
        ("data:2,data:2", "write each axis once with its size"),
        ("data:0", "write each axis once with its size"),
        ("data", "write each axis once with its size"),
    ],
)
def test_a_wrong_mesh_says_how_to_write_it(text, message):
    with pytest.raises(ConfigError, match=message):
        MeshSettings.parse(text)


def test_a_mesh_is_not_larger_than_what_is_there():
    with pytest.raises(ConfigError, match=r"mesh data:512,tensor:1,context:4 has 2048 devices, and \d+ are there"):
        MeshSettings.parse("data:512,context:4").make()


def test_paragraphs_are_numbered_and_in_the_order_of_the_tokens():
    text = np.frombuffer(b"ab\n\ncd\n\n\ne", np.uint8)[None].astype(np.int32)
    np.testing.assert_array_equal(paragraphs(text)[0], [0, 0, 0, 0, 1, 1, 1, 1, 2, 3])

    windows = np.pad(text, ((0, 0), (0, 7)))
    order = load_balanced_order(16, 4, "dual_chunk")
    batch = Batch.of(windows, order, packed=True)
    np.testing.assert_array_equal(batch.inputs, windows[:, :-1][:, order])
    np.testing.assert_array_equal(batch.targets, windows[:, 1:][:, order])
    np.testing.assert_array_equal(batch.segments, paragraphs(windows[:, :-1])[:, order])
    np.testing.assert_array_equal(batch.positions, order)
    assert Batch.of(windows, order, packed=False).segments is None
