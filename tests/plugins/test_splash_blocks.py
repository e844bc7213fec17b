"""Which blocks splash and tokamax_splash take for a call: predicted by the TPU compiler's schedules, never measured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernelry
from kernelry import masks
from kernelry.errors import ConfigError
from kernelry.masks import BlockKind
from kernelry.plugin import Request, Tiling
from kernelry_tpu_splash.blocks import checked_sizes
from kernelry_tpu_splash.plugin import SPLASH, TOKAMAX_SPLASH
from kernelry_tpu_splash.predictions import predictions, visited

KINDS = ("v5e", "v5p", "v6e", "tpu7x")
HEADS = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (512, 512))
PASSES = {"splash": ("forward", "dkv", "dq", "fused"), "tokamax_splash": ("forward", "fused")}

_BANDS = st.one_of(
    st.just(masks.Full()),
    st.just(masks.Causal()),
    st.builds(masks.SlidingWindow, st.integers(0, 900), st.integers(0, 300)),
    st.builds(masks.Chunked, st.integers(1, 700)),
    st.builds(masks.BlockCausal, st.integers(1, 300)),
)
_BLOCKS = st.sampled_from((128, 256, 512))


def _request(kind="v5e", length=8192, mask=None, dims=(128, 128), dtype="bfloat16", **facts):
    widths = {"head_dim": dims[0], "value_dim": dims[1]}
    where = "cpu" if kind is None else f"tpu:{kind}"
    return Request(
        target=where, q_len=length, mask=masks.Causal() if mask is None else mask, dtype=dtype, **widths, **facts
    )


@settings(deadline=None)
@given(_BANDS, st.integers(-600, 600), st.integers(-600, 600), _BLOCKS, _BLOCKS)
def test_blocks_that_bands_and_chunks_leave_are_those_of_the_block_map(mask, first, kv_first, block_q, block_kv):
    placed = mask.at(query_offset=first, kv_offset=kv_first)
    seen = placed.block_map(1024, 1536, block_q, block_kv) != BlockKind.EMPTY
    found = visited(placed.form, (1024, 1536), block_q, block_kv)
    assert found == (seen.sum(), seen.sum(axis=1).max(), seen.sum(axis=0).max())


@settings(deadline=None)
@given(_BANDS, _BANDS, st.integers(-600, 600), _BLOCKS, _BLOCKS)
def test_no_block_of_a_conjunction_is_left_out(one, other, first, block_q, block_kv):
    mask = one & other.at(query_offset=first) & masks.Predicate(lambda query, kv: (query + kv) % 2 == 0)
    seen = mask.block_map(1024, 1024, block_q, block_kv) != BlockKind.EMPTY
    assert visited(mask.form, (1024, 1024), block_q, block_kv).blocks >= seen.sum()


def test_positions_that_are_not_one_after_another_hide_nothing():
    mask = masks.Causal().at(query_positions=np.arange(1024)[::-1], kv_positions=np.arange(1024))
    assert visited(mask.form, (1024, 1024), 256, 128) == (32, 8, 4)


@pytest.mark.parametrize("spec", [SPLASH, TOKAMAX_SPLASH], ids=lambda spec: spec.name)
def test_every_tiling_divides_the_lengths(spec):
    wrong = []
    for kind in (None, "v4", *KINDS):
        for dims in HEADS:
            for length in (128, 384, 640, 1152, 1408, 2048, 5120, 8192):
                for tiling in spec.tilings(_request(kind, length, dims=dims)):
                    sizes = {name: size for name, size in tiling.values if name.startswith("block")}
                    wholes = {"block_kv_compute": "block_kv", "block_kv_dkv_compute": "block_kv_dkv"}
                    fine = all(size % 128 == 0 and length % size == 0 for size in sizes.values())
                    if not fine or any(sizes[whole] % sizes[part] for part, whole in wholes.items()):
                        wrong.append((kind, dims, length, tiling))
    assert not wrong


@pytest.mark.parametrize("kernel", PASSES)
def test_the_default_is_predicted_no_slower_than_blocks_of_512(kernel):
    """The default of every release before the predictions."""
    wrong = []
    several = (masks.Full(), masks.Causal(), *(masks.SlidingWindow(width) for width in (127, 1023, 4095)))
    for kind in KINDS:
        for length in (512, 1024, 2048, 8192, 131072):
            for mask in several:
                for part in PASSES[kernel]:
                    found = predictions(kernel, part, _request(kind, length, mask))
                    old = [prediction.cycles for prediction in found if max(prediction.blocks) <= 512]
                    if found and not found[0].cycles <= min(old):
                        wrong.append((kind, length, mask, part))
    assert not wrong


def test_narrow_windows_and_short_sequences_take_small_blocks():
    """A block of 1024 would compute twice what the window leaves."""
    for kind in KINDS:
        assert SPLASH.tilings(_request(kind, mask=masks.SlidingWindow(255)))[0]["block_q"] == 512
        assert SPLASH.tilings(_request(kind))[0]["block_q"] == 1024


def test_where_no_schedule_is_known_blocks_are_of_512():
    unknown = (
        _request(None),
        _request("v4"),
        _request(dims=(512, 512)),
        _request(dims=(256, 256), dtype="float32"),
        _request(dtype="float16"),
    )
    for spec in (SPLASH, TOKAMAX_SPLASH):
        for request in unknown:
            default = spec.tilings(request)[0]
            assert {size for name, size in default.values if name.startswith("block")} == {512}
            assert default.source == ""


def test_parts_of_dq_take_no_more_than_four_times_its_memory_by_default():
    for kind in KINDS:
        for length in (1024, 2048, 4096, 8192, 32768):
            default = SPLASH.tilings(_request(kind, length))[0]
            assert default["backward_kernels"] == 2 or length // default["block_kv_dkv"] <= 4


def test_the_search_space_has_both_kinds_of_backward_pass():
    found = SPLASH.tilings(_request(length=4096))
    assert {tiling["backward_kernels"] for tiling in found} == {1, 2}
    assert len(set(found)) == len(found)


def test_a_default_tiling_says_who_predicted_it():
    explained = kernelry.explain(_request(), kernel="splash")
    assert "(predicted by libtpu " in str(explained)
    assert explained.to_json()["plan"]["tiling_source"].endswith(", not measured")
    with kernelry.use(tiling={"block_q": 256}):
        own = kernelry.explain(_request(), kernel="splash")
    assert own.plan.tiling.source == ""
    assert "predicted" not in str(own)


def test_a_source_does_not_tell_tilings_apart():
    tiling = SPLASH.tilings(_request())[0]
    assert tiling.source
    assert tiling == tiling.replace({"block_q": tiling["block_q"]}, "splash")
    assert hash(tiling) == hash(tiling.replace({"block_q": tiling["block_q"]}, "splash"))


def test_keys_multiplied_at_once_are_at_most_those_of_the_block():
    """So that one who sets `block_kv` alone need not know how the default is cut."""
    values = {
        "block_q": 128,
        "block_kv": 128,
        "block_kv_compute": 512,
        "block_kv_dkv": 384,
        "block_kv_dkv_compute": 256,
    }
    with pytest.raises(ConfigError, match="block_kv_dkv_compute=256 of splash is not a multiple of 128 that divides"):
        checked_sizes("splash", Tiling.of(**values), (768, 768))
    sizes = checked_sizes("splash", Tiling.of(**values | {"block_kv_dkv_compute": 512}), (768, 768))
    assert (sizes["block_kv_compute"], sizes["block_kv_dkv_compute"]) == (128, 384)
