"""GPUs as they are described to their compilers, and what is said where those are not installed."""

import importlib.util
import re
import types

import pytest
from jax.experimental import topologies

from kernelry import Target, aot
from kernelry.aot.compilation import CompileFailure, asked_of_device, left_to_device
from kernelry.aot.devices import GPUS, SLICES, check_assembler
from kernelry.errors import ConfigError
from kernelry.resolution.published import DEVICE_RATES

MESSAGE = re.compile(r"(?:\s*\w+ *(?:: *(?:\"[^\"]*\"|[\w.]+)|\{[^{}]*\}))*\s*")
"""The text of a protocol buffer without nested messages."""


def described(kind):
    return GPUS[kind].description(DEVICE_RATES[kind].bandwidth)


def program(text):
    return types.SimpleNamespace(as_text=lambda: text)


@pytest.mark.parametrize("kind", GPUS)
def test_descriptions_are_text_of_a_protocol_buffer(kind):
    flat = re.sub(r"\{[^{}]*\}", "{}", described(kind))
    assert MESSAGE.fullmatch(re.sub(r"\{[^{}]*\{\}[^{}]*\}", "{}", flat))


def test_a_description_says_what_the_device_has():
    facts = dict(re.findall(r"(\w+): ([^ \n]+)", described("h100")))
    assert facts["core_count"] == "132"
    assert facts["shared_memory_per_block_optin"] == "232448"
    assert facts["device_memory_size"] == "84942979072"
    assert facts["memory_bandwidth"] == "3352320000000"
    assert "cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }" in described("h100")
    assert 'device_description_str: "NVIDIA H100 80GB HBM3"' in described("h100")
    assert "feature_extension: NONE" in described("a100")


@pytest.mark.parametrize("kind", GPUS)
def test_a_described_gpu_is_the_kind_that_its_name_says(kind):
    gpu = GPUS[kind]
    assert Target.of_device("gpu", gpu.name) == Target("gpu", kind)
    major, minor = gpu.capability
    assert Target("gpu", kind).generation == 10 * major + minor
    assert gpu.block_memory < gpu.shared_memory


def test_every_described_kind_has_figures():
    assert {*SLICES, *GPUS} == set(DEVICE_RATES)


@pytest.mark.parametrize("topology", ["0", "2x2", "many", "1x1x4"])
def test_the_topology_of_gpus_is_a_number(topology):
    wanted = rf"'gpu:h100:{topology}': the topology of GPUs is how many there are, got '{topology}'; e.g. gpu:h100:4"
    with pytest.raises(ConfigError, match=wanted):
        aot.topology_of(f"gpu:h100:{topology}")


@pytest.mark.parametrize("plugins", ["none", "of others"])
def test_without_the_compilers_the_error_says_what_to_install(plugins, monkeypatch):
    find = importlib.util.find_spec

    def found(name):
        if not name.startswith("jax_plugins."):
            return find(name)
        if plugins == "none":
            raise ModuleNotFoundError(name)
        return None

    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(ConfigError, match=r"needs JAX's CUDA plugin.*; pip install 'kernelry\[aot-gpu\]'"):
        aot.topology_of("gpu:h100:63")


def test_where_the_plugin_did_not_load_the_error_says_what_to_set(monkeypatch):
    def not_registered(**described):
        raise NotImplementedError(f"topology not implemented for {described['platform']}")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", not_registered)
    with pytest.raises(ConfigError, match=r"installed but did not load.*; set JAX_PLATFORMS=cpu"):
        aot.topology_of("gpu:h100:62")


def test_without_the_assembler_the_error_says_what_to_install():
    wanted = r"needs ptxas, CUDA's assembler, and none was found; pip install 'kernelry\[aot-gpu\]'"
    with pytest.raises(ConfigError, match=wanted):
        check_assembler(RuntimeError("UNAVAILABLE: No PTX compilation provider is available. Neither ptxas/nvlink"))
    check_assembler(RuntimeError("other"))


def test_calls_of_cudnn_are_left_to_a_device():
    text = 'custom_call_target="__cudnn$fmhaSoftmaxBackward"\ncustom_call_target="__cudnn$fmhaSoftmax"'
    left = left_to_device(program(text))
    assert left == (
        "the program calls __cudnn$fmhaSoftmax, __cudnn$fmhaSoftmaxBackward, which cuDNN builds on the device"
    )
    assert left_to_device(program('custom_call_target="__gpu$xla.gpu.triton"')) == ""


@pytest.mark.parametrize("words", ["cuDNN is not detected.", "cuDNN not found."])
def test_a_cudnn_that_is_not_installed_is_asked_of_a_device(words):
    said = asked_of_device(RuntimeError(words))
    assert said == "the program calls cuDNN, which JAX lowers only where cuDNN is installed"
    assert asked_of_device(RuntimeError("other")) == ""


@pytest.mark.parametrize(
    ("facts", "outcome"),
    [
        ({}, "ok"),
        ({"unchecked": "it calls cuDNN"}, "unchecked"),
        ({"reason": CompileFailure("too large")}, "no"),
        ({"reason": CompileFailure("too large"), "unchecked": "it calls cuDNN"}, "no"),
    ],
)
def test_what_is_left_to_a_device_is_neither_ok_nor_a_failure(facts, outcome):
    found = aot.Compilation(Target("gpu", "h100"), 0.5, {}, None, **facts)
    assert str(found.outcome) == outcome
    assert found.ok == (outcome == "ok")
    assert found.to_json()["outcome"] == outcome


def test_more_memory_than_there_is_has_a_reason():
    assert str(CompileFailure.of_memory(770 * 2**30, 79 * 2**30)) == (
        "the program needs 770.0 GiB for arguments, outputs and temporaries, of 79.0 GiB; "
        "shorten the sequence, shard it, or choose a kernel that keeps no T×S logits"
    )
