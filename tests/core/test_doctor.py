"""What `kernelry doctor` says of a machine, its drivers and compilers, and of extras; made up where none is here."""

import dataclasses
import json
import os
import sys
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from kernelry import cli
from kernelry.aot import gpu_code
from kernelry.cli import extras, machine, output
from kernelry.registry import installed
from kernelry.registry.contents import Plugin

DRIVER = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
H100 = "NVIDIA H100 80GB HBM3"


def gpu(limit=64 * 2**30, kind=H100):
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    return SimpleNamespace(
        platform="gpu", device_kind=kind, client=client, memory_stats=lambda: limit and {"bytes_limit": limit}
    )


def distribution(folder, name, version="1.0", *headers):
    """Metadata of a distribution, as pip leaves it."""
    made = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    made.mkdir()
    made.joinpath("METADATA").write_text(
        "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *headers, "", ""])
    )


@pytest.fixture
def packages(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    """A machine without drivers and programs."""
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path / "absent")
    monkeypatch.setattr(machine, "has_tpus", lambda: False)
    monkeypatch.setattr(gpu_code, "_PACKAGES", ())
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kernelry", *arguments])
        status = cli.main()
        return status, capsys.readouterr().out

    return call


def test_gpus_are_shown_with_their_memory_and_drivers(nothing, packages, monkeypatch, run):
    (nothing / "driver").write_text(DRIVER)
    monkeypatch.setattr(machine, "_NVIDIA", nothing / "driver")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu(), gpu(), gpu(None, "Made Up 9000")])
    for name, version in (("jax-cuda13-plugin", "0.10.2"), ("nvidia-cudnn-cu13", "9.13.0.50")):
        distribution(packages, name, version)
    data = json.loads(run("doctor", "--json")[1])
    hopper = {"target": "gpu:h100", "kind": H100, "count": 2, "memory": 2**36, "runtime": "PJRT C API cuda 13000"}
    other = {"target": "gpu:made-up-9000", "kind": "Made Up 9000", "count": 1, "memory": None}
    assert data["accelerators"] == [hopper, {**hopper, **other}]
    assert [(each["name"], each["version"]) for each in data["drivers"]] == [
        ("NVIDIA driver", "580.95.05"),
        ("JAX's CUDA plugin", "0.10.2"),
        ("cuDNN", "9.13.0.50"),
    ]
    assert data["unused"] == []
    status, out = run("doctor")
    assert status == 0
    assert "2 × NVIDIA H100 80GB HBM3 (gpu:h100), JAX may take 64.0 GiB of each; PJRT C API cuda 13000" in flat(out)
    assert "1 × Made Up 9000 (gpu:made-up-9000); " in flat(out)
    assert f"NVIDIA driver 580.95.05, says {nothing / 'driver'}" in flat(out)


def flat(text):
    return " ".join(text.split())


def test_tpus_are_shown_with_libtpu(nothing, packages, monkeypatch):
    def no_statistics():
        raise NotImplementedError

    client = SimpleNamespace(platform_version="TFRT TPU v5 lite")
    chips = [SimpleNamespace(platform="tpu", device_kind="TPU v5 lite", client=client, memory_stats=no_statistics)] * 4
    monkeypatch.setattr(jax, "local_devices", lambda: chips)
    distribution(packages, "libtpu", "0.0.42.1")
    assert [str(each) for each in machine.accelerators()] == ["4 × TPU v5 lite (tpu:v5e); TFRT TPU v5 lite"]
    assert [str(each) for each in machine.drivers()] == ["libtpu 0.0.42.1, says libtpu"]
    assert str(machine.compilers()[0]) == "libtpu 0.0.42.1, for TPUs"


def test_accelerators_that_jax_does_not_use_are_told_of(nothing, monkeypatch, run):
    (nothing / "driver").write_text("of another form")
    monkeypatch.setattr(machine, "_NVIDIA", nothing / "driver")
    monkeypatch.setattr(machine, "has_tpus", lambda: True)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="cpu", device_kind="cpu")])
    found = jax.config.jax_platforms
    otherwise = f", and unset JAX_PLATFORMS={found}" if found else ""
    status, out = run("doctor")
    assert status == 0
    assert "none that JAX uses" in out
    assert f"there is an NVIDIA driver, and JAX uses no GPU: pip install 'jax[cuda13]'{otherwise}" in flat(out)
    assert f"there are TPUs, and JAX uses none: pip install 'jax[tpu]'{otherwise}" in flat(out)
    assert "NVIDIA driver of unknown version" in flat(out)


def test_where_jax_can_use_no_device_there_is_none(nothing, monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "local_devices", none)
    assert (machine.accelerators(), machine.unused(), machine.drivers()) == ((), (), ())


def test_compilers_are_found_or_what_brings_them_is_said(nothing, packages):
    missing = [each.fix for each in machine.compilers()]
    assert missing == [
        "pip install 'kernelry[aot-tpu]'",
        "pip install 'kernelry[aot-gpu]'",
        "pip install 'kernelry[aot-gpu]'",
        "pip install nvidia-cuda-nvdisasm",
    ]
    assert "missing; pip install" in str(machine.compilers()[2])
    distribution(packages, "jax-cuda12-plugin", "0.10.2")
    for name, version in (("ptxas", "release 13.0, V13.0.88"), ("nvdisasm", "what?")):
        program = nothing / "bin" / name
        program.write_text(f"#!{sys.executable}\nprint({version!r})\n")
        os.chmod(program, 0o755)
    _, plugin, ptxas, nvdisasm = machine.compilers()
    assert (plugin.version, plugin.fix) == ("0.10.2", None)
    assert (ptxas.version, ptxas.path, ptxas.fix) == ("13.0.88", str(nothing / "bin" / "ptxas"), None)
    assert str(ptxas) == f"ptxas 13.0.88, for GPUs: CUDA's assembler: {ptxas.path}"
    assert (nvdisasm.version, nvdisasm.fix) == (None, None)


def with_plugin(distribution, kernels=()):
    """What is installed, with other kernels, and one plugin more."""
    plugin = Plugin("some", distribution, "some.plugin", enabled=True)
    found = installed.registry()
    return dataclasses.replace(found, kernels=dict(kernels), plugins=(*found.plugins, plugin))


def extra(name, *needs):
    conditions = [(need.partition(";")[0], need.partition(";")[2]) for need in needs]
    return [f"Provides-Extra: {name}"] + [
        f'Requires-Dist: {need}; {f"({more}) and " if more else ""}extra == "{name}"' for need, more in conditions
    ]


@pytest.fixture
def some(packages):
    distribution(packages, "some-vendor", "2.1", *extra("fast", "some-speed>=1"), *extra("old_name", "some-part"))
    distribution(packages, "some-part", "1.5rc1")
    headers = [
        *extra("here", "some-part>=1.5rc1"),
        *extra("outdated", "some-part>=2", "some-vendor"),
        *extra("absent", "some-absent[x]>=3,<4"),
        *extra("nested", "some-vendor[fast,old-name]>=2"),
        *extra("later", 'some-part; python_version >= "99"', 'some-vendor; sys_platform == "none"'),
        *extra("partly", 'some-part; python_version >= "99"', "some-vendor"),
        *extra("empty"),
        "Requires-Dist: some-vendor>=9",
        'Requires-Dist: no name at all =; extra == "here"',
    ]
    distribution(packages, "some-kernels", "0.1", *headers)
    registry = with_plugin("some-kernels 0.1")
    return {each.name: each for each in extras.extras(registry) if each.distribution == "some-kernels"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("here", "installed: some-part>=1.5rc1"),
        ("empty", "installed: adds nothing"),
        (
            "outdated",
            "would add some-part>=2 (1.5rc1 is installed): pip install 'some-kernels[outdated]'",
        ),
        ("absent", "would add some-absent[x]<4,>=3: pip install 'some-kernels[absent]'"),
        ("nested", "would add some-speed>=1: pip install 'some-kernels[nested]'"),
        ("partly", "installed: some-vendor"),
        (
            "later",
            'not for this Python or platform: some-part where python_version >= "99", some-vendor where '
            'sys_platform == "none"',
        ),
    ],
)
def test_an_extra_is_installed_or_missing_or_not_for_this_python(some, name, told):
    assert str(some[name]) == told


def test_as_data_an_extra_has_a_command_only_where_something_is_missing(some):
    assert some["absent"].to_json() == {
        "distribution": "some-kernels",
        "name": "absent",
        "state": "missing",
        "adds": ("some-absent[x]<4,>=3",),
        "missing": ("some-absent[x]<4,>=3",),
        "kernels": (),
        "install": "pip install 'some-kernels[absent]'",
    }
    assert [name for name, each in some.items() if each.to_json()["install"]] == ["absent", "nested", "outdated"]


def test_a_distribution_without_metadata_has_no_extras():
    found = extras.extras(with_plugin("unknown distribution"))
    assert {each.distribution for each in found} == {each.distribution for each in extras.extras(installed.registry())}


def test_every_extra_of_ours_is_told_with_the_kernels_that_need_it(run):
    told = {(each["distribution"], each["name"]): each for each in json.loads(run("doctor", "--json")[1])["extras"]}
    assert {"flax", "plot", "quant", "aot-tpu", "aot-gpu", "all"} <= {name for of, name in told if of == "kernelry"}
    assert told["kernelry-tpu-splash", "tokamax"]["kernels"] == ["tokamax_splash"]
    assert told["kernelry-gpu-pallas", "tokamax"]["kernels"] == ["tokamax_mosaic"]
    assert told["kernelry-cudnn-te", "te"]["kernels"] == ["cudnn_te"]
    assert told["kernelry-tpu-flywheel", "flywheel"]["kernels"] == ["flywheel", "flywheel_paged"]
    assert told["kernelry", "flax"]["kernels"] == []


def test_a_kernel_whose_refusals_raise_needs_no_extra_that_is_known(packages, monkeypatch):
    distribution(packages, "some-kernels", "0.1", *extra("fast", "some-speed"))

    def refusals(request, environment):
        raise RuntimeError

    [dense] = [kernel for kernel in installed.kernels() if kernel.name == "dot_product"]
    spec = SimpleNamespace(capabilities=dense.spec.capabilities, refusals=refusals)
    kernel = SimpleNamespace(name="some", distribution="some-kernels 0.1", spec=spec)
    found = extras.extras(with_plugin("some-kernels 0.1", {"some": kernel}))
    assert [each.kernels for each in found if each.distribution == "some-kernels"] == [()]


@pytest.mark.parametrize("width", [60, 100])
def test_lines_are_as_wide_as_the_terminal(width, monkeypatch, capsys, run):
    monkeypatch.setattr(output, "console", Console(width=width, highlight=False))
    _, out = run("doctor")
    long = [line for line in out.splitlines() if len(line) > width]
    assert [line for line in long if " " in line.strip()] == []
    assert "No faults." in out
