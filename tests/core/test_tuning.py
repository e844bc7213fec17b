"""kernelry tune: what is tried, how it is timed and predicted, what is stored, and what it decides."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import ModelShape, Target, masks
from kernelry.cli import tune as verb
from kernelry.config import load_config
from kernelry.errors import ConfigError
from kernelry.phases.calls import calls
from kernelry.plugin import Refusal, RefusalCode
from kernelry.policy import policy
from kernelry.policy.measurements import Kind, Measurements
from kernelry.policy.policy import Switches
from kernelry.policy.store import Store, versions_here
from kernelry.testing import reference_attention
from kernelry.tuning import run, timing
from kernelry.tuning.choices import Job, choices_of, refusals_of
from kernelry.tuning.operands import operands
from kernelry.tuning.run import Tuner

pytestmark = pytest.mark.xdist_group("test_tuning")

SHAPE = ModelShape(q_len=16, max_len=32, q_heads=2, head_dim=8, dtype="float32")
CONFIG = load_config({})


def jobs(config=CONFIG, shape=SHAPE, target="cpu"):
    return {call.name: Job(call.name, call, config.policy) for call in calls(config, shape, Target.parse(target))}


PREFILL = jobs()["prefill"]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "times.json")


# What is tried


def test_every_kernel_that_serves_is_tried_with_each_of_its_tilings_the_defaults_first():
    found = choices_of(PREFILL)
    blockwise = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "blockwise")
    request = PREFILL.call.request
    assert [choice.kernel for choice in found[:2]] == ["dot_product", "blockwise"]
    tilings = [choice.tiling for choice in found if choice.kernel == "blockwise"]
    assert tilings == list(dict.fromkeys(blockwise.tilings(request)))
    assert {choice.kernel for choice in found} == {"dot_product", "blockwise"}


def test_tilings_are_those_of_what_the_kernel_is_asked_inside_its_adapters():
    job = jobs(shape=dataclasses.replace(SHAPE, q_len=1000, max_len=1000, head_dim=96), target="tpu:v5e")["prefill"]
    [first, *_] = choices_of(job, ["splash"])
    assert first.tiling == job.resolved(kernel="splash").plan.tiling


def test_kernels_can_be_named_and_tilings_be_few():
    found = choices_of(PREFILL, ["blockwise"], most=2)
    assert [choice.kernel for choice in found] == ["blockwise"] * 2
    assert choices_of(PREFILL, ["splash"]) == ()
    [why] = refusals_of(PREFILL, ["splash"])
    assert why.startswith("prefill: no kernel serves it (splash: platform=cpu is not tpu")


def test_a_config_that_allows_one_kernel_has_no_other_tried():
    only = load_config({"rules": [{"use": ["blockwise"]}]})
    assert {choice.kernel for choice in choices_of(jobs(only)["prefill"])} == {"blockwise"}


def test_a_kernel_with_reservations_is_tried_only_where_it_is_named():
    first = (Refusal(RefusalCode.EXPERIMENTAL, "first release"),)
    blockwise = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "blockwise")
    with kernelry.use(kernels=[dataclasses.replace(blockwise, name="new", reservations=lambda _: first)]):
        assert {choice.kernel for choice in choices_of(PREFILL)} == {"dot_product", "blockwise"}
        assert {choice.kernel for choice in choices_of(PREFILL, ["new"])} == {"new"}


def test_what_is_tried_does_not_depend_on_what_was_tried_before(store):
    list(Tuner(store, clock=Ticks()).measure(choices_of(PREFILL, ["blockwise"], most=1)))
    times = Measurements(store.read(), versions_here())
    assert PREFILL.resolved(times).kernel == "blockwise"
    assert choices_of(PREFILL)[0].kernel == "dot_product"


# Operands


CONFIGS = [
    ({}, SHAPE),
    ({}, dataclasses.replace(SHAPE, cache="two-part")),
    ({}, dataclasses.replace(SHAPE, cache="paged:4")),
    ({}, dataclasses.replace(SHAPE, cache="paged:4:int8")),
    ({}, dataclasses.replace(SHAPE, cache="contiguous:int4")),
    ({}, dataclasses.replace(SHAPE, cache="contiguous:value_in_key")),
    ({}, dataclasses.replace(SHAPE, cache="paged:4:interleaved")),
    ({"type": "local_sliding", "window": 8}, dataclasses.replace(SHAPE, cache="rolling")),
    ({}, dataclasses.replace(SHAPE, mask="segments & spans")),
    ({"sinks": True, "soft_cap": 20.0}, SHAPE),
    ({"bias": True}, SHAPE),
]


@pytest.mark.parametrize(("options", "shape"), CONFIGS, ids=str)
def test_operands_have_the_shapes_of_the_call_and_finite_results(options, shape):
    from kernelry.aot.layers import arguments_of, program_of

    for name, job in jobs(load_config(options), shape).items():
        found = operands(job.call)
        asked = arguments_of(job.call)
        shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(asked)]
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(found)] == shapes, name
        results = jax.tree.leaves(jax.jit(program_of(job.call))(*found))
        assert all(np.isfinite(np.asarray(result, np.float32)).all() for result in results), name


def test_the_operands_of_a_decode_step_see_the_whole_cache():
    from kernelry.aot.layers import program_of

    job = jobs()["decode"]
    found = operands(job.call)
    out = jax.jit(program_of(job.call))(*found)
    query, key, value = (np.asarray(array) for array in found[:3])
    expected = reference_attention(query, key, value, mask=masks.Causal().at(query_offset=31)).out
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("how", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("pages", ["contiguous:", "paged:16:"])
def test_quantised_operands_have_variance_1_as_others_do(how, pages):
    """With larger logits a softmax sees one key, and rounding decides which: nothing could be compared."""
    job = jobs(shape=dataclasses.replace(SHAPE, cache=f"{pages}{how}"))["decode"]
    for stored in operands(job.call)[1:3]:
        array = stored.gather() if pages == "paged:16:" else stored
        plain = np.asarray(array.dequantize(), np.float64)
        assert plain.std() == pytest.approx(1, abs=0.15)


# Timing, with a clock that tells the work of a call


class Ticks:
    """A clock that moves when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-9
        return self.now


def runner(clock, seconds):
    """A call that takes so many seconds of the clock; `seconds` may depend on the time."""

    def call():
        clock.now += seconds(clock.now) if callable(seconds) else seconds
        return jnp.zeros(())

    return timing.Runner(call)


def test_the_time_of_a_call_is_the_median_of_turns():
    clock = Ticks()
    outlier = iter([9.0])
    found = timing.alone(runner(clock, lambda _: next(outlier, 0.25)), clock)
    assert found == pytest.approx(0.25)


def test_drift_changes_no_ratio():
    clock = Ticks()
    slower = runner(clock, lambda now: 0.02 * (1 + now))  # the machine gets slower all the time
    reference = runner(clock, lambda now: 0.01 * (1 + now))
    assert timing.compared(slower, reference, clock) == pytest.approx(2.0, rel=0.03)


def test_turns_end_with_their_time_but_are_never_fewer_than_five():
    clock, taken = Ticks(), []
    timing.compared(runner(clock, lambda _: taken.append(1) or 10.0), runner(clock, 10.0), clock)
    assert len(taken) == 5
    taken.clear()
    timing.compared(runner(clock, lambda _: taken.append(1) or 1e-4), runner(clock, 1e-4), clock)
    assert len(taken) == 31


# Tuning, with times that are told


@pytest.fixture
def told(monkeypatch):
    """Kernels that take the seconds told, by name and tiling; an exception is raised when compiled."""
    compiled, seconds = [], {}

    def of(choice, arguments, clock):
        key = blocks(choice)
        compiled.append(key)
        found = seconds.get(key, 1e-3)
        if isinstance(found, Exception):
            raise found
        return runner(clock, found)

    monkeypatch.setattr(run.Runner, "of", of)
    return compiled, seconds


def about(seconds):
    """So many seconds, and what the clock takes."""
    return pytest.approx(seconds, rel=1e-3)


def blocks(choice):
    return choice.kernel, choice.tiling


def test_times_are_stored_as_soon_as_they_are_known(store, told):
    choices = choices_of(PREFILL)
    for number, result in enumerate(Tuner(store, clock=Ticks()).measure(choices)):
        assert result.is_new
        assert len(store.read()) == number + 1
        assert result.entry in store.read()
    assert len(store.read()) == len(choices)


def test_a_time_is_the_references_time_times_the_ratio(store, told):
    _, seconds = told
    choices = choices_of(PREFILL)
    first, second = blocks(choices[0]), blocks(choices[1])
    seconds.update({first: 0.5, second: 0.125})
    found = {blocks(result.choice): result.entry.seconds for result in Tuner(store, clock=Ticks()).measure(choices)}
    assert found[first] == about(0.5)
    assert found[second] == about(0.125)


def test_a_second_run_tries_nothing_and_says_so(store, told):
    compiled, _ = told
    choices = choices_of(PREFILL)
    first = list(Tuner(store, clock=Ticks()).measure(choices))
    compiled.clear()
    second = list(Tuner(store, clock=Ticks()).measure(choices))
    assert [result.entry for result in second] == [result.entry for result in first]
    assert not any(result.is_new for result in second)
    assert compiled == []


def test_a_run_that_was_interrupted_goes_on_next_to_the_same_reference(store, told):
    compiled, seconds = told
    choices = choices_of(PREFILL)
    seconds.update({blocks(choices[0]): 0.5, blocks(choices[2]): 0.25})
    begun = Tuner(store, clock=Ticks()).measure(choices)
    before = [next(begun).entry, next(begun).entry]
    begun.close()
    compiled.clear()
    seconds.update({key: value * 2 for key, value in seconds.items()})  # the machine is slower now
    found = list(Tuner(store, clock=Ticks()).measure(choices))
    assert [result.entry for result in found if not result.is_new] == before
    assert compiled.count(blocks(choices[1])) == 0, "what was stored is not compiled again"
    [third] = [result.entry.seconds for result in found if result.choice is choices[2]]
    assert third == about(0.25), "as it would have been in the first run"


def test_again_repeats_what_is_stored(store, told, monkeypatch):
    moments = iter(f"2026-01-01T00:00:{second:02}Z" for second in range(60))
    monkeypatch.setattr(run, "now", lambda: next(moments))
    _, seconds = told
    choices = choices_of(PREFILL, ["blockwise"], most=1)
    [before] = Tuner(store, clock=Ticks()).measure(choices)
    seconds[blocks(choices[0])] = 0.75
    [after] = Tuner(store, again=True, clock=Ticks()).measure(choices)
    assert (before.entry.seconds, after.entry.seconds) == (about(1e-3), about(0.75))
    assert store.read() == (after.entry,)


def test_what_cannot_run_is_stored_with_the_reason_and_the_next_one_is_the_reference(store, told):
    compiled, seconds = told
    choices = choices_of(PREFILL)
    seconds[blocks(choices[0])] = RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    seconds[blocks(choices[2])] = ValueError("no such block")
    found = {blocks(result.choice): result.entry for result in Tuner(store, clock=Ticks()).measure(choices)}
    assert len(found) == len(choices)
    assert found[blocks(choices[0])].failure == "RESOURCE_EXHAUSTED: out of memory"
    assert (found[blocks(choices[2])].seconds, found[blocks(choices[2])].failure) == (None, "no such block")
    assert found[blocks(choices[1])].seconds == about(1e-3)
    compiled.clear()
    assert all(not result.is_new for result in Tuner(store, clock=Ticks()).measure(choices))
    assert compiled == []


def test_nothing_is_begun_after_the_budget_and_a_second_run_goes_on(store, told):
    choices = choices_of(PREFILL)
    clock = Ticks()
    found = []
    for result in Tuner(store, ends=clock.now + 5.0, clock=clock).measure(choices):
        found.append(result)
        clock.now += 2.0
    assert 0 < len(found) < len(choices)
    rest = list(Tuner(store, clock=Ticks()).measure(choices))
    assert len(rest) == len(choices)
    assert [result.entry for result in rest if not result.is_new] == [result.entry for result in found]


def test_results_that_cannot_be_stored_are_an_error(tmp_path, told):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write the times"):
        list(Tuner(Store(tmp_path / "file" / "times.json"), clock=Ticks()).measure(choices_of(PREFILL)))


# Predictions

prediction = pytest.importorskip("kernelry.aot.prediction")
ON_TPU = jobs(shape=dataclasses.replace(SHAPE, q_len=1024, max_len=1024, head_dim=128), target="tpu:v6e")["prefill"]


def predictor(asked, seconds):
    """Predicts by the candidate's kernel, and notes what was asked."""

    def predict(candidates, target, *, policy=None):
        for candidate in candidates:
            asked.append((candidate.kernel, candidate.tiling, str(target)))
            found = seconds.get(candidate.kernel)
            failure = found if isinstance(found, str) else ""
            yield prediction.Prediction(None if failure else found, (), failure)

    return predict


def test_predictions_are_stored_one_by_one_and_not_asked_again(store):
    asked, target = [], Target.parse("tpu:v6e")
    predict = predictor(asked, {"splash": 2e-3, "tokamax_splash": "out of vmem"})
    choices = choices_of(ON_TPU, ["splash", "tokamax_splash", "dot_product"], most=1)
    begun = Tuner(store).predict(choices, target, predict)
    first = next(begun)
    assert (first.entry.kind, first.entry.seconds) == (Kind.PREDICTED, 2e-3)
    assert store.read() == (first.entry,)
    begun.close()
    found = {result.choice.kernel: result for result in Tuner(store).predict(choices, target, predict)}
    assert [kernel for kernel, _, _ in asked] == ["splash", "tokamax_splash"], "of XLA's own work there is no model"
    assert asked[0][1:] == (choices[0].tiling.values, "tpu:v6e")
    assert not found["splash"].is_new
    assert found["tokamax_splash"].entry.failure == "out of vmem"
    assert found["dot_product"].entry.failure == "no model predicts its time"
    assert {entry.kernel for entry in store.read()} == {"splash", "tokamax_splash"}


def test_a_prediction_decides_for_the_device_it_is_about(store):
    choices = choices_of(ON_TPU, ["splash"])
    order = iter(range(len(choices), 0, -1))

    def predict(candidates, target, *, policy=None):
        for _ in candidates:
            yield prediction.Prediction(next(order) * 1e-3)

    list(Tuner(store).predict(choices, Target.parse("tpu:v6e"), predict))
    times = Measurements(store.read(), versions_here())
    found = ON_TPU.resolved(times)
    assert (found.kernel, found.plan.tiling) == ("splash", choices[-1].tiling)
    assert found.rule == "predicted for tpu:v6e, static, not measured: splash 1 ms"
    on_cpu = jobs(shape=dataclasses.replace(SHAPE, q_len=1024, max_len=1024, head_dim=128))["prefill"]
    assert on_cpu.resolved(times) == on_cpu.resolved()


def test_predictions_end_with_the_budget(store):
    clock, asked = Ticks(), []
    choices = choices_of(ON_TPU, ["splash"])
    predict = predictor(asked, {"splash": 1e-3})
    found = []
    for result in Tuner(store, ends=clock.now + 3.0, clock=clock).predict(choices, Target.parse("tpu:v6e"), predict):
        found.append(result)
        clock.now += 2.0
    assert len(found) == len(asked) == 2


# The command


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command in this process, with a store of its own."""
    from kernelry import cli

    path = tmp_path / "store" / "times.json"
    config = tmp_path / "config.toml"
    config.write_text("[attention]\nkernel = 'auto'\n")
    switches = Switches.parse({"KERNELRY_MEASUREMENTS": str(path)})
    monkeypatch.setattr(policy, "_of_process", lambda: switches)
    monkeypatch.setattr(timing, "_SECONDS", 0.0)

    def call(verb, *arguments):
        policy.measurements_of_process.cache_clear()
        monkeypatch.setattr(sys, "argv", ["kernelry", verb, *(str(each) for each in arguments)])
        status = cli.main()
        output = capsys.readouterr()
        return status, output.out, output.err

    yield call, config, Store(path)
    policy.measurements_of_process.cache_clear()


SIZES = ("--q-len", "64", "--heads", "2", "--head-dim", "16", "--dtype", "float32")


def test_tuning_on_cpu_times_all_phases_and_changes_what_is_chosen(command):
    tune, config, store = command
    status, out, _ = tune("tune", config, *SIZES, "--kernel", "blockwise", "--max-tilings", "2", "--json")
    assert status == 0, out
    told = json.loads(out)
    assert (told["store"], told["left_out"]) == (str(store.path), 0)
    assert [call["name"] for call in told["calls"]] == ["train", "prefill", "decode"]
    for call in told["calls"]:
        shipped = "blockwise" if call["name"] == "prefill" else "dot_product"
        assert (call["before"]["kernel"], call["now"]["kernel"]) == (shipped, "blockwise")
        [winner] = [result for result in call["results"] if result["winner"]]
        assert winner["seconds"] == min(result["seconds"] for result in call["results"])
        assert call["now"]["tiling"] == winner["tiling"]
        assert {result["kind"] for result in call["results"]} == {"measured"}
    asked = ("--mode", "prefill", *SIZES)
    status, out, _ = tune("explain", *asked, "--json")
    assert json.loads(out)["plan"]["kernel"] == "blockwise"
    assert json.loads(out)["rule"].startswith("measured on cpu: blockwise ")
    status, out, _ = tune("tune", config, *SIZES, "--kernel", "blockwise", "--max-tilings", "2")
    assert "stored before" in out
    assert "without times dot_product; now blockwise with block_kv=" in " ".join(out.split())
    status, out, _ = tune("doctor")
    assert f"kernelsin{store.path}:{len(store.read())}measuredcpu" in "".join(out.split())


def test_a_model_is_tuned_by_the_kinds_of_its_layers(command):
    tune, _, _ = command
    status, out, err = tune(
        "tune", "--model", "gemma-3-27b", "--layer-kind", "sliding", "--mode", "decode", "--q-len", "8",
        "--kernel", "dot_product", "--json",
    )  # fmt: skip
    assert status == 0, err
    assert [call["name"] for call in json.loads(out)["calls"]] == ["sliding: decode"]


def test_times_are_exported_and_imported(command, tmp_path):
    tune, config, store = command
    tune("tune", config, *SIZES, "--mode", "prefill", "--kernel", "dot_product")
    mine, other = tmp_path / "mine.json", tmp_path / "other.json"
    status, out, _ = tune("tune", "--export", mine)
    assert (status, Store(mine).read()) == (0, store.read())
    faster = [dataclasses.replace(entry, seconds=1e-9, time="2999") for entry in store.read()]
    Store(other).add(faster)
    status, out, _ = tune("tune", "--import", other, "--import", mine, "--export", mine, "--json")
    assert (status, json.loads(out)["entries"]) == (0, 1)
    assert list(store.read()) == list(Store(mine).read()) == faster


def test_an_export_over_a_file_that_is_not_of_times_is_refused(command):
    tune, config, store = command
    before = config.read_text()
    status, _, err = tune("tune", config, *SIZES, "--export", config)
    assert status == 2
    assert "config.toml is not a file of times that can be read" in " ".join(err.split())
    assert config.read_text() == before
    assert store.read() == (), "nothing was tried"


def test_a_kernel_that_is_named_twice_is_tried_once(command):
    tune, config, _ = command
    twice = ("--kernel", "dot_product", "--kernel", "dot_product")
    _, out, _ = tune("tune", config, *SIZES, "--mode", "prefill", *twice, "--json")
    assert len(json.loads(out)["calls"][0]["results"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--import", "absent.json"], "--import absent.json: there is no such file"),
        ([], "name either a config or"),
        (
            ["CONFIG", "--target", "cpu"],
            "predicted for TPUs alone, e.g. tpu:v5e; leave --target out",
        ),
        (["CONFIG", "--target", "tpu:v9"], "unknown tpu kind 'v9'"),
        (["CONFIG", "--mode", "trian"], "did you mean 'train'?"),
        (["CONFIG", "--kernel", "splash"], "train: no kernel serves it (splash: platform=cpu is not tpu"),
        (["CONFIG", "--kernel", "dotproduct"], "did you mean 'dot_product'?"),
        (["CONFIG", "--kernel", "dot_product", "--kernel", "blokwise"], "did you mean 'blockwise'?"),
        (["--export", "."], "cannot write the times to .: it is not a file"),
        (["CONFIG", "--sharding", "batch=d:2", "--batch", "2"], "tune tries calls on one device: pass --sharding ''"),
    ],
)
def test_what_cannot_be_tuned_is_an_error_that_says_what_to_do(command, monkeypatch, arguments, words):
    tune, config, _ = command
    monkeypatch.setattr(verb, "run_nothing", lambda: None)
    status, out, err = tune("tune", *(config if each == "CONFIG" else each for each in arguments), *SIZES)
    assert status == 2, out
    assert words in " ".join(err.replace("│", " ").split())


def test_a_model_without_calls_of_the_mode_is_an_error(command):
    tune, _, _ = command
    status, _, err = tune("tune", "--model", "bert-base", "--mode", "decode", "--q-len", "8")
    assert status == 2
    assert "nothing to tune: no layer has a call of mode decode; leave --mode out" in " ".join(err.split())


def test_what_the_budget_left_out_is_said(command):
    tune, config, _ = command
    status, out, _ = tune("tune", config, *SIZES, "--mode", "prefill", "--kernel", "blockwise", "--budget", "0")
    assert status == 1
    assert "5 were not tried within the budget; run again to go on." in out


def test_a_damaged_store_is_set_aside_with_a_warning(command):
    tune, config, store = command
    store.path.parent.mkdir()
    store.path.write_text("{")
    status, out, _ = tune("doctor", "--json")
    [fault] = json.loads(out)["faults"]
    assert (status, fault["plugin"]) == (1, "KERNELRY_MEASUREMENTS")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = tune("tune", config, *SIZES, "--mode", "decode", "--kernel", "dot_product")
    assert (status, len(store.read())) == (0, 1)
    assert err.startswith("warning: ")
    assert "it is now times.json.damaged-1" in err


def test_strict_mode_cannot_be_tuned(command, monkeypatch):
    tune, config, store = command
    switches = Switches(strict=True, measurements=str(store.path))
    monkeypatch.setattr(policy, "_of_process", lambda: switches)
    status, _, err = tune("tune", config, *SIZES)
    assert status == 2
    assert "KERNELRY_STRICT is on" in err


def test_a_run_that_is_killed_loses_nothing_and_is_resumed(tmp_path):
    store = Store(tmp_path / "times.json")
    config = tmp_path / "config.toml"
    config.write_text("[attention]\nkernel = 'auto'\n")
    environ = {**os.environ, "KERNELRY_MEASUREMENTS": str(store.path), "JAX_PLATFORMS": "cpu"}
    program = "import sys; from kernelry.cli import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        program,
        "tune",
        config,
        *SIZES,
        "--mode",
        "prefill",
        "--max-tilings",
        "2",
        "--json",
    ]
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        ends = time.monotonic() + 100
        while not store.read() and time.monotonic() < ends:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
    before = store.read()
    assert killed.returncode == -signal.SIGKILL
    assert 0 < len(before) < 3
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=100)
    [call] = json.loads(done.stdout)["calls"]
    assert [result["new"] for result in call["results"]].count(False) == len(before)
    assert set(before) < set(store.read())
    assert len(store.read()) == 3
