"""Times of kernels: which requests one is about, which of two is kept, and what they decide."""

import dataclasses
import itertools
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

import kernelry
from kernelry import Request, masks
from kernelry.errors import ConfigError, KernelRefusedError
from kernelry.masks import MaskForm
from kernelry.policy.lock import Lock
from kernelry.policy.measurements import Bucket, Entry, Kind, Measurements, merged
from kernelry.policy.policy import Policy, Switches
from kernelry.policy.rules import Condition, Rule
from kernelry.registry import installed
from kernelry_dot_product.plugin import BLOCKWISE, DOT_PRODUCT

REQUEST = Request(q_len=512, q_heads=4)
SHIPPED = Policy.shipped(switches=Switches())
OURS = "kernelry-dot-product"
VERSION = installed.registry().kernels["dot_product"].distribution.split(" ")[1]


def spec(name, **changed):
    """The kernel dot_product under another name."""
    return dataclasses.replace(DOT_PRODUCT, name=name, **changed)


def timed(*seconds, request=REQUEST, **more):
    """Measurements of (kernel, seconds) pairs."""
    return Measurements(tuple(Entry.of(request, name, time, **more) for name, time in seconds))


def resolve(measurements, request=REQUEST, **more):
    return kernelry.resolve(request, measurements=measurements, policy=more.pop("policy", SHIPPED), **more)


# Buckets


def bucket(**facts):
    return Bucket.of(Request(**{"q_len": 512, **facts}))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"q_len": 512}, {"q_len": 600}),
        ({"q_len": 512}, {"q_len": 363}),
        ({"q_heads": 4}, {"batch": 4}),
        ({"q_heads": 4, "batch": 2}, {"q_heads": 9}),
        ({"mask": masks.SlidingWindow(511)}, {"mask": masks.SlidingWindow(512)}),
        ({"mask": masks.Chunked(128)}, {"mask": masks.Chunked(150)}),
        ({"scale": 0.5}, {"scale": 0.25}),
        ({"soft_cap": 30.0}, {"soft_cap": 50.0}),
        ({"dropout_rate": 0.1}, {"dropout_rate": 0.2}),
        ({"target": "tpu:v5e"}, {"target": "tpu:v5e:2x2"}),
        ({"mask": masks.Causal().at(query_offset=500)}, {"mask": masks.Causal().at(query_offset=540)}),
        ({"mask": masks.Causal() & masks.Lengths(3)}, {"mask": masks.Causal() & masks.Lengths([3])}),
    ],
)
def test_requests_of_one_bucket_share_their_times(one, other):
    assert bucket(**one) == bucket(**other)


@pytest.mark.parametrize(
    "facts",
    [
        {"q_len": 1024},
        {"kv_len": 4096, "mask": masks.Causal().at(query_offset=3584)},
        {"q_heads": 8},
        {"q_heads": 8, "kv_heads": 2},
        {"head_dim": 128},
        {"value_dim": 32},
        {"dtype": "bfloat16"},
        {"logits_dtype": "bfloat16", "dtype": "bfloat16"},
        {"mode": "prefill"},
        {"gradients": ("query",)},
        {"mask": masks.Causal()},
        {"mask": masks.SlidingWindow(511)},
        {"mask": masks.SlidingWindow(63)},
        {"mask": masks.SlidingWindow(63, 63)},
        {"mask": masks.Causal() | masks.SlidingWindow(1, 1)},
        {"mask": ~masks.Chunked(8)},
        {"bias": (1, 1, 512, 512)},
        {"bias": (1, 1, 512, 512), "soft_cap": 5.0},
        {"bias": (1, 1, 512, 512), "soft_cap": 5.0, "bias_after_cap": True},
        {"sinks": True},
        {"partial": True},
        {"max_logits": True},
        {"interpret": True},
        {"mode": "decode", "page_size": 16},
        {"mode": "decode", "kv_quantization": "int8"},
    ],
)
def test_what_changes_the_work_changes_the_bucket(facts):
    assert bucket(**facts) != bucket(**({"mode": "decode"} if facts.get("mode") == "decode" else {}))


def test_which_dimensions_of_a_bias_are_broadcast_is_told_apart():
    shapes = list(itertools.product((1, 2), (1, 4), (1, 512), (1, 512)))
    found = {bucket(batch=2, q_heads=4, bias=shape) for shape in shapes}
    assert len(found) == len(shapes)
    assert dict(bucket(bias=(1, 1, 1, 512)).facts)["bias"] == "111S"
    assert bucket(bias=(1, 1, 1, 512)) == bucket(q_len=500, bias=(1, 1, 1, 500))


def test_a_static_offset_of_zero_is_the_default():
    assert bucket(mask=masks.Causal().at(query_offset=0)) == bucket(mask=masks.Causal())


@given(st.integers(1, 2**20), st.integers(1, 2**20))
def test_a_length_is_rounded_to_the_nearest_power_of_two(one, other):
    rounded = int(dict(bucket(q_len=one).facts)["T"])
    assert rounded & (rounded - 1) == 0
    assert rounded / 2**0.5 <= one <= rounded * 2**0.5
    if one <= other:
        assert rounded <= int(dict(bucket(q_len=other).facts)["T"])


def test_a_symbolic_size_has_no_bucket_and_takes_no_times():
    symbolic = Request(q_len=512, batch="b", q_heads=4)
    assert Bucket.of(symbolic) is None
    assert resolve(timed(("blockwise", 1e-3)), symbolic).kernel == "dot_product"


def _even(query, kv):
    return (query - kv) % 2 == 0


def test_a_predicate_is_known_by_its_name_and_without_one_it_has_no_bucket():
    named = masks.Causal() & masks.Predicate(_even)
    assert dict(bucket(mask=named).facts)["mask"] == f"causal & predicate({__name__}:_even)"
    for nameless in (masks.Predicate(lambda q, k: q >= k), masks.Predicate(lambda q, k: q == k)):
        for mask in (nameless, ~nameless, masks.Chunked(8) | (named & ~nameless)):
            assert bucket(mask=mask) is None
    measurements = timed(("blockwise", 1e-3))
    asked = Request(q_len=512, mask=masks.Predicate(lambda q, k: q >= k))
    assert resolve(measurements, asked).rule.startswith("shipped")


def test_every_field_of_a_request_is_in_the_bucket_or_left_out_on_purpose():
    rounded = {"batch", "q_len", "kv_len", "q_heads", "kv_heads", "head_dim", "value_dim", "mode", "dtype", "mask"}
    left_out = {"target", "scale"}  # the device is apart
    told = {field.name for field in dataclasses.fields(Request) if field.init} - rounded - left_out - {"gradients"}
    unusual = {
        "bias": (1, 1, 8, 8), "soft_cap": 5.0, "bias_after_cap": True, "sinks": True, "dropout_rate": 0.5,
        "normalization": "softmax1", "logits_dtype": "float64", "precision": "highest", "partial": True,
        "max_logits": True, "interpret": True, "kv_quantization": "int8:head_dim", "page_size": 4,
        "context_parallel": "ring:c:2", "statistics": True, "sharding": "batch=d:2", "partitioned": True,
        "kv_layout": "value_in_key",
    }  # fmt: skip
    assert told == set(unusual)
    plain = Request(q_len=8, mode="prefill")
    for name in told - {"bias_after_cap"}:  # which means nothing alone
        asked = dataclasses.replace(plain)
        object.__setattr__(asked, name, unusual[name])
        assert Bucket.of(asked) != Bucket.of(plain), name


# Entries


VERSIONS = st.lists(st.tuples(st.sampled_from(["jax", "libtpu", "k"]), st.sampled_from("12")), unique_by=lambda p: p[0])
ENTRIES = st.builds(
    lambda q_len, kernel, seconds, **more: Entry.of(Request(q_len=q_len), kernel, seconds, **more),
    st.sampled_from([8, 9]),
    st.sampled_from("ab"),
    st.none() | st.sampled_from([1e-3, 2e-3]),
    kind=st.sampled_from(Kind),
    tiling=st.sampled_from([(), (("block_q", 8),)]),
    versions=VERSIONS.map(lambda pairs: tuple(sorted(pairs))),
    time=st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]),
    failure=st.sampled_from(["", "no"]),
)
FILES = st.lists(ENTRIES, max_size=8)


@given(FILES, FILES, FILES)
def test_merging_is_associative_commutative_and_idempotent(a, b, c):
    assert merged(merged(a, b), c) == merged(a, merged(b, c)) == merged(a, b, c)
    assert merged(a, b) == merged(b, a)
    assert merged(a, a) == merged(merged(a)) == merged(a)


@given(FILES)
def test_merging_keeps_one_of_each_key_and_nothing_else(entries):
    kept = merged(entries)
    assert {entry.key for entry in kept} == {entry.key for entry in entries}
    assert len({entry.key for entry in kept}) == len(kept)
    assert set(kept) <= set(entries)


def test_a_measurement_is_kept_before_a_newer_prediction_and_a_newer_one_before_an_older():
    old, new = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    measured = Entry.of(REQUEST, "a", 3e-3, time=old)
    predicted = Entry.of(REQUEST, "a", 1e-3, kind=Kind.PREDICTED, time=new)
    assert merged([measured], [predicted]) == (measured,)
    again = dataclasses.replace(measured, seconds=4e-3, time=new)
    assert merged([again], [measured]) == (again,)


@given(ENTRIES)
def test_an_entry_survives_json(entry):
    assert Entry.from_json(json.loads(json.dumps(entry.to_json()))) == entry


def test_what_a_later_version_adds_to_an_entry_is_ignored():
    entry = Entry.of(REQUEST, "a", 1e-3)
    assert Entry.from_json({**entry.to_json(), "watts": 300}) == entry


# What they decide


def test_the_fastest_kernel_that_was_timed_is_chosen_with_its_fastest_tiling():
    entries = (
        Entry.of(REQUEST, "dot_product", 2e-3),
        Entry.of(REQUEST, "blockwise", 3e-3, tiling=(("block_kv", 512), ("block_q", 512))),
        Entry.of(REQUEST, "blockwise", 1e-3, tiling=(("block_kv", 64), ("block_q", 64))),
    )
    resolution = resolve(Measurements(entries))
    assert (resolution.kernel, str(resolution.plan.tiling)) == ("blockwise", "block_kv=64, block_q=64")
    assert resolution.rule == "measured on cpu: blockwise 1 ms, dot_product 2 ms"
    text = str(resolution)
    assert "measured 1 ms with block_kv=64, block_q=64" in text
    assert "measured 2 ms" in text
    assert resolve(None).kernel == "dot_product"


def test_what_was_predicted_ranks_below_what_was_measured_and_above_the_rest():
    entries = (
        *timed(("b", 5e-3)).entries,
        *timed(("c", 1e-3), ("b", 2e-3), kind=Kind.PREDICTED).entries,
    )
    resolution = resolve(Measurements(entries), kernels=(spec("a"), spec("b"), spec("c")))
    assert [candidate.name for candidate in resolution.candidates] == ["b", "c", "a"]
    assert resolution.rule == "measured on cpu: b 5 ms; predicted for cpu, static, not measured: c 1 ms"
    [note] = [note for candidate in resolution.candidates if candidate.name == "c" for note in candidate.notes]
    assert note == "predicted 1 ms, static, not measured"


def test_a_kernel_without_a_time_comes_after_those_that_have_one():
    resolution = resolve(timed(("c", 9.0)), kernels=(spec("a"), spec("dot_product"), spec("c")))
    assert [candidate.name for candidate in resolution.candidates] == ["c", "dot_product", "a"]


def test_a_kernel_that_was_timed_and_refuses_is_skipped():
    half = dataclasses.replace(DOT_PRODUCT.capabilities, dtypes=frozenset({"bfloat16"}))
    narrow = spec("narrow", capabilities=half)
    resolution = resolve(timed(("narrow", 1e-3), ("b", 2e-3)), kernels=(narrow, spec("a"), spec("b")))
    assert resolution.kernel == "b"


def test_a_rule_a_scope_the_environment_and_a_name_take_precedence_over_times():
    times = timed(("b", 1e-3))
    kernels = (spec("a"), spec("b"))
    ruled = Policy.shipped(rules=[Rule(Condition(), ("a", "auto"))], switches=Switches())
    assert resolve(times, kernels=kernels, policy=ruled).kernel == "a"
    assert resolve(times, kernels=kernels, policy=Policy.shipped(switches=Switches(kernel="a"))).kernel == "a"
    assert resolve(times, kernels=kernels, kernel="a").kernel == "a"
    with kernelry.use("a"):
        assert resolve(times, kernels=kernels).kernel == "a"
    assert resolve(times, kernels=kernels).kernel == "b"


def test_a_kernel_that_is_named_gets_its_fastest_tiling_and_a_users_tiling_takes_precedence():
    times = timed(("blockwise", 1e-3), tiling=(("block_kv", 64), ("block_q", 64)))
    assert str(resolve(times, kernel="blockwise").plan.tiling) == "block_kv=64, block_q=64"
    with kernelry.use(tiling={"block_q": 32}):
        assert str(resolve(times).plan.tiling) == "block_kv=64, block_q=32"
    own = dataclasses.replace(SHIPPED, tilings=(("blockwise", (("block_kv", 128),)),))
    assert str(resolve(times, policy=own).plan.tiling) == "block_kv=128, block_q=64"


def test_of_tilings_that_take_as_long_the_kernels_first_is_chosen():
    first, second, third = BLOCKWISE.tilings(REQUEST)[:3]
    for seconds in itertools.permutations((1e-3, 1e-3, 2e-3)):
        times = dict(zip((first, second, third), seconds, strict=True))
        entries = [Entry.of(REQUEST, "blockwise", time, tiling=each.values) for each, time in times.items()]
        wanted = next(tiling for tiling, time in times.items() if time == 1e-3)
        assert resolve(Measurements(tuple(entries))).plan.tiling == wanted
        assert resolve(Measurements(tuple(reversed(entries)))).plan.tiling == wanted


def test_a_tiling_that_the_kernel_does_not_offer_for_the_request_is_not_used():
    fits, does_not = BLOCKWISE.tilings(REQUEST)[1], (("block_kv", 3), ("block_q", 3))
    entries = (
        Entry.of(REQUEST, "blockwise", 1e-3, tiling=does_not),
        Entry.of(REQUEST, "blockwise", 2e-3, tiling=fits.values),
    )
    assert resolve(Measurements(entries)).plan.tiling == fits
    alone = resolve(Measurements(entries[:1]))
    assert (alone.kernel, alone.plan.tiling) == ("blockwise", BLOCKWISE.tilings(REQUEST)[0])


def test_times_of_another_device_decide_nothing():
    elsewhere = dataclasses.replace(REQUEST, target="tpu:v5e")
    assert resolve(timed(("blockwise", 1e-3), request=elsewhere)).kernel == "dot_product"
    found = kernelry.explain(elsewhere, measurements=timed(("blockwise", 1e-3), request=elsewhere), policy=SHIPPED)
    assert (found.kernel, found.rule) == ("blockwise", "measured on tpu:v5e: blockwise 1 ms")


@pytest.mark.parametrize("name", ["jax", OURS])
def test_times_of_other_versions_are_not_used_and_explain_says_so(name):
    then = {"jax": "0.10.2", OURS: VERSION} | {name: "0.0.1"}
    now = (("jax", "0.10.2"),)
    entry = Entry.of(REQUEST, "blockwise", 1e-3, versions=tuple(then.items()))
    resolution = resolve(Measurements((entry,), now))
    assert resolution.kernel == "dot_product"
    this = VERSION if name == OURS else "0.10.2"
    note = f"measured with {name} 0.0.1, this is {this}: not used; run kernelry tune"
    assert note in str(resolution)
    same = dataclasses.replace(entry, versions=tuple({**then, name: this}.items()))
    assert resolve(Measurements((entry, same), now)).kernel == "blockwise"


def test_a_compiler_that_is_not_installed_here_is_taken_as_it_was():
    entry = Entry.of(REQUEST, "blockwise", 1e-3, versions=((OURS, VERSION), ("libtpu", "0.0.42")))
    assert resolve(Measurements((entry,), (("jax", "1"),))).kernel == "blockwise"


def test_the_kernel_of_another_distribution_does_not_take_the_times_of_its_namesake():
    entry = Entry.of(REQUEST, "b", 1e-3, versions=((OURS, VERSION),))
    resolution = resolve(Measurements((entry,)), kernels=(spec("a"), spec("b")))
    assert resolution.kernel == "a"
    assert "measured with a kernel of this name from elsewhere: not used" in str(resolution)


def test_times_of_two_requests_are_not_compared():
    near = dataclasses.replace(REQUEST, q_len=500, kv_len=500)
    entries = (*timed(("b", 1e-3), request=near).entries, *timed(("b", 3e-3), ("c", 2e-3)).entries)
    kernels = (spec("a"), spec("b"), spec("c"))
    assert resolve(Measurements(entries), kernels=kernels).kernel == "c"
    assert resolve(Measurements(entries), near, kernels=kernels).kernel == "b"
    between = dataclasses.replace(REQUEST, q_len=505, kv_len=505)
    found = resolve(Measurements(entries), between, kernels=kernels)
    assert found.kernel == "c", "the request of which most kernels were timed"
    assert "measured 2 ms, timed with B=1 T=512 S=512 N=4" in str(found)


def test_a_failure_is_not_a_time():
    failed = Entry.of(REQUEST, "blockwise", None, failure="out of memory")
    assert resolve(Measurements((failed,))).kernel == "dot_product"


PADDED = Request(target="gpu:h100", mode="prefill", q_len=1, kv_len=2048, head_dim=128, dtype="bfloat16")


def test_a_prediction_leaves_out_adapters_so_that_their_work_still_counts():
    padding = tuple(kernel.spec for kernel in kernelry.kernels() if kernel.name in ("pallas_mha", "dot_product"))
    entry = Entry.of(PADDED, "pallas_mha", 1e-6)
    predicted = dataclasses.replace(entry, kind=Kind.PREDICTED)
    first, second = (
        kernelry.explain(PADDED, kernels=padding, measurements=Measurements((each,)), policy=SHIPPED)
        for each in (entry, predicted)
    )
    assert (first.kernel, first.rule) == ("pallas_mha", "measured on gpu:h100: pallas_mha 0.001 ms")
    assert (second.kernel, second.decided_by in SHIPPED.defaults) == ("dot_product", True)


def test_a_refusal_of_the_named_kernel_stays_a_refusal():
    with pytest.raises(KernelRefusedError):
        resolve(timed(("ragged", 1e-3)), kernel="ragged")


def test_a_device_of_a_mesh_takes_the_times_of_its_part_of_the_call():
    times = timed(("blockwise", 1e-3), request=dataclasses.replace(REQUEST, batch=2))
    sharded = dataclasses.replace(REQUEST, batch=4, sharding="batch=d:2")
    found = kernelry.explain(sharded, measurements=times, policy=SHIPPED, changes=False)
    assert (found.kernel, found.rule) == ("blockwise", "measured on cpu: blockwise 1 ms")
    assert kernelry.explain(sharded, policy=SHIPPED, changes=False).kernel == "dot_product"


# Locks


def test_a_lock_notices_that_the_times_have_changed(tmp_path):
    file = tmp_path / "times.lock.json"
    faster = timed(("blockwise", 1e-3), ("dot_product", 2e-3))
    Lock.of([resolve(faster)]).write(file)
    with kernelry.use(strict=file):
        resolve(timed(("blockwise", 1e-4)))  # other times, and the same decision
        with pytest.raises(ConfigError, match=r"says blockwise.*now it would get dot_product"):
            resolve(timed(("blockwise", 3e-3), ("dot_product", 2e-3)))
        with pytest.raises(ConfigError, match=r"says blockwise with .*now it would get dot_product"):
            resolve(Measurements())
        tiled = timed(("blockwise", 1e-3), tiling=(("block_kv", 64), ("block_q", 64)))
        with pytest.raises(ConfigError, match=r"block_kv=64, block_q=64 .by measured on cpu: blockwise 1 ms"):
            resolve(tiled)


def test_the_neutral_mask_is_called_full():
    assert Bucket.of(Request(q_len=8, mask=MaskForm())).facts == Bucket.of(Request(q_len=8)).facts
