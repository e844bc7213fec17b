"""What transformer-engine is asked beforehand, and what becomes of its answer."""

import importlib
import sys

import jax
import pytest
import transformer_engine_stand_in as stand_in

import kernelry
from kernelry import masks
from kernelry.kernel import spec as kernel_spec
from kernelry.kernel.spec import Environment, Knowledge
from kernelry.request.request import Request
from kernelry_cudnn_te.cudnn_te.availability import Asked, why_not_here

VERSION = ".".join(map(str, stand_in.version()))
SERVED = pytest.mark.te(served=True)


@pytest.fixture(autouse=True)
def _asked_anew():
    kernel_spec._answer.cache_clear()
    yield
    kernel_spec._answer.cache_clear()


@pytest.fixture
def at_home(monkeypatch):
    """As on a machine with the GPU that the requests name; each question is put anew."""
    monkeypatch.setattr(jax, "devices", lambda *_: [object()])
    return Environment(Knowledge.PROBED)


def _explained(environment, **facts):
    facts = {"target": "gpu:h100", "q_len": 128, "head_dim": 64, "dtype": "bfloat16", "mask": masks.Causal(), **facts}
    return str(kernelry.explain(Request(**facts), kernel="cudnn_te", environment=environment))


@SERVED
def test_it_serves_where_transformer_engine_says_so(at_home):
    with stand_in.answering() as asked:
        text = _explained(at_home, q_len=136)
    assert "→ cudnn_te" in text
    assert asked[-1]["attn_mask_type"].name == "NVTE_CAUSAL_MASK"
    assert asked[-1]["head_dim_qk"] == 64


@SERVED
def test_a_no_is_a_refusal_with_its_message(at_home):
    with stand_in.answering("head_dim is odd"):
        text = _explained(at_home, q_len=144)
    message = "head_dim is odd" if stand_in.version() >= (2, 20) else "no reason given"
    assert f"transformer-engine {VERSION} has no cuDNN kernel for this call: {message}" in text


@SERVED
@pytest.mark.parametrize("error", [RuntimeError("no driver"), OSError("libcuda.so.1")], ids=repr)
def test_an_error_is_a_refusal_too(at_home, error):
    with stand_in.answering(error):
        text = _explained(at_home, q_len=152 if isinstance(error, OSError) else 160)
    assert f"transformer-engine cannot say whether cuDNN has a kernel: {error}" in text


@SERVED
@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ({"mask": masks.SlidingWindow(5, 2)}, {"window_size_left": 5, "window_size_right": 2}),
        ({"value_dim": 48, "sinks": True}, {"head_dim_v": 48}),
        ({"q_heads": 8, "kv_heads": 2}, {"num_attn_heads": 8, "num_gqa_groups": 2}),
        ({"mode": "prefill"}, {"is_training": False}),
        ({"dropout_rate": 0.25}, {"dropout": 0.25}),
    ],
    ids=", ".join,
)
def test_what_is_asked_is_what_will_be_called(facts, wanted):
    request = Request(**{"target": "gpu:h100", "q_len": 64, "dtype": "float16", **facts})
    with stand_in.answering() as asked:
        assert Asked.of(request)() is None
    assert {name: asked[-1][name] for name in wanted} == wanted


@pytest.mark.te(since="2.20")
@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        (
            {"max_logits": True, "q_heads": 4, "kv_heads": 2},
            {"num_attn_heads": 12, "num_gqa_groups": 6, "batch_size": 1},
        ),
        ({"mask": masks.Segments([0] * 64)}, {"batch_size": 3 * 32}),
    ],
    ids=["max_logits", "packed"],
)
def test_rows_that_become_heads_or_segments_are_asked_about_as_such(facts, wanted):
    request = Request(target="gpu:h100", batch=3, q_len=64, dtype="float16", **facts)
    with stand_in.answering() as asked:
        assert Asked.of(request)() is None
    assert {name: asked[-1][name] for name in wanted} == wanted


def test_without_a_device_nothing_is_asked():
    with stand_in.answering() as asked:
        text = _explained(Environment(Knowledge.PROBED), q_len=168)
    assert not asked
    assert "JAX sees no CUDA device; pip install 'kernelry-cudnn-te[te]'" in text


class _Unloadable:
    """Finds the vendor's module and fails with an error."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, *_):
        if name == _VENDOR:
            raise self.error


_VENDOR = "kernelry_cudnn_te.cudnn_te._vendor"


@pytest.fixture
def without_vendor(monkeypatch):
    def fail(error):
        package = importlib.import_module("kernelry_cudnn_te.cudnn_te")
        monkeypatch.delitem(sys.modules, _VENDOR, raising=False)
        monkeypatch.delattr(package, "_vendor", raising=False)
        monkeypatch.setattr(sys, "meta_path", [_Unloadable(error), *sys.meta_path])

    return fail


def test_what_cannot_be_loaded_is_a_reason(at_home, without_vendor):
    without_vendor(OSError("libcuda.so.1: cannot open shared object file"))
    reason = why_not_here()
    assert "transformer-engine cannot be loaded (libcuda.so.1: cannot open shared object file)" in reason


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Found empty `transformer-engine` meta package installed."),
        AssertionError("Transformer Engine package version mismatch."),
        FileNotFoundError("Could not find shared object file for Transformer Engine jax lib."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_part_of_it_that_is_not_installed_is_a_reason(at_home, without_vendor, error):
    without_vendor(error)
    assert why_not_here() == f"transformer-engine cannot be imported: {error}"


@pytest.mark.te(since="2.12", before="2.14")
def test_the_broken_releases_are_refused_with_the_reason(at_home):
    text = _explained(at_home)
    assert f"transformer-engine {VERSION}: its from_segment_ids_and_pos needs is_thd" in text
