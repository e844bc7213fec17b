"""What is said of a call on a mesh: text, data, lock files, proofs, and errors."""

import dataclasses
import io
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import kernelry
from kernelry import ModelShape, Request, aot, cli, masks
from kernelry.aot import Work, compilation, layers
from kernelry.aot.compilation import Compilation
from kernelry.cli import check
from kernelry.config import AttentionConfig
from kernelry.errors import ArgumentError, ConfigError, NoKernelError, PluginError, ShapeError
from kernelry.parallel import Sharding
from kernelry.plugin import Policy
from kernelry.policy.lock import Entry, Lock
from kernelry.resolution.account import in_bytes, in_time
from kernelry.resolution.published import links_between

CAUSAL = masks.Causal()
MILLION = Request(
    target="tpu:v5e",
    q_len=2**20,
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    mask=CAUSAL,
    sharding="sequence=c:16 ring dual",
)
SMALL = Request(batch=4, q_len=256, q_heads=8, kv_heads=4, mask=CAUSAL, sharding="batch=d:2 sequence=c:4 ring")


def explained(request, **changed):
    return kernelry.explain(dataclasses.replace(request, **changed), changes=False)


def lines(request, **changed):
    return str(explained(request, **changed)).splitlines()


def line(start, told):
    return next(each for each in told if each.startswith(start))


# Text.


def test_what_is_told_of_a_mesh():
    told = lines(MILLION, q_len=8192, kv_len=8192, batch=8, sharding="batch=d:4 heads=t:2 sequence=c:8 ring dual")
    own = "block_kv={0}, block_kv_dkv={0}, block_kv_dq={0}, block_q={0}, block_q_dkv={0}, block_q_dq={0}".format
    assert told[1:6] == [
        "  on 64 devices: batch over d:4, heads over t:2, sequence over c:8, by ring, dual_chunk",
        "  each device has B=8/4=2 T=8192/8=1024 S=8192/8=1024 N=32/2=16 K=8/2=4",
        "  64 pairs of shards: 0 full, 64 partial, 0 skipped, 8 of 8 steps",
        f"    8 of mask=causal → splash with {own(512)}",
        f"    28 of mask=causal at query=static → splash through empty_rows_from_lse with {own(1024)}",
    ]
    assert line("  forward", told) == "  forward: sends 33.6 MB, holds 8.39 MB more"
    assert "    33.6 MB: 16 permutes of K and V" in told
    assert line("    over", told) == "    over one ICI link: 671 µs, hidden by 709 µs of compute"
    assert "    8.39 MB: 2 permutes of dK and dV home" in told
    assert line("  assumed: one", told) == (
        "  assumed: one ICI link, 50 GB/s in one direction (Google Cloud: 400 GB/s per chip both ways, over 4 links)"
    )
    assert "  assumed: compute at 50% of the published 197 TFLOP/s of bfloat16" in told
    assert "    dual_chunk 260, waits for 260 (1.00)" in told
    assert line("  the answers", told).endswith("are about 28 pairs, mask=causal at query=static")


def test_equal_plans_are_told_once():
    told = lines(SMALL)
    assert told[4:7] == ["    4 of mask=causal", "    6 of mask=full", "    each → dot_product"]
    assert sum("→" in each for each in told) == 2


@pytest.mark.parametrize(
    ("sharding", "words"),
    [
        ("batch=d:2 heads=t:2", "on 4 devices: batch over d:2, heads over t:2"),
        ("sequence=c:4 all_gather", "on 4 devices: sequence over c:4, by all_gather"),
        ("sequence=c:4 kv_sequence=none", "on 4 devices: sequence over c:4, keys on every device"),
        ("kv_sequence=c:4", "on 4 devices: keys over c:4"),
        ("sequence=c:4,u:2 ulysses=u:2 usp", "on 8 devices: sequence over c:4,u:2, by usp with ulysses over u:2"),
    ],
)
def test_each_sharding_is_told_in_words(sharding, words):
    assert lines(SMALL, sharding=sharding)[1] == f"  {words}"


def test_repeated_heads_are_told():
    told = lines(SMALL, sharding="heads=t:8")
    assert told[2].endswith("N=8/8=1 K=4·2/8=1")


def test_a_call_that_sends_nothing_says_so():
    assert "  forward: sends nothing" in lines(SMALL, sharding="batch=d:2")


def test_traced_positions_are_told_to_leave_no_step_out():
    told = lines(SMALL, mask=CAUSAL.at(query_positions=jnp.arange(256)))
    assert any("known at run time only" in each for each in told)
    assert not any("known at run time only" in each for each in lines(SMALL))


def test_one_device_is_told_as_before():
    assert lines(SMALL, sharding=None)[1].startswith("  decided by: ")
    assert explained(SMALL, sharding=None).to_json()["shards"] is None


@pytest.mark.parametrize(("size", "words"), [(0, "0 B"), (999, "999 B"), (2000, "2 kB"), (4.03e9, "4.03 GB")])
def test_bytes_in_words(size, words):
    assert in_bytes(size) == words


@pytest.mark.parametrize(("seconds", "words"), [(2, "2 s"), (0.0125, "12.5 ms"), (2e-6, "2 µs"), (5e-9, "5 ns")])
def test_times_in_words(seconds, words):
    assert in_time(seconds) == words


def test_the_headline_names_every_kernel():
    found = explained(SMALL)
    assert " → dot_product (" in found.headline
    assert " → dot_product and blockwise (" in with_another_kernel(found).headline
    assert with_another_kernel(found).kernels == ("dot_product", "blockwise")
    alone = explained(SMALL, sharding=None, q_len=64, kv_len=64)
    assert (found.kernels, alone.kernels) == (("dot_product",), ("dot_product",))
    assert explained(SMALL, q_heads=6, kv_heads=6, sharding="sequence=c:4 ulysses").kernels == ()


def test_check_names_every_kernel():
    found = with_another_kernel(explained(SMALL))
    report = aot.LayerReport("train", found, None, Work.of(SMALL, CAUSAL))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(check._table("cpu", (report,)))
    assert "dot_product and blockwise" in console.export_text()


def with_another_kernel(resolution):
    """The same resolution, with blockwise for the first class of pairs."""
    first, *kept = resolution.shards.resolutions
    other = kernelry.explain(first.request, kernel="blockwise", changes=False)
    shards = dataclasses.replace(resolution.shards, resolutions=(other, *kept))
    return dataclasses.replace(resolution, shards=shards)


def test_classes_with_other_kernels_are_told_apart():
    told = str(with_another_kernel(explained(SMALL))).splitlines()
    assert told[4:6] == ["    4 of mask=causal → blockwise", "    6 of mask=full → dot_product"]


def test_changes_are_found_on_a_mesh():
    changes = {str(each) for each in kernelry.explain(MILLION).changes}
    assert "dot_product with mode=decode" in changes
    flash = dataclasses.replace(MILLION, q_len=16 * 1024, kv_len=16 * 1024, sharding="heads=t:2", mask=masks.Full())
    assert all("q_len" not in each.fields for each in kernelry.explain(flash).changes)


def test_gpus_of_several_hosts_are_told_with_their_network():
    assert [link.name for link in links_between("h100", 16)] == ["NVLink", "InfiniBand NDR"]
    told = lines(MILLION, target="gpu:h100")
    assert any("over NVLink: " in each for each in told)
    assert any("over InfiniBand NDR: " in each for each in told)


@pytest.mark.parametrize("target", ["tpu:v4", "cpu", "gpu", "tpu"])
def test_unknown_links_have_no_times(target):
    assert links_between(None if ":" not in target else target.partition(":")[2], 16) == ()
    told = lines(MILLION, target=target)
    assert "  no times: no rate of the links of this target is published" in told
    assert not any("compute" in each for each in told[:12])


def test_other_dtypes_have_no_times_of_compute():
    told = lines(MILLION, dtype="float32", target="tpu:v5e")
    assert line("    over one ICI link", told).endswith("of which no rate is published for this dtype")


ANY = (masks.Full(), CAUSAL, masks.SlidingWindow(20, 9), masks.Chunked(64), CAUSAL & masks.Segments([0] * 256), ~CAUSAL)
ANYHOW = (
    "heads=t:8",
    "sequence=c:4",
    "sequence=c:4 ulysses dual",
    "sequence=c:256 ring",
    "batch=d:2 heads=t:2 sequence=c:2 all_gather striped",
    "sequence=c:4,u:2 ulysses=u:2 usp dual",
    "batch=d:4 kv_sequence=c:4",
    "sequence=c:4 native",
)


def test_any_call_on_any_mesh_is_told():
    targets = itertools.cycle(["cpu", "tpu:v5e", "gpu:h100"])
    for (mask, sharding), target in zip(itertools.product(ANY, ANYHOW), targets, strict=False):
        found = explained(SMALL, mask=mask, sharding=sharding, target=target, dtype="bfloat16")
        assert str(found).startswith(f"platform={target} ")
        assert json.loads(json.dumps(found.to_json()))["request"]["q_len"] == 256
        if found.plan is not None and found.shards is not None:
            assert {"forward", "backward"} <= {each.split(":")[0].strip() for each in str(found).splitlines()}


def test_a_call_without_queries_keys_or_rows_is_told():
    for sizes in ({"q_len": 0, "mask": masks.Full()}, {"kv_len": 0, "mask": masks.Full()}, {"batch": 0}):
        for sharding in ("batch=d:2", "sequence=c:4 ring", "sequence=c:4 ulysses", "kv_sequence=c:4"):
            assert str(explained(SMALL, sharding=sharding, **sizes))


# Data.


def test_the_json_form_is_plain_and_says_what_the_text_says():
    request = dataclasses.replace(MILLION, q_len=8192, kv_len=8192)
    found = json.loads(json.dumps(explained(request).to_json()["shards"]))
    assert Sharding.from_json(found["sharding"]).located == Sharding.parse(request.sharding)
    assert found["devices"] == 16
    assert found["pairs"] == {"full": 0, "partial": 256, "skipped": 0}
    assert [each["pairs"] for each in found["classes"]] == [16, 120, 120]
    assert Request.from_json(found["classes"][0]["request"]).q_len == 512
    assert found["steps"] == len(found["forward"]["step_bytes"]) == 16
    assert found["forward"]["bytes"] == sum(found["forward"]["step_bytes"])
    assert found["backward"]["seconds"][0].keys() == {"compute", "transfers", "not_hidden"}
    assert [each["order"] for each in found["orders"]] == ["contiguous", "dual_chunk", "striped"]


def test_a_call_without_gradients_has_no_backward_pass():
    assert explained(SMALL, mode="prefill").to_json()["shards"]["backward"] is None


# Locks and proofs.


def test_a_lock_holds_every_class_and_is_read_back(tmp_path):
    found = explained(SMALL)
    path = tmp_path / "kernelry.lock.json"
    lock = Lock.of([found]).write(path)
    assert Lock.read(path).entries == lock.entries
    assert lock.entries[0].shards == ("dot_product", "dot_product")
    assert Lock.read(path).difference(found) is None
    assert "dot_product, for other pairs of shards blockwise" in Lock.read(path).difference(with_another_kernel(found))


def test_locks_of_one_device_are_written_as_before():
    assert "shards" not in Entry.of(explained(SMALL, sharding=None)).to_json()


class Program:
    def __init__(self, text):
        self.text = text

    def as_text(self, debug_info=False):
        return self.text


def test_a_program_must_hold_the_kernel_of_every_class():
    both = with_another_kernel(explained(SMALL))
    dense = Program('loc("jit(f)/kernelry.dot_product/dot_general")')
    explained(SMALL).verify(dense)
    with pytest.raises(PluginError, match="the signature of kernel 'blockwise'"):
        both.verify(dense)


# Errors.


@pytest.mark.parametrize(
    ("sizes", "sharding", "words"),
    [
        (
            {"q_len": 250, "kv_len": 256, "mask": masks.Full()},
            "sequence=c:8 ring",
            "query length T=250 does not divide over c: 250 % 8 = 2; pad to 256.",
        ),
        ({"batch": 3}, "batch=d:2", "batch B=3 does not divide over d: 3 % 2 = 1; pad to 4."),
        ({}, "heads=t:16", "heads N=8 does not divide over t: 8 % 16 = 8."),
        (
            {"q_len": 264, "kv_len": 264},
            "sequence=c:8 dual ring",
            "query length T=264 does not divide over c, two chunks for each device: 264 % 16 = 8; pad to 272.",
        ),
        (
            {"q_len": 1, "kv_len": 250, "mask": masks.Full()},
            "kv_sequence=c:4",
            "key length S=250 does not divide over c: 250 % 4 = 2; pad to 252.",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_errors_with_the_arithmetic(sizes, sharding, words):
    with pytest.raises(ShapeError) as error:
        dataclasses.replace(SMALL, sharding=sharding, **sizes)
    assert str(error.value) == words


def test_an_axis_without_a_size_is_an_error():
    with pytest.raises(ArgumentError, match=r"the size of axis 'c' is not said; write e.g. c:8"):
        dataclasses.replace(SMALL, sharding="sequence=c ring")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"q_heads": 6, "kv_heads": 6, "sharding": "sequence=c:4 ulysses"},
            "heads N=6 do not divide over c: 6 % 4 = 2",
        ),
        ({"page_size": 16, "gradients": (), "sharding": "batch=d:2"}, "the batch of paged keys cannot be cut"),
    ],
)
def test_what_a_strategy_cannot_cut_is_refused_by_name(changed, words):
    request = dataclasses.replace(SMALL, **changed)
    with pytest.raises(NoKernelError, match="No kernel for ") as error:
        kernelry.resolve(request)
    assert words in str(error.value)
    assert "No plain kernel" not in str(error.value)
    assert explained(request).advice is None


def test_a_kernel_without_statistics_is_refused_in_a_ring():
    request = dataclasses.replace(
        SMALL,
        target="tpu:v5e",
        mode="decode",
        dtype="bfloat16",
        q_len=1,
        mask=masks.Lengths([256] * 4),
        gradients=(),
        sharding="kv_sequence=c:4",
    )
    with pytest.raises(NoKernelError) as error:
        kernelry.resolve(request, kernel="paged")
    assert "attention to keys of several devices needs statistics, which it does not return" in str(error.value)
    assert "each device has B=4 T=1 S=256/4=64" in str(error.value)


def test_shards_below_a_kernels_smallest_block_are_told_with_their_length():
    request = dataclasses.replace(SMALL, target="tpu:v5e", dtype="bfloat16", sharding="sequence=c:4 ring")
    with pytest.raises(NoKernelError) as error:
        kernelry.resolve(request, kernel="splash", policy=Policy(forbidden_adapters=frozenset({"pad_sequence"})))
    assert "each device has B=4 T=256/4=64 S=256/4=64" in str(error.value)
    assert "q_len=64 is not a multiple of 128" in str(error.value)
    assert "each → no kernel" in str(error.value)


def test_memory_of_adapters_is_compared_with_that_of_a_device(caplog):
    request = dataclasses.replace(MILLION, q_len=512, kv_len=512, q_heads=8, sharding="sequence=c:8 ring")
    kernelry.resolve(request, kernel="splash")
    assert "adapters of splash more than double the memory of platform=tpu:v5e mode=train B=1 T=64 S=64" in caplog.text
    assert "on top of the 0.5 MiB of its arrays" in caplog.text


# Models and the command.

SHAPE = ModelShape(q_len=256, max_len=512, batch=4, q_heads=8, kv_heads=4, head_dim=32, dtype="float32")


def test_a_decode_step_cuts_its_keys_where_training_cuts_both():
    phases = kernelry.resolve_phases(
        AttentionConfig(), dataclasses.replace(SHAPE, sharding="batch=d:2 sequence=c:4 ring dual"), target="cpu"
    )
    cut = {mode: getattr(phases, mode).request.sharding for mode in ("train", "prefill", "decode")}
    assert cut["train"] == cut["prefill"] == "batch=d:2 sequence=c:4 ring dual_chunk"
    assert cut["decode"] == "batch=d:2 kv_sequence=c:4"
    assert all(resolution.plan is not None for resolution in phases.all)


def test_a_sharding_of_a_model_is_read_back_from_its_shape():
    shape = dataclasses.replace(SHAPE, sharding=Sharding(heads="t", sequence="c", sizes={"t": 2, "c": 1}))
    assert shape.sharding == "heads=t:2"
    assert ModelShape(**shape.to_json()) == shape
    assert dataclasses.replace(SHAPE, sharding="heads=t:1").sharding == ""
    with pytest.raises(ArgumentError, match="the size of axis 't' is not said"):
        dataclasses.replace(SHAPE, sharding="heads=t")


def test_a_models_calls_are_cut_as_its_config_says_unless_its_shape_says_otherwise():
    config = AttentionConfig(sharding="heads=t:2 sequence=c:4 ring")

    def cut(**said):
        phases = kernelry.resolve_phases(config, dataclasses.replace(SHAPE, **said), target="cpu", changes=False)
        return [each.request.sharding for each in (phases.train, phases.decode)]

    assert cut() == ["heads=t:2 sequence=c:4 ring", "heads=t:2 kv_sequence=c:4"]
    assert cut(sharding="batch=d:2") == ["batch=d:2", "batch=d:2"]
    assert cut(sharding="") == [None, None]
    config = AttentionConfig(sharding="heads=t")
    assert cut(sharding="heads=t:2") == ["heads=t:2", "heads=t:2"]
    with pytest.raises(ArgumentError, match="the size of axis 't' is not said"):
        cut()


@pytest.mark.versions
@pytest.mark.parametrize("cache", ["contiguous:int8", "rolling:int4", "paged:16:int8", "two-part"])
@pytest.mark.parametrize("sharding", ["batch=d:2 heads=t:2", "heads=t:2 sequence=c:2 ring"])
def test_every_call_of_a_model_is_compiled_as_it_is_cut(cache, sharding, monkeypatch):
    def traced(target, function, *arguments, specs, sharding):
        mesh = jax.sharding.AbstractMesh(*zip(*((size, axis) for axis, size in sharding.sizes), strict=True))

        def check(spec, array):
            jax.sharding.NamedSharding(mesh, spec).shard_shape(array.shape)  # raises where a size does not divide

        jax.tree.map(check, specs, arguments, is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec))
        cut.extend(spec for spec in jax.tree.leaves(specs) if any(spec))
        with jax.sharding.use_abstract_mesh(mesh), kernelry.use(sharding=sharding):
            jax.eval_shape(function, *arguments)
        return Compilation(target, 0.0, {}, None)

    cut = []
    monkeypatch.setattr(layers, "compile_for", traced)
    config = AttentionConfig(type="local_sliding", window=128, kernel="dot_product", sinks=True)
    shape = dataclasses.replace(SHAPE, cache=cache, mask="segments", sharding=sharding)
    reports = aot.check_layers(config, shape, "cpu")
    served = [report for report in reports if report.resolution.plan is not None]
    assert {"train", "prefill"} <= {report.name for report in served}
    assert len(cut) >= 4 * len(served)  # query, key and value, and sinks or what a mask has for each row
    paged = [report for report in reports if report.resolution.request.page_size is not None]
    refused = [report for report in paged if "of paged keys cannot be cut" in report.verdict]
    assert len(refused) == len(paged)


def test_work_of_a_mesh_is_that_of_the_mean_device():
    whole = Work.of(dataclasses.replace(SMALL, sharding=None), CAUSAL)
    assert Work.of(SMALL, CAUSAL).flops * 8 == whole.flops
    assert Work.of(SMALL, CAUSAL).intensity == whole.intensity


def test_a_mesh_larger_than_the_target_is_an_error(monkeypatch):
    monkeypatch.setattr(compilation, "topology_of", lambda _: ("one", "two"))
    with pytest.raises(ConfigError, match=r"has 2 of the 4 devices that a mesh of \{'c': 4\} needs; name more"):
        aot.compile_for("gpu:h100:2", jnp.sin, jnp.ones(4), sharding="sequence=c:4 ring")


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kernelry", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        status = cli.main()
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def test_the_command_tells_a_mesh_in_80_columns(run):
    sizes = ("--q-len", 8192, "--batch", 8, "--heads", 32, "--kv-heads", 8)
    cut = "batch=d:4 heads=t:2 sequence=c:8 ring dual"
    status, out, _ = run("explain", "--target", "tpu:v5e", *sizes, "--sharding", cut)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    told = [line.strip() for line in out.splitlines()]
    assert "64 pairs of shards: 0 full, 64 partial, 0 skipped, 8 of 8 steps" in told
    assert "over one ICI link: 671 µs, hidden by 709 µs of compute" in told
    assert "striped 288, waits for 288 (1.00)" in told


def test_the_command_reads_the_sharding_of_a_config(run, tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("[attention]\nsharding = 'sequence=c:4 ring'\n")
    asked = ("explain", "--config", config, "--q-len", 256, "--json")
    assert json.loads(run(*asked)[1])["request"]["sharding"] == "sequence=c:4 ring"
    decode = run(*asked, "--mode", "decode", "--q-len", 1, "--kv-len", 256)[1]
    assert json.loads(decode)["request"]["sharding"] == "kv_sequence=c:4"
    assert json.loads(run(*asked, "--sharding", "batch=d:1")[1])["request"]["sharding"] is None
    assert json.loads(run(*asked, "--sharding", "")[1])["request"]["sharding"] is None


def test_the_command_tells_a_mesh_as_json(run):
    status, out, _ = run("explain", "--q-len", 256, "--sharding", "sequence=c:4 ring", "--json")
    found = json.loads(out)["shards"]
    assert (status, found["devices"], found["pairs"]) == (0, 4, {"full": 6, "partial": 4, "skipped": 6})


@pytest.mark.parametrize(
    ("sharding", "words"),
    [
        ("sequence=c:8 ring", "query length T=250 does not divide over c: 250 % 8 = 2; pad to 256.\n"),
        ("sequence=c ring", "the size of axis 'c' is not said; write e.g. c:8.\n"),
        ("sequense=c:2", "did you mean 'sequence'?\n"),
        ("sequence=c:2 rings", "did you mean 'ring'?\n"),
        ("batch=d:two", "'d:two' must be an axis and its size, e.g. data:4.\n"),
    ],
)
def test_the_command_says_what_is_wrong_with_a_sharding(run, sharding, words):
    status, out, error = run("explain", "--q-len", 250, "--sharding", sharding)
    assert (status, out) == (2, "")
    assert error.endswith(words)
    assert error.count("\n") == 1


def test_the_command_locks_and_checks_a_mesh(run, tmp_path):
    config, file = tmp_path / "c.toml", tmp_path / "kernelry.lock.json"
    config.write_text("[attention]\nkernel = 'dot_product'\n")
    cut = ("--sharding", "batch=d:2 sequence=c:4 ring")
    status, out, _ = run("lock", config, "--target", "cpu", "--q-len", 256, "--batch", 2, *cut, "-o", file)
    assert status == 0, out
    data = json.loads(file.read_text())
    assert {entry["request"]["sharding"] for entry in data["resolutions"]} == {
        "batch=d:2 sequence=c:4 ring",
        "batch=d:2 kv_sequence=c:4",
    }
    assert run("lock", config, "--check", "-o", file)[:2] == (0, "3 resolutions are unchanged.\n")
    status, _, error = run("lock", config, "--check", *cut, "-o", file)
    assert status == 2
    assert "--sharding" in error
    train = next(entry for entry in data["resolutions"] if entry["request"]["mode"] == "train")
    train["shards"][0] = "blockwise"
    file.write_text(json.dumps(data))
    status, out, _ = run("lock", config, "--check", "-o", file)
    assert status == 1
    assert "says dot_product, for other pairs of shards blockwise (by " in " ".join(out.split())
