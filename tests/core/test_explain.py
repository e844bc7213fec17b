"""Explanations: winner, adapters, losers, rule, and the nearest change that would alter the choice."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import kernelry
from kernelry import masks
from kernelry.config import load_config
from kernelry.policy.measurements import Entry, Measurements
from kernelry.policy.policy import Policy
from kernelry.request.request import Request
from kernelry.resolution.nearest_change import nearest_changes

DOCS = (Path(__file__).parents[2] / "docs" / "explanations.md").read_text(encoding="utf-8")
LEAST = next(t.value for t in Policy.shipped().thresholds if t.name == "cpu_blockwise_min_train_kv_len")
WINDOW = Request(q_len=LEAST // 2, mask=masks.SlidingWindow(15))
ADAPTED = Request(
    target="tpu:v5e",
    q_len=200,
    q_heads=8,
    kv_heads=2,
    head_dim=80,
    mask=masks.Causal() & masks.Segments([0] * 200) & masks.Lengths([180]),
    sinks=True,
    dtype="float16",
)


def change_to(kernel, resolution):
    return next(change for change in resolution.changes if change.kernel == kernel)


def test_a_longer_sequence_is_named_with_its_exact_boundary():
    change = change_to("blockwise", kernelry.explain(WINDOW))
    assert str(change) == f"blockwise with q_len and kv_len ≥ {LEAST}"
    assert kernelry.resolve(dataclasses.replace(WINDOW, q_len=LEAST, kv_len=LEAST)).kernel == "blockwise"
    assert kernelry.resolve(dataclasses.replace(WINDOW, q_len=LEAST - 1, kv_len=LEAST - 1)).kernel == "dot_product"


def test_a_threshold_of_the_config_moves_the_boundary():
    policy = load_config({"thresholds": {"cpu_blockwise_min_train_kv_len": 700}}).policy
    assert "≥ 700" in str(change_to("blockwise", kernelry.explain(WINDOW, policy=policy)))


def test_a_length_that_only_multiples_reach_is_not_called_a_boundary():
    policy = load_config({"forbid_adapters": ["pad_sequence"]}).policy
    request = Request(target="tpu:v5e", q_len=100, dtype="bfloat16", mask=masks.Causal())
    assert str(change_to("splash", kernelry.explain(request, policy=policy))) == "splash with q_len and kv_len = 128"


def test_a_range_between_powers_of_two_is_found():
    rule = {"when": {"q_len": ">=600", "kv_len": "<=900"}, "use": ["blockwise"]}
    policy = load_config({"rules": [rule, {"use": ["dot_product"]}]}).policy
    request = Request(q_len=256, mask=masks.Causal())
    assert (
        str(change_to("blockwise", kernelry.explain(request, policy=policy))) == "blockwise with q_len and kv_len = 600"
    )


def test_a_shorter_sequence_is_named_too():
    request = Request(target="tpu:v5e", q_len=4096, dtype="bfloat16", mask=masks.Causal())
    assert str(change_to("dot_product", kernelry.explain(request))) == "dot_product with q_len and kv_len ≤ 127"


def test_an_option_left_out_is_a_change():
    request = Request(target="gpu:h100", q_len=1024, dtype="bfloat16", mask=masks.Causal(), soft_cap=30.0)
    assert str(change_to("cudnn_jax", kernelry.explain(request))) == "cudnn_jax with no soft_cap"


@pytest.mark.parametrize(("field", "value"), [("kv_quantization", "int8"), ("page_size", 16)])
def test_plain_keys_are_a_change(field, value):
    request = Request(q_len=1, kv_len=64, mode="decode", **{field: value})
    [change] = nearest_changes(request, "ragged", lambda asked: "ragged" if getattr(asked, field) else "plain")
    assert (str(change), change.fields) == (f"plain with no {field}", (field,))


def test_an_atom_left_out_is_a_change():
    request = Request(target="gpu:h100", q_len=1024, dtype="bfloat16", mask=masks.Causal() & masks.Segments([0] * 1024))
    assert str(change_to("cudnn_jax", kernelry.explain(request))) == "cudnn_jax with mask=causal"


@pytest.mark.parametrize("target", ["cpu", "gpu:h100", "gpu:a100", "tpu:v5e"])
@pytest.mark.parametrize("options", [{}, {"soft_cap": 30.0}, {"sinks": True}, {"kv_len": 8192, "mode": "decode"}])
def test_every_length_named_leads_to_the_kernel_named(target, options):
    request = Request(**{"target": target, "q_len": 300, "dtype": "bfloat16", **options})
    resolution = kernelry.explain(request)
    for change in resolution.changes:
        assert change.kernel != resolution.kernel
        if change.fields[0].endswith("_len"):
            changed = dataclasses.replace(request, **dict.fromkeys(change.fields, int(change.example)))
            assert kernelry.explain(changed).kernel == change.kernel


def test_positions_that_belong_to_a_length_keep_it():
    request = Request(q_len=4, mask=masks.SlidingWindow(1).at(query_positions=[0, 2, 1, 3]))
    assert not any(change.fields[0].endswith("_len") for change in kernelry.explain(request).changes)


def test_resolve_leaves_changes_out():
    assert kernelry.resolve(WINDOW).changes == ()


def test_the_text_names_adapters_costs_losers_and_changes():
    text = str(kernelry.explain(ADAPTED))
    for step in kernelry.resolve(ADAPTED).plan.steps:
        assert f"through {step.adapter.name} (+" in text
    assert "adapters together: +" in text
    assert "pallas_mha: platform=tpu is not gpu" in text
    assert "would be dot_product with" in text


def test_the_rule_of_a_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "model.toml"
    path.write_text('[attention]\n\n[[attention.rules]]\nwhen = { q_len = ">=16" }\nuse = ["blockwise"]\n')
    resolution = kernelry.explain(WINDOW, policy=load_config(path).policy)
    assert f"{path}:3: rule 1" in str(resolution)
    assert resolution.kernel == "blockwise"


def test_json_survives_a_round_trip_and_states_its_schema():
    data = kernelry.explain(ADAPTED).to_json()
    assert json.loads(json.dumps(data)) == data
    assert data["schema"] == 1
    assert Request.from_json(data["request"]) == ADAPTED


OPEN = {
    f"shards.{name}" for name in ("sharding.sizes", "classes.request", "classes.plan", "backward", "links", "orders")
}
OPEN |= {"shards.forward.transfers", "shards.forward.seconds"}
"""What the documentation describes in one row."""


def _keys(data, prefix=""):
    for name, value in data.items():
        yield prefix + name
        if prefix + name in ("request", "plan.tiling", *OPEN):
            continue
        inside = value[0] if isinstance(value, list) and value else value
        if isinstance(inside, dict) and name != "pad_to":
            yield from _keys(inside, f"{prefix}{name}.")


def test_the_documentation_names_every_key():
    refused = kernelry.explain(dataclasses.replace(ADAPTED, target="gpu:h100")).to_json()
    served = kernelry.explain(ADAPTED).to_json()
    cut = kernelry.explain(dataclasses.replace(ADAPTED, sharding="heads=t:2 sequence=c:2 ring")).to_json()
    found = {*_keys(served), *_keys({**refused, "plan": {}}), *_keys(cut)} - {"shards.backward"}
    documented = set(re.findall(r"^\| `([a-z_.]+)`(?: \||,)", DOCS, re.MULTILINE))
    assert found == documented


def times(*kernels, **more):
    """Measurements of `REFUSED` for kernels, 1 ms for the first, 2 ms for the next."""
    return Measurements(tuple(Entry.of(REFUSED, name, 1e-3 * at, **more) for at, name in enumerate(kernels, 1)))


REFUSED = Request(q_len=512, q_heads=4)
"""A request that splash, which needs a TPU, refuses."""


def test_times_decide_only_where_the_winner_has_one():
    without = kernelry.explain(REFUSED)
    found = kernelry.explain(REFUSED, measurements=times("splash"))
    assert (found.kernel, found.rule) == (without.kernel, without.rule)
    assert found.decided_by in Policy.shipped().defaults
    assert "measured on cpu" not in next(line for line in str(found).splitlines() if "decided by" in line)
    both = kernelry.explain(REFUSED, measurements=times("splash", "blockwise"))
    assert (both.kernel, both.rule) == ("blockwise", "measured on cpu: splash 1 ms, blockwise 2 ms")


def test_where_no_kernel_serves_times_decided_nothing():
    splash = tuple(kernel.spec for kernel in kernelry.kernels() if kernel.name == "splash")
    found = kernelry.explain(REFUSED, kernels=splash, measurements=times("splash"))
    assert (found.kernel, found.rule) == (None, kernelry.explain(REFUSED, kernels=splash).rule)
