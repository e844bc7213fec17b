"""kernelry bench: what is timed, told, written and drawn, and with which exit status."""

import dataclasses
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import kernelry
from kernelry import cli
from kernelry.bench import peers, rulers, run
from kernelry.bench.cases import Pass
from kernelry.bench.crossings import series_of
from kernelry.bench.programs import kernels_of
from kernelry.bench.results import Kind, Outcome, Result, Row, to_json
from kernelry.bench.run import Bench
from kernelry.bench.shapes import named_cases
from kernelry.bench.turns import Program
from kernelry.bench.work import work_of
from kernelry.cli import bench as verb
from kernelry.cli import options
from kernelry.plugin import Kernel, Partial
from kernelry.request.target import Target

pytestmark = [pytest.mark.versions, pytest.mark.xdist_group("test_bench")]

HERE = Target("cpu")
DENSE = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "dot_product")


class Lying(Kernel):
    """Returns the mean of all values, whatever the mask says."""

    def forward(self, inputs, request, tiling, *, statistics):
        with jax.named_scope("lying"):
            weights = jnp.full((request.q_len, request.kv_len), 1 / request.kv_len)
            out = jnp.einsum("TS,BSKD->BTKD", weights, inputs.value)
        return Partial(out.repeat(request.groups, axis=2), dtype=request.dtype)


class Broken(Kernel):
    def forward(self, inputs, request, tiling, *, statistics):
        raise RuntimeError("out of\nluck")


def spec(name, body):
    features = dataclasses.replace(DENSE.capabilities, statistics=frozenset())
    return dataclasses.replace(DENSE, name=name, load=body, capabilities=features, signature=lambda _: (name,))


@pytest.fixture(autouse=True)
def small_rulers(monkeypatch):
    monkeypatch.setattr(rulers, "_OF_CPU", (64, 2**16))


@pytest.fixture(scope="module")
def case():
    [found] = named_cases(["small"], HERE, lengths=[16], passes=[Pass.FORWARD])
    return found


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kernelry", "bench", *arguments])
        status = cli.main()
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def shown(parts, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    return console.export_text()


# A case


def test_all_that_serve_take_turns_and_auto_shares_the_program_of_its_choice(case):
    result = Bench(turns=2).run(case)
    rows = {row.name: row for row in result.rows}
    assert {row.name for row in result.timed} == {"dot_product", "blockwise"}
    assert all(len(row.program.times) == 2 for row in result.timed)
    assert all(row.errors["out"] < 1e-5 for row in result.timed)
    assert all(len(ruler.program.times) == 2 for ruler in result.rulers.values())
    auto = rows["auto"]
    assert (auto.outcome, auto.program) == (Outcome.SAME, None)
    assert auto.same_as == auto.resolution.kernel
    assert rows["splash"].outcome is Outcome.REFUSED
    assert "platform=cpu is not tpu" in rows["splash"].reason
    assert not result.faults


def test_a_wrong_kernel_and_one_that_fails_are_marked_and_never_the_fastest(case):
    lying, broken = spec("lying", Lying), spec("broken", Broken)
    with kernelry.use(kernels=[lying, broken]):
        result = Bench(("lying", "broken", "dot_product"), turns=1).run(case)
    rows = {row.name: row for row in result.rows}
    assert rows["lying"].outcome is Outcome.WRONG
    assert "the relative error of out is" in rows["lying"].reason
    assert rows["broken"].reason == "RuntimeError: out of; luck"
    assert result.fastest.name == "dot_product"
    assert [fault.split(": ")[1:3] for fault in result.faults] == [["lying", "wrong"], ["broken", "failed"]]
    told = shown(verb._case_parts(result, [], every=False))
    assert "lying WRONG" in told
    assert "lying wrong: the relative error" in told
    assert "broken failed: RuntimeError: out of; luck" in told


def test_when_the_budget_is_used_nothing_more_is_begun(case):
    result = Bench(turns=1, ends=0.0).run(case)
    assert {row.outcome for row in result.rows} == {Outcome.NOT_REACHED, Outcome.REFUSED}
    assert f"{case}: blockwise" in result.not_reached
    assert result.fastest is None


def test_a_program_that_needs_too_much_memory_is_not_run(case, monkeypatch):
    monkeypatch.setattr(run, "_free_bytes", lambda: 1000.0)
    result = Bench(("dot_product",), turns=1).run(case)
    rows = {row.name: row for row in result.rows}
    assert rows["dot_product"].outcome is Outcome.TOO_LARGE
    assert "are free" in rows["dot_product"].reason


def test_a_named_kernel_that_refuses_says_why(case):
    names, [row] = kernels_of(case, ["splash"])
    assert names == []
    assert "platform=cpu is not tpu" in row.reason


@pytest.mark.sweep
def test_training_compares_gradients():
    [case] = named_cases(["small-sinks"], HERE, lengths=[16], passes=[Pass.BOTH])
    [row] = Bench(("dot_product",), turns=1).run(case).timed
    assert set(row.errors) == {"d_query", "d_key", "d_value"}


def test_a_peer_that_can_express_a_shape_is_timed_and_others_say_why(case):
    result = Bench(("dot_product",), peers.PEERS, turns=1).run(case)
    rows = {row.name: row for row in result.rows if row.kind is Kind.PEER}
    assert rows["jax.nn xla"].outcome is Outcome.TIMED
    assert rows["jax.nn xla"].errors["out"] < 1e-5
    assert "needs an NVIDIA GPU" in rows["jax.nn cudnn"].reason
    [sinks] = named_cases(["small-sinks"], HERE, lengths=[16], passes=[Pass.FORWARD])
    assert "no such argument" in peers.PEERS[0].why_not(sinks.request)
    for changed in ({"precision": "highest"}, {"logits_dtype": "bfloat16"}):
        asked = dataclasses.replace(case.request, **changed)
        assert "no such argument" in peers.PEERS[0].why_not(asked), changed
    [absorbed] = named_cases(["small-mla-decode"], HERE, lengths=[16])
    assert "not an array each" in peers.PEERS[0].why_not(absorbed.request)


@pytest.mark.parametrize("name", [pytest.param("small-window", marks=pytest.mark.sweep), "small-packed"])
def test_a_peer_computes_the_mask_of_the_case(name):
    [case] = named_cases([name], HERE, lengths=[300], passes=[Pass.FORWARD])
    arguments = case.arguments()
    visible = np.asarray(case.mask_of(arguments).materialize(300, 300))
    nothing, each = jnp.zeros((1, 300, 1, 300)), jnp.eye(300)[None, :, None]  # so that out is the probabilities
    found = peers.PEERS[0].attention_of(case)(nothing, nothing, each, None, None, arguments[5])
    assert np.allclose(found[0, :, 0], visible[0, 0] / visible[0, 0].sum(axis=1, keepdims=True), atol=1e-6)
    assert peers.PEERS[0].note(case.mask_of(arguments)) == ("the mask as booleans" if name == "small-packed" else "")


# The command


def test_the_json_has_what_the_page_says(command, tmp_path):
    recorded = tmp_path / "bench.json"
    asked = ["--shape", "small", "--q-len", "16", "--q-len", "32", "--pass", "forward", "--turns", "1"]
    status, out, err = command(*asked, "--json", "--out", str(recorded))
    data = json.loads(out)
    assert (status, err) == (0, "")
    assert json.loads(recorded.read_text()) == data
    assert set(data) == {"schema", "machine", "cases", "crossings", "faults", "not_reached"}
    assert {"date", "platform", "device_kind", "processor", "cores", "versions"} <= set(data["machine"])
    assert {"python", "jax", "jaxlib", "kernelry", "kernelry-dot-product"} <= set(data["machine"]["versions"])
    assert [(case["name"], case["pass"], case["length"]) for case in data["cases"]] == [
        ("small", "forward", 16),
        ("small", "forward", 32),
    ]
    [series] = data["crossings"]
    assert (series["name"], series["pass"], series["batch"]) == ("small", "forward", 1)
    for case in data["cases"]:
        assert kernelry.Request.from_json(case["request"]).q_len == case["length"]
        assert case["flops"] > 0 < case["bytes"]
        assert case["fastest"] in {"dot_product", "blockwise"}
        assert 0 < case["auto_share"] <= 1
        assert set(case["rulers"]) == {"matrix_product", "copy", "launch"}
        programs = {program["name"]: program for program in case["programs"]}
        timed = programs["dot_product"]
        assert timed["lower_quartile_ms"] <= timed["median_ms"] <= timed["upper_quartile_ms"]
        assert timed["flops_per_second"] == pytest.approx(case["flops"] / timed["median_ms"] * 1e3, rel=1e-3)
        rate = 2 * 64**3 / case["rulers"]["matrix_product"]["median_ms"] * 1e3
        assert timed["of_matrix_product"] == pytest.approx(timed["flops_per_second"] / rate, rel=1e-3)
        assert programs["auto"]["same_as"] == programs["auto"]["kernel"]
        assert programs["splash"]["outcome"] == "refused"


def test_a_config_has_its_passes_timed_by_the_kernels_that_it_allows(command, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text('[attention]\ntype = "local_sliding"\nwindow = 8\nrules = [{use = ["dot_product"]}]\n')
    sizes = ["--heads", "8", "--kv-heads", "2", "--head-dim", "64", "--q-len", "16", "--dtype", "float32"]
    status, out, _ = command(str(config), *sizes, "--turns", "1", "--pass", "forward", "--json")
    [case] = json.loads(out)["cases"]
    assert (status, case["name"], case["request"]["q_heads"]) == (0, "config", 8)
    rows = {row["name"]: row for row in case["programs"]}
    assert rows["blockwise"]["reason"] == "excluded by the rules of the config"


def test_every_kind_of_a_models_layers_has_its_passes():
    model = options.ModelOptions(model="gemma-2-27b", batch=[1, 2])
    found = verb._cases(model, [], [8], None, [])
    named = {(case.name, case.which.value, case.request.batch) for case in found}
    assert named == {(name, which.value, batch) for name in ("sliding", "full") for which in Pass for batch in (1, 2)}
    assert len(found) == len(named)
    assert {case.request.dtype for case in found} == {"bfloat16"}
    two_part = options.ModelOptions(model="llama-3-8b", cache=["two-part"])
    names = [case.name for case in verb._cases(two_part, [], [8], "float32", [Pass.DECODE])]
    assert names == ["full (decode part 1)", "full (decode part 2)"]


def test_status_is_1_for_a_wrong_kernel_and_2_for_a_wrong_question(command, tmp_path, monkeypatch):
    monkeypatch.setattr(run.Truth, "errors", lambda *_: {"out": 1.0})
    asked = ["--shape", "small", "--q-len", "16", "--pass", "forward", "--kernel", "dot_product", "--turns", "1"]
    status, out, _ = command(*asked)
    assert status == 1
    assert "WRONG: small forward T=16 B=1: dot_product: wrong: the relative error of out is 1" in " ".join(out.split())
    for wrong, words in [
        (["--shape", "smal"], "unknown shape 'smal'; did you mean 'small'"),
        (["--pass", "backward"], "unknown pass 'backward'; there are forward, forward+backward, decode"),
        (["--shape", "small", "--kernel", "dot_produkt"], "dot_produkt"),
        (["--shape", "small", "--heads", "4"], "--heads: named shapes have their own"),
        (["--shape", "small", "--model", "llama-3-8b"], "leave the config and the model out"),
        (["--model", "llama-3-8b", "--sharding", "batch=d:2", "--batch", "2"], "pass --sharding ''"),
        (["--model", "bert-base", "--pass", "decode"], "nothing to time: no layer has a decode pass"),
        (["--model", "llama-3-8b", "--max-len", "64", "--q-len", "8", "--q-len", "16"], "--max-len goes with one"),
        (["--plot", "picture.jpg"], "pass a name that ends in .png"),
        (["--plot", str(tmp_path / "none" / "a.png")], "there is no folder"),
        (["--out", str(tmp_path / "none" / "a.json")], "there is no folder"),
    ]:
        status, _, err = command(*wrong)
        assert (status, words in " ".join(err.replace("│", " ").split())) == (2, True), (wrong, err)


def test_a_budget_of_nothing_lists_all_cases(command):
    status, out, err = command("--shape", "small", "--budget", "0")
    assert (status, err) == (0, "")
    assert "not reached within the budget:\n  small forward T=1024 B=1\n" in out


def test_a_case_whose_arrays_do_not_fit_is_told_and_the_others_are_timed(command, monkeypatch):
    real = Bench.run

    def full(self, case):
        if case.length == 16:
            raise MemoryError("no\nroom")
        return real(self, case)

    monkeypatch.setattr(Bench, "run", full)
    asked = ["--shape", "small", "--pass", "forward", "--turns", "1", "--kernel", "dot_product"]
    status, out, _ = command(*asked, "--q-len", "16", "--q-len", "32")
    assert status == 1
    assert "WRONG: small forward T=16 B=1: MemoryError: no; room" in out
    assert "small forward T=32 B=1" in out


def test_the_named_shapes_are_described(command):
    status, out, _ = command("--list")
    assert status == 0
    assert "gpt-oss 120B, window of 128, sinks" in out
    status, out, _ = command("--list", "--json")
    assert json.loads(out)["deepseek-mla-decode"]["passes"] == ["decode"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_no_bar_is_drawn_without_a_terminal_and_one_is_drawn_on_one(case, monkeypatch, capsys):
    verb._run(Bench(("dot_product",), turns=1), [case])
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", terminal)
    verb._run(Bench(("dot_product",), turns=1), [case])
    assert "0/1" in terminal.getvalue()
    assert str(case) in terminal.getvalue()


# How results are told, from times that are made up

TIMES = {64: (1.0, 2.0), 128: (4.0, 4.5), 256: (16.0, 10.0)}
"""Milliseconds of two kernels by length."""


def made_up(length, times, which=Pass.FORWARD):
    """A result whose kernels took these times; the matrix product and the copy take a millisecond."""
    [case] = named_cases(["small"], HERE, lengths=[length], passes=[which])
    rows = []
    for name, milliseconds in zip(("dot_product", "blockwise"), times, strict=True):
        program = Program(name, lambda: None, times=[0.9 * milliseconds, milliseconds, 1.2 * milliseconds])
        rows.append(Row(name, Kind.KERNEL, Outcome.TIMED, program=program))
    resolution = kernelry.explain(case.request, kernel="dot_product")
    rows.append(Row("auto", Kind.AUTO, Outcome.SAME, resolution=resolution, same_as="dot_product"))
    rows += [
        Row(name, Kind.KERNEL, Outcome.REFUSED, "platform=cpu is not tpu") for name in ("splash", "tokamax_splash")
    ]
    measures = rulers.rulers("float32", "cpu")
    for ruler in measures.values():
        ruler.program.times.append(1.0)
    return Result(case, work_of(case.request, case.call.mask), tuple(rows), measures)


RESULTS = [made_up(length, times) for length, times in TIMES.items()]


def told(results=RESULTS, *, width=80, every=False):
    groups = series_of(results)
    return shown(verb._parts(results, groups, to_json(results, [], groups), every=every, drawn=""), width)


def test_auto_is_compared_with_the_fastest_kernel():
    assert [result.auto_share for result in RESULTS] == [1.0, 1.0, 10 / 16]
    assert [result.fastest.name for result in RESULTS] == ["dot_product", "dot_product", "blockwise"]
    assert "auto takes dot_product: 62% of the speed of blockwise, the fastest" in told()


def test_crossings_are_those_of_right_kernels():
    [group] = series_of(RESULTS)
    [crossing] = group.crossings
    assert (crossing.before, crossing.after) == ("dot_product", "blockwise")
    share = np.log(4.5 / 4.0) / (np.log(16 / 4) - np.log(10 / 4.5))
    assert crossing.length == pytest.approx(128 * 2**share)
    assert "small forward: blockwise is faster than dot_product from 147 on" in told()
    wrong = [made_up(length, times) for length, times in TIMES.items()]
    for result in wrong:
        result.rows[1].outcome = Outcome.WRONG
    assert series_of(wrong)[0].crossings == ()


def test_series_are_cases_that_differ_by_their_length_alone():
    results = [made_up(128, (1, 2)), made_up(64, (1, 2), Pass.DECODE), made_up(64, (1, 2))]
    found = [[result.case.length for result in group.results] for group in series_of(results)]
    assert found == [[64, 128], [64]]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_tables_fit_their_width(width):
    text = told(width=width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    lines = {tuple(line.split()) for line in text.splitlines()}
    [row] = [line for line in lines if line[:2] == ("blockwise", "4.50")]
    assert row[:3] == ("blockwise", "4.50", "4.28–4.95")


def test_refusals_are_names_and_reasons_where_they_are_asked_for():
    assert "refused everywhere (--all says why): splash, tokamax_splash" in told()
    assert "platform=cpu is not tpu" not in told()
    alone = told(RESULTS[:1])
    assert "refused (--all says why): splash, tokamax_splash" in alone
    assert told(every=True).count("splash refused: platform=cpu is not tpu") == 6


# The picture


def test_the_picture_has_a_panel_for_each_series_a_line_for_each_kernel_and_its_crossings():
    pytest.importorskip("matplotlib")
    from kernelry.bench import picture

    groups = series_of([*RESULTS, made_up(64, (1.0, 2.0), Pass.DECODE)])
    figure = picture.figure_of(groups, to_json(RESULTS, [], groups)["machine"])
    forward, decode = figure.axes
    lines = {line.get_color(): line for line in forward.lines if len(line.get_xdata()) == 3}
    assert [list(line.get_ydata()) for line in lines.values()][:2] == [[2.0, 4.5, 10.0], [1.0, 4.0, 16.0]]
    [label] = forward.texts
    assert label.get_text() == "147 → blockwise"
    assert (forward.get_xscale(), forward.get_yscale()) == ("log", "log")
    assert not decode.texts
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["blockwise", "dot_product", "auto"]


def test_a_png_is_written_and_nothing_timed_is_no_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from kernelry.bench import picture

    groups = series_of(RESULTS)
    machine = to_json(RESULTS, [], groups)["machine"]
    assert picture.draw(groups, machine, tmp_path / "a.png") == f"picture: {tmp_path / 'a.png'}"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert picture.draw([], machine, tmp_path / "b.png") == "no picture: no kernel was timed"
    assert not (tmp_path / "b.png").exists()


def test_without_matplotlib_nothing_is_timed(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = command("--plot", str(tmp_path / "a.png"))
    assert (status, err) == (2, "--plot needs matplotlib; pip install 'kernelry[plot]'.\n")
