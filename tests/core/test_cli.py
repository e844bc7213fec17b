"""The command: readable tables, JSON, exit statuses, one-line errors."""

import json
import sys

import pytest

from kernelry import cli
from kernelry.cli import app


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kernelry", *arguments])
        status = cli.main()
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def test_list_names_every_kernel(run):
    status, out, _ = run("list")
    assert status == 0
    assert "dot_product" in out
    assert "blockwise" in out


def test_list_as_json(run):
    status, out, _ = run("list", "--json")
    rows = {row["name"]: row for row in json.loads(out)["kernels"]}
    assert status == 0
    assert "causal" in rows["dot_product"]["atoms"]
    assert rows["dot_product"]["distribution"].startswith("kernelry-dot-product ")


def test_doctor_reports_versions_and_no_faults(run):
    status, out, _ = run("doctor")
    assert status == 0
    assert "No faults." in out
    data = json.loads(run("doctor", "--json")[1])
    assert data["faults"] == []
    assert {"kernelry", "python", "jax", "contract"} <= set(data["versions"])


def test_explain_answers_for_hardware_that_is_not_here(run):
    status, out, _ = run("explain", "--target", "gpu:h100", "--mode", "train", "--q-len", "8192", "--json")
    data = json.loads(out)
    assert status == 0
    assert data["request"]["target"] == "gpu:h100"
    assert data["request"]["q_len"] == 8192
    assert data["plan"]["kernel"]


def test_explain_prints_the_choice_and_the_rule(run):
    status, out, _ = run("explain", "--target", "cpu", "--mask", "window(63)", "--q-len", "1024")
    assert status == 0
    assert "→" in out
    assert "shipped policy" in out


def test_explain_of_a_refused_kernel_exits_2_with_the_reason(run):
    question = ("explain", "--target", "cpu", "--mode", "decode", "--kernel", "blockwise")
    status, out, _ = run(*question)
    assert status == 2
    assert "No kernel serves this request." in out
    [candidate] = json.loads(run(*question, "--json")[1])["candidates"]
    assert candidate["refusals"][0]["detail"] == "mode=decode is not prefill or train"


def test_explain_follows_a_config(run, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[attention]\nkernel = "blockwise"\n')
    _, out, _ = run("explain", "--target", "cpu", "--config", str(path), "--json")
    assert json.loads(out)["plan"]["kernel"] == "blockwise"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["explain", "--target", "gpu:h10"], "did you mean 'h100'"),
        (["explain", "--mode", "trian"], "did you mean 'train'"),
        (["explain", "--mask", "causl"], "did you mean 'causal'"),
        (["explain", "--dtype", "float99"], "is no dtype"),
        (["explain", "--heads", "4", "--kv-heads", "3"], "must divide"),
        (["explain", "--q-len", "-1"], "q-len"),
        (["explain", "--config", "absent.toml"], "absent.toml"),
        (["explian"], "explian"),
    ],
)
def test_mistakes_are_one_message_and_status_2(run, arguments, complaint):
    status, _, err = run(*arguments)
    assert status == 2
    assert complaint in " ".join(err.split())
    assert "Traceback" not in err


def test_version(run):
    assert run("--version")[1].startswith("kernelry ")


def test_without_the_extra_the_command_says_what_to_install(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "kernelry.cli.app", raising=False)
    monkeypatch.delattr(cli, "app", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    status, _, err = run("list")
    assert status == 2
    assert "pip install 'kernelry[cli]'" in err
    sys.modules["kernelry.cli.app"] = app
