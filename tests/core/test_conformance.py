"""The conformance kit: an honest kernel passes, a refusing or lying one does not, known failures are strict."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from honest_kernels import ALL, HONEST

import kernelry
from kernelry import cli
from kernelry.cli import app as app_module
from kernelry.cli.conformance import check
from kernelry.errors import ArgumentError
from kernelry.kernel.spec import no_refusals
from kernelry.plugin import (
    AtomKind,
    Capabilities,
    Dims,
    Kernel,
    KernelSpec,
    Mode,
    Partial,
    Quantization,
    Refusal,
    RefusalCode,
    Side,
    Tiling,
    Tolerance,
)
from kernelry.testing.conformance import (
    CaseResult,
    Outcome,
    Report,
    assignments,
    cases_of,
    installed_spec,
    run,
    run_case,
    run_in_processes,
)
from kernelry.testing.conformance.calls import AttentionCall
from kernelry.testing.conformance.longer import longer_calls
from kernelry.testing.conformance.subject import Subject

CAPABILITIES = Capabilities(
    platforms=frozenset({"cpu", "gpu", "tpu"}),
    modes=frozenset({Mode.PREFILL}),
    dtypes=frozenset({"float32"}),
    head_dims=Dims(minimum=8, maximum=8),
    atoms=frozenset({AtomKind.CAUSAL}),
    normalizations=frozenset({"softmax"}),
    tolerances=(Tolerance("float32", 2e-6, 2e-5, "float32 throughout"),),
)


class Small(Kernel):
    """Dense and forward only; `.error` is added to what it returns."""

    error = 0.0

    def forward(self, inputs, request, tiling, *, statistics):
        with jax.named_scope("tests.small"):
            logits = jnp.einsum("BTNH,BSNH->BNTS", inputs.query, inputs.key) * request.scale
            for mask in inputs.mask:
                visible = mask.evaluate(Side.query(request.q_len), Side.kv(request.kv_len))
                logits = jnp.where(visible, logits, -jnp.inf)
            out = jnp.einsum("BNTS,BSND->BTND", jax.nn.softmax(logits), inputs.value)
            return Partial(out + self.error, dtype=request.dtype)


class Wrong(Small):
    """Off by a little everywhere."""

    error = 1e-3


def signature(request):
    return ("tests.small",)


SMALL = KernelSpec(name="small", capabilities=CAPABILITIES, load=Small, signature=signature)
WRONG = dataclasses.replace(SMALL, name="wrong", load=Wrong)


def refuse(request, environment):
    return (Refusal(RefusalCode.DRIVER, "no driver at all"),)


def result(spec, name):
    """Runs one case, as `run` would."""
    return run_case(next(case for case in cases_of(spec) if case.name == name))


@pytest.fixture(scope="module")
def honest():
    return run(SMALL)


@pytest.fixture(scope="module")
def wrong():
    return run(WRONG, quick=True)


@pytest.mark.versions
def test_honest_kernel_passes(honest):
    assert honest.ok, honest.failures
    assert honest.served > 8
    assert honest.refused > 20


def test_wrong_numbers_fail_and_say_by_how_much():
    case = result(WRONG, "full attention")
    assert case.outcome is Outcome.FAILED
    assert "out is wrong" in case.detail
    assert "0.001" in case.detail


def test_kernel_that_refuses_everything_is_not_ok():
    report = run(dataclasses.replace(SMALL, refusals=refuse))
    assert not report.ok
    assert report.served == 0
    assert "no driver at all" in report.failures[0].detail


def test_report_without_a_served_case_is_not_ok():
    refusals = (CaseResult("refuses bias", "refusals", Outcome.REFUSED),)
    assert not Report("small", refusals).ok
    assert Report("small", refusals, runs_here=False).ok


def raising(request, environment):
    raise RuntimeError("of a probe")


@pytest.mark.parametrize("refusals", [raising, lambda *_: ["no refusal"]])
def test_refusals_that_fail_are_reported_by_the_cases(refusals):
    report = run(dataclasses.replace(SMALL, refusals=refusals), quick=True)
    assert report.runs_here
    assert not report.ok
    assert report.served == 0


def tiled(size, load=Small, refusals=no_refusals):
    """A kernel whose tiles have a size and a name of their own."""
    tilings = lambda _: (Tiling.of(keys_at_once=size, stages=3),)  # noqa: E731
    return dataclasses.replace(SMALL, load=load, tilings=tilings, refusals=refusals)


def whole_tiles_only(request, environment):
    whole = request.q_len % 256 == 0 or request.q_len <= 16
    return () if whole else (Refusal(RefusalCode.SEQUENCE_LENGTH, "no whole tiles"),)


@pytest.mark.parametrize(
    ("spec", "length"),
    [(SMALL, 197), (tiled(16), 197), (tiled(192), 293), (tiled(256, refusals=whole_tiles_only), 512)],
    ids=["no tiles", "small tiles", "large tiles", "whole tiles only"],
)
def test_some_lengths_exceed_a_kernels_own_tiles(spec, length):
    longest = [case.name for case in cases_of(spec) if "beyond its tiles" in case.name]
    assert longest == [
        f"beyond its tiles: T = {length}, S = {length}",
        f"beyond its tiles, logits of ±180: T = {length}, S = {length}",
        f"beyond its tiles, full attention: T = {length}, S = {length}",
    ]


def test_everything_declared_is_tried_beyond_a_kernels_own_tiles():
    subject = Subject.of(HONEST, quick=False)
    calls = [call for _, _, calls in longer_calls(subject, subject.base) for call in calls]
    assert all(call.kv_len > 128 and subject.serves(call) for call in calls)
    atoms = [atom for call in calls for atom in call.mask.form.atoms]
    assert {atom.kind for atom in atoms} | {AtomKind.CUSTOM} == ALL.atoms | {AtomKind.CUSTOM}
    assert {where.kind for atom in atoms for where in (atom.query, atom.kv)} == ALL.positions
    for feature in ("bias", "soft_cap", "bias_after_cap", "sinks", "max_logits"):
        assert any(getattr(call, feature) for call in calls), feature
    assert {Quantization.parse(call.kv_quantization).axis for call in calls if call.kv_quantization} == {
        "head_dim",
        "heads_and_head_dim",
    }
    assert any(call.page_size and call.kv_len > 8 * call.page_size for call in calls)
    assert any(call.partial and call.wanted for call in calls)


def test_a_head_has_its_largest_logit_at_the_last_query_and_key_and_another_at_the_first():
    call = AttentionCall(batch=1, q_len=197, kv_len=197, q_heads=3, kv_heads=1, peaks=True)
    drawn = call.numbers()
    logits = np.einsum("BTNH,BSKH->NTS", drawn["query"], drawn["key"])
    places = [tuple(map(int, np.unravel_index(head.argmax(), head.shape))) for head in logits]
    assert places == [(196, 196), (196, 1), (1, 0)]


def test_kernel_that_reads_whole_tiles_only_fails_beyond_them():
    class Whole(Small):
        def forward(self, inputs, request, tiling, *, statistics):
            whole = request.kv_len - request.kv_len % 192 or request.kv_len
            key, value = (array.at[:, whole:].set(0) for array in (inputs.key, inputs.value))
            read = dataclasses.replace(inputs, key=key, value=value)
            return super().forward(read, request, tiling, statistics=statistics)

    spec = tiled(192, Whole)
    assert result(spec, "T = S = 72").outcome is Outcome.PASSED
    assert result(spec, "beyond its tiles: T = 293, S = 293").outcome is Outcome.FAILED


def test_kernel_that_does_not_subtract_the_maximum_fails():
    class Overflowing(Small):
        def forward(self, inputs, request, tiling, *, statistics):
            with jax.named_scope("tests.small"):
                weights = jnp.exp(jnp.einsum("BTNH,BSNH->BNTS", inputs.query, inputs.key) * request.scale)
                out = jnp.einsum("BNTS,BSND->BTND", weights / weights.sum(axis=-1, keepdims=True), inputs.value)
                return Partial(out, dtype=request.dtype)

    spec = dataclasses.replace(SMALL, load=Overflowing)
    assert result(spec, "full attention").outcome is Outcome.PASSED
    assert result(spec, "logits of ±180").outcome is Outcome.FAILED


def test_kernel_that_returns_a_bare_array_is_named():
    class Bare(Small):
        def forward(self, inputs, request, tiling, *, statistics):
            return super().forward(inputs, request, tiling, statistics=statistics).out

    case = result(dataclasses.replace(SMALL, load=Bare), "full attention")
    assert case.outcome is Outcome.FAILED
    assert "PluginError: kernel 'small'" in case.detail


def test_another_kernels_program_fails():
    case = result(dataclasses.replace(SMALL, signature=lambda _: ("tests.other",)), "full attention")
    assert case.outcome is Outcome.FAILED
    assert "tests.other" in case.detail


def test_empty_signature_fails():
    assert result(dataclasses.replace(SMALL, signature=lambda _: ()), "a signature").outcome is Outcome.FAILED


@pytest.mark.parametrize("tolerances", [(), (Tolerance("float32", 0.1, 0.1, "generous"),)])
def test_absent_or_generous_tolerance_fails(tolerances):
    capabilities = dataclasses.replace(CAPABILITIES, tolerances=tolerances)
    spec = dataclasses.replace(SMALL, capabilities=capabilities)
    assert result(spec, "a sane tolerance for float32").outcome is Outcome.FAILED


@pytest.mark.parametrize("code", [RefusalCode.VENDOR_MISSING, RefusalCode.VENDOR_VERSION])
def test_a_missing_library_is_no_refusal_of_a_claim(code):
    """Whatever an Environment assumes of another machine, a Python may be too old for the library."""

    def missing(request, environment):
        return (Refusal(code, "the library needs a later Python"),)

    report = run(dataclasses.replace(SMALL, refusals=missing), quick=True)
    assert not report.runs_here
    assert report.ok, report.failures
    [case] = (case for case in report.cases if case.name == "full attention")
    assert case.outcome is Outcome.SKIPPED
    assert "later Python" in case.detail


def test_known_failures_are_forgiven(wrong):
    known = {case.name: "rounds too early" for case in wrong.failures}
    report = run(WRONG, quick=True, known_failures=known)
    assert not report.failed
    assert report.known_failures == len(known) > 0


def test_spec_lists_known_failures_of_its_own():
    report = run(dataclasses.replace(WRONG, known_failures=(("full attention", "rounds too early"),)), quick=True)
    [case] = (case for case in report.cases if case.name == "full attention")
    assert case.outcome is Outcome.KNOWN_FAILURE
    assert "rounds too early" in case.detail


def test_known_failure_that_passes_fails():
    report = run(SMALL, quick=True, known_failures={"full attention": "was wrong once"})
    assert [case.name for case in report.failures] == ["full attention"]
    assert report.failures[0].outcome is Outcome.UNEXPECTED_PASS


def test_known_failure_of_no_case_is_an_error():
    with pytest.raises(ArgumentError, match="full attention"):
        run(SMALL, known_failures={"full atention": "misspelt"})


def test_kernel_that_raises_fails():
    class Broken(Small):
        def forward(self, inputs, request, tiling, *, statistics):
            raise RuntimeError("the vendor is upset")

    case = result(dataclasses.replace(SMALL, load=Broken), "full attention")
    assert case.outcome is Outcome.FAILED
    assert "the vendor is upset" in case.detail


def test_kernel_of_another_platform_is_skipped_and_its_refusals_looked_at():
    capabilities = dataclasses.replace(CAPABILITIES, platforms=frozenset({"tpu"}))
    report = run(dataclasses.replace(SMALL, capabilities=capabilities))
    assert report.ok
    assert not report.runs_here
    assert report.refused > 20
    assert any("needs tpu" in case.detail for case in report.cases)


def test_progress_hears_of_every_case():
    heard = []
    report = run(SMALL, quick=True, progress=lambda index, total, name: heard.append((index, total, name)))
    total = len(report.cases)
    assert heard == [(index, total, case.name) for index, case in enumerate(report.cases)]


@pytest.mark.parametrize("name", ["dot_product", "splash", "pallas_mha", "cudnn_jax"])
def test_case_names_are_unique_and_the_quick_ones_among_all(name):
    spec = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == name)
    names, thinned = ([case.name for case in cases_of(spec, quick)] for quick in (False, True))
    assert len(names) == len(set(names))
    assert set(thinned) <= set(names)


def test_quick_run_has_every_claim_of_dot_product():
    spec = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "dot_product")
    claims, thinned = ({case.claim for case in cases_of(spec, quick)} for quick in (False, True))
    assert claims == thinned


def test_json_is_plain_and_stable(honest):
    data = json.loads(json.dumps(honest.to_json()))
    assert set(data) == {"kernel", "ok", "runs_here", "counts", "cases"}
    assert set(data["cases"][0]) == {"name", "claim", "outcome", "detail", "seconds"}
    assert data["counts"]["passed"] == honest.passed
    assert sum(data["counts"].values()) == len(data["cases"])
    assert [case["name"] for case in data["cases"]] == [case.name for case in cases_of(SMALL)]


def test_case_runs_alone():
    case = next(case for case in cases_of(SMALL) if case.name == "full attention")
    assert run_case(case).outcome is Outcome.PASSED
    assert run_case(case, "was wrong once").outcome is Outcome.UNEXPECTED_PASS


def test_assignments_of_an_unknown_kernel_are_an_error():
    with pytest.raises(ArgumentError, match="did you mean 'dot_product'"):
        assignments("dot_prodct")


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls the verb with `small` and `wrong` installed, and returns status, output and errors."""
    own = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    own.callback()(lambda: None)
    own.command("conformance")(check)
    monkeypatch.setattr(app_module, "app", own)
    specs = {"small": SMALL, "wrong": WRONG}
    monkeypatch.setattr("kernelry.cli.conformance.installed_spec", specs.__getitem__)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kernelry", "conformance", *map(str, arguments)])
        status = cli.main()
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def test_command_reports_each_claim(command):
    status, out, _ = command("small", "--quick")
    assert status == 0
    assert "small: ok" in out
    assert "refusals" in out
    assert "0 failed" in out


def test_command_shows_failures_and_exits_with_1(command, monkeypatch, wrong):
    reports = {"small": run(SMALL, quick=True), "wrong": wrong}
    monkeypatch.setattr("kernelry.cli.conformance.run", lambda spec, **_: reports[spec.name])
    status, out, _ = command("small", "wrong", "--quick", "--workers", 1)
    assert status == 1
    assert "small: ok" in out
    assert "failed: full attention (output)" in out
    assert "out is wrong" in out
    status, out, _ = command("small", "wrong", "--quick", "--json", "--workers", 1)
    assert status == 1
    assert [kernel["ok"] for kernel in json.loads(out)["kernels"]] == [True, False]


@pytest.mark.parametrize("arguments", [(), ("small", "--all")])
def test_command_wants_names_or_all(command, arguments):
    status, _, err = command(*arguments)
    assert status == 2
    assert "--all" in err


def test_command_reads_known_failures(command, tmp_path):
    path = tmp_path / "known.toml"
    path.write_text('[small]\n"full attention" = "was wrong once"\n')
    status, out, _ = command("small", "--quick", "--known-failures", path)
    assert status == 1
    assert "unexpected pass: full attention" in out
    path.write_text("small = 3")
    status, _, err = command("small", "--known-failures", path)
    assert status == 2
    assert "[small]" in err


def test_command_holds_served_counts(command, tmp_path):
    path = tmp_path / "served.json"
    path.write_text('{"small": {"quick": 1, "full": 100000}}')
    assert command("small", "--quick", "--at-least", path)[0] == 0
    path.write_text('{"small": {"quick": 100000}}')
    status, out, _ = command("small", "--quick", "--at-least", path)
    assert status == 1
    assert "at least 100000" in out
    path.write_text("[]")
    assert command("small", "--at-least", path)[0] == 2


@pytest.mark.versions
def test_several_processes_report_what_one_does():
    counts = []
    names = ("paged", "cudnn_jax")
    reports = run_in_processes(
        names, workers=2, quick=True, known_failures={}, progress=lambda done, total: counts.append((done, total))
    )
    alone = [run(installed_spec(name), quick=True) for name in names]
    assert [report.kernel for report in reports] == list(names)
    for found, expected in zip(reports, alone, strict=True):
        assert [(case.name, case.outcome) for case in found.cases] == [(c.name, c.outcome) for c in expected.cases]
        assert found.runs_here == expected.runs_here
    assert counts == [(done, len(counts)) for done in range(1, len(counts) + 1)]


def test_several_processes_refuse_a_known_failure_of_no_case():
    with pytest.raises(ArgumentError, match="full atention"):
        run_in_processes(
            ["paged"],
            workers=2,
            known_failures={"paged": {"full atention": "misspelt"}},
            progress=lambda *_: None,
        )


CALLS = {
    "each case": ("--kernelry-kernel", "cudnn_jax", "--kernelry-quick", "-v"),
    "misspelt": ("--kernelry-kernel", "dot_prodct"),
    "no kernel": (),
}


@pytest.fixture(scope="module")
def pytest_says(tmp_path_factory):
    """What pytest says to an author of a kernel, outside this repository: status and output of each call, by name."""
    folder = tmp_path_factory.mktemp("author")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("KERNELRY_", "PYTEST_"))} | {
        "KERNELRY_MEASUREMENTS": ""
    }
    head = ("-p", "kernelry_pytest", "-p", "no:cacheprovider", "-rs", "--pyargs", "kernelry.testing")
    code = f"import pytest\nfor call in {list(CALLS.values())}:\n  print('END', int(pytest.main([*{head}, *call])))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    found = re.findall(r"(.*?)^END (\d+)$", done.stdout, re.DOTALL | re.MULTILINE)
    return {name: (int(status), text) for name, (text, status) in zip(CALLS, found, strict=True)}


@pytest.mark.versions
def test_pytest_plugin_makes_a_test_of_each_case(pytest_says):
    status, text = pytest_says["each case"]
    assert status == 0, text
    assert "cudnn_jax: refuses soft_cap] PASSED" in text
    assert "needs gpu" in text


@pytest.mark.versions
def test_pytest_plugin_names_kernels_for_a_misspelt_one(pytest_says):
    status, text = pytest_says["misspelt"]
    assert status != 0
    assert "did you mean 'dot_product'" in text


@pytest.mark.versions
def test_pytest_without_a_kernel_says_how_to_name_one(pytest_says):
    status, text = pytest_says["no kernel"]
    assert status == 0
    assert "--kernelry-kernel NAME" in text


@pytest.mark.versions
def test_pytest_plugin_imports_no_jax():
    code = "import sys, kernelry_pytest; assert not {'jax', 'numpy', 'kernelry'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Nominal(Small):
    """Takes the batch from the request, where a symbolic one counts as 1."""

    def forward(self, inputs, request, tiling, *, statistics):
        partial = Small.forward(self, inputs, request, tiling, statistics=statistics)
        rows = jnp.arange(inputs.query.shape[0]).reshape(-1, 1, 1, 1)
        return Partial(jnp.where(rows < request.batch, partial.out, 0), dtype=request.dtype)


@pytest.mark.versions
@pytest.mark.parametrize(("body", "outcome"), [(Small, Outcome.PASSED), (Nominal, Outcome.FAILED)])
def test_a_kernel_that_declares_symbolic_batches_is_exported_for_one(body, outcome):
    capabilities = dataclasses.replace(CAPABILITIES, symbolic_sizes=frozenset({"batch"}))
    spec = dataclasses.replace(SMALL, load=body, capabilities=capabilities)
    assert result(spec, "symbolic batch").outcome is outcome
