"""The command: readable tables, JSON, exit statuses, one-line errors."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from kernelry import cli
from kernelry.cli import report

pytestmark = pytest.mark.versions


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
    assert {"kv_quantizations", "pages", "context_parallel"} <= rows["dot_product"].keys()


def test_list_shows_how_a_kernel_reads_keys_and_attends_across_devices():
    shown = {"summary": "", "gradient": "none", "kv_quantizations": ["int8:head_dim"], "pages": True}
    shown["context_parallel"] = ["ring"]
    lists = dict.fromkeys(("platforms", "modes", "dtypes", "atoms", "features", "statistics"), ())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report._serves({**lists, **shown}))
    text = " ".join(console.export_text().split())
    assert "keys held as int8:head_dim pages" in text
    assert "across devices by ring" in text


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


def test_explain_takes_how_keys_are_held(run):
    options = ("--mode", "decode", "--q-len", "1", "--kv-len", "64", "--heads", "4")
    status, out, _ = run("explain", *options, "--kv-quantization", "int4", "--page-size", "16", "--json")
    request = json.loads(out)["request"]
    assert (status, request["kv_quantization"], request["page_size"]) == (0, "int4:head_dim", 16)


def test_explain_of_pages_that_do_not_make_up_the_keys_says_so(run):
    status, _, error = run("explain", "--kv-len", "40", "--page-size", "16")
    assert status == 2
    assert "page_size must be a positive integer that divides kv_len=40, got 16" in error


def test_explain_prints_the_choice_and_the_rule(run):
    status, out, _ = run("explain", "--target", "cpu", "--mask", "window(63)", "--q-len", "1024")
    assert status == 0
    assert "→" in out
    assert "shipped policy" in out


def test_explain_of_a_refused_kernel_exits_2_with_the_reason(run):
    question = ("explain", "--target", "cpu", "--dtype", "float64", "--kernel", "blockwise")
    status, out, _ = run(*question)
    assert status == 2
    assert "No kernel serves this request." in out
    [candidate] = json.loads(run(*question, "--json")[1])["candidates"]
    assert candidate["refusals"][0]["detail"] == "dtype=float64 is not bfloat16 or float16 or float32"


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
        (["explain", "--soft-cap", "nan"], "no finite number above 0"),
        (["explain", "--soft-cap", "inf", "--json"], "no finite number above 0"),
        (["explain", "--soft-cap", "0"], "no finite number above 0"),
        (["mask", "segments"], "write segments(0, 0, 1, 1)"),
        (["mask", "causl"], "did you mean 'causal'"),
        (["mask", "~" * 5000 + "causal"], "is nested more than"),
        (["mask", "causal", "--q-len", "2", "--kv-len", "4"], "query_offset"),
        (["mask", "causal", "--q-len", "0"], "q-len"),
        (["mask", "segments(0, 1)", "--q-len", "3"], "query_ids must be"),
        (["mask", "causal", "--png", "absent/folder/mask.png"], "cannot write the image"),
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


def test_mask_is_drawn_as_text(run):
    status, out, _ = run("mask", "causal & window(3) & segments(0,0,0,1,1,1)")
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == "segments & window(3, 0)"
    assert lines[3:9] == ["1 . . . . .", "1 1 . . . .", "1 1 1 . . .", ". . . 1 . .", ". . . 1 1 .", ". . . 1 1 1"]


def test_mask_as_json(run):
    status, out, _ = run("mask", "causal", "--q-len", "4", "--block-q", "2", "--block-kv", "2", "--json")
    data = json.loads(out)
    assert status == 0
    assert {data["q_len"], data["kv_len"]} == {4}
    assert [atom["kind"] for atom in data["form"]] == ["causal"]
    [picture] = data["pictures"]
    assert picture["visible"] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert picture["block_map"] == [[1, 0], [2, 1]]
    assert (picture["batch_row"], picture["head"], data["block_q"]) == (None, None, 2)


def test_mask_as_json_leaves_out_many_tokens(run):
    data = json.loads(run("mask", "causal", "--q-len", "2048", "--json")[1])
    assert data["pictures"][0]["visible"] is None
    assert len(data["pictures"][0]["block_map"]) == 2048 // data["block_q"]


def test_mask_as_json_has_a_picture_for_each_row(run):
    data = json.loads(run("mask", "lengths(1, 2)", "--q-len", "2", "--json")[1])
    assert [picture["visible"] for picture in data["pictures"]] == [[[1, 0], [1, 0]], [[1, 1], [1, 1]]]
    assert [picture["batch_row"] for picture in data["pictures"]] == [0, 1]


@pytest.mark.parametrize("tokens", [6, 1024])
def test_mask_as_an_image(run, tmp_path, tokens):
    path = tmp_path / "mask.png"
    status, out, _ = run("mask", "causal & window(3)", "--q-len", str(tokens), "--png", str(path))
    content = path.read_bytes()
    assert (status, out) == (0, f"{path}\n")
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert min(width, height) > 500


def test_mask_image_without_matplotlib_names_the_extra(run, monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = run("mask", "causal", "--png", str(tmp_path / "mask.png"))
    assert status == 2
    assert err == "drawing images needs matplotlib; pip install 'kernelry[plot]'.\n"


ONE_AFTER_ANOTHER = """
import json, sys
from kernelry.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["kernelry", *arguments]
    main()
    for stream in (sys.stdout, sys.stderr):
        print("END", file=stream, flush=True)
"""


def test_outputs_that_know_ascii_alone_get_plainer_signs():
    shown = {
        ("mask", "causal", "--q-len", "128"): "# full   + partial   . empty",
        ("explain", "--target", "cpu", "--q-len", "64", "--kv-quantization", "int8"): "| -> | dot_product",
        ("explain", "--target", "cpu", "--q-len", "64"): "q_len and kv_len >= 768",
        ("explain", "--target", "cpu", "--q-len", "8192"): "q_len and kv_len <= 767",
        ("list",): "dot_product",
        ("mask", "causal.at(x=1)"): "unknown .at(x=...)",
    }
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(list(shown))]
    done = subprocess.run(command, env=environ, capture_output=True, encoding="ascii", check=True, timeout=120)
    assert "Traceback" not in done.stderr
    outputs, errors = (text.split("END\n")[:-1] for text in (done.stdout, done.stderr))
    for expected, output, error in zip(shown.values(), outputs, errors, strict=True):
        assert expected in output + error
        assert (
            len({len(line) for line in output.splitlines() if line.startswith(("|", "+"))}) <= 1
        )  # tables are aligned


def test_version(run):
    assert run("--version")[1].startswith("kernelry ")
