"""The table of peers: its floor, its targets, and what one table holds."""

import against_peers
import pytest
from against_peers import FLOOR, TARGETS, Case

from kernelry import masks
from kernelry.bench.turns import Program


def case(length, name="causal"):
    return Case(name, length, masks.Causal(), length * (length + 1) // 2)


def test_the_floor_is_the_time_of_the_visible_products_and_exponentials():
    visible = 8 * 4 * 5 // 2  # heads, pairs of 4 tokens
    product, exponentials = Program("p", lambda: None, times=[2.0, 4.0]), Program("e", lambda: None, times=[1.0, 1.0])
    wanted = [visible * (2 * 2 * 64 * time / (2 * 2048**3) + 1 / (200 * 256 * 512)) for time in (2.0, 4.0)]
    assert against_peers.floors(case(4), "forward", product, exponentials) == pytest.approx(wanted)


def test_targets_are_for_causal_shapes_of_their_lengths():
    assert case(2048).target("torch", "forward") == 1.15
    assert case(128).target("torch", "forward") is None
    assert case(2048, "window 128").target("torch", "forward") is None
    assert case(4096).target(FLOOR, "forward+backward") == 0.8


def test_no_shape_has_two_targets_of_a_kind():
    kinds = [(target.peer, target.which, length) for target in TARGETS for length in target.lengths]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(("names", "count"), [(["causal"], 2), (["causal", "window", "packed"], 6), (["packed"], 2)])
def test_parts_of_the_table_can_be_asked_for(names, count):
    assert len(list(against_peers.cases(names, [64, 128]))) == count


@pytest.mark.sweep
@pytest.mark.parametrize("which", against_peers.PRODUCTS)
def test_a_table_has_a_verdict_for_each_target(which, capsys):
    found = against_peers.measure(case(128), which, repeats=2)
    assert {"auto", "blockwise", "dot_product", "jax.nn"} <= found["programs"].keys()
    [verdict] = [target for target in found["targets"] if target["peer"] == "jax.nn"]
    assert verdict["reached"] is (verdict["ratio"] >= 1.1)
    assert found["programs"]["jax.nn"]["over_auto"][1] == pytest.approx(verdict["ratio"], rel=1e-3)
    assert ("MISSES 1.1" in capsys.readouterr().out) is not verdict["reached"]
