"""What users do: install the core with one plugin, add the others, add a third party's, remove it."""

import json
import re
import shlex

import pytest
from fresh_venv import ROOT

pytestmark = pytest.mark.install


ATTEND = """
import json
import numpy as np
import kernelry

rng = np.random.default_rng(0)
query, key, value = (rng.standard_normal((2, 5, 4, 8), np.float32) for _ in range(3))
mask = kernelry.masks.Causal()
expected = kernelry.attention(query, key, value, mask=mask, kernel="dot_product")
"""
RUN = """
with kernelry.record() as resolutions:
    out = kernelry.attention(query, key, value, mask=mask)
np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
print(json.dumps(resolutions[0].kernel))
"""
RUN_BY_CONFIG = """
from kernelry.config import load_config

config = load_config({"rules": [{"when": {"platform": "cpu", "mask": ["causal"]}, "use": ["example_reference"]}]})
with kernelry.use(policy=config.policy), kernelry.record() as resolutions:
    out = kernelry.attention(query, key, value, mask=mask)
np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
print(json.dumps(resolutions[0].kernel))
"""
RUN_MASK = """
from kernelry_example.masks import Strided

picture = np.array([[(p - k) % 2 == 0 for k in range(5)] for p in range(5)])
dense = kernelry.attention(query, key, value, mask=kernelry.masks.Dense(picture[None, None]))
out = kernelry.attention(query, key, value, mask=Strided(2))
np.testing.assert_allclose(out, dense, rtol=1e-5, atol=1e-6)
print(json.dumps("ok"))
"""


def _blocks(path):
    return re.findall(r"```(\w*)\n(.*?)```", path.read_text(), re.DOTALL)


# writing-a-kernel.md is followed by test_new_plugin.py.
SHOWING = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "writing-a-kernel.md"]
PAGES = {path.name: _blocks(path) for path in (ROOT / "README.md", *SHOWING)}
PROGRAMS = {
    page: "\n".join(block for language, block in blocks if language == "python") for page, blocks in PAGES.items()
}
SHOWN = [
    line.removeprefix("$ ").partition("  #")[0].strip()
    for blocks in PAGES.values()
    for language, block in blocks
    if not language
    for line in block.splitlines()
    if line.removeprefix("$ ").startswith("kernelry ")
]
# The whole kit takes minutes, and on every kernel it is a step of CI's own.
COMMANDS = list(
    dict.fromkeys(re.sub(r"conformance (--all|\w+).*", "conformance dot_product --quick", line) for line in SHOWN)
)
OURS = ["cudnn_te", "dot_product", "gpu_flash_attn", "gpu_pallas", "tpu_flywheel", "tpu_splash"]


def test_core_and_one_plugin_list_that_plugins_kernels(bare):
    assert bare.kernels() == ["blockwise", "dot_product"]


def test_core_and_one_plugin_attend(bare):
    assert bare.python(ATTEND + RUN) == "dot_product"


LOAD = """
import json, kernelry
config = kernelry.config.load_config("config.yaml")
print(json.dumps([config.kernel, kernelry.config.load_config("config.toml").kernel]))
"""


def test_configs_are_read_without_an_extra(bare):
    (bare.sources / "config.yaml").write_text("attention: {kernel: blockwise}\n")
    (bare.sources / "config.toml").write_text('[attention]\nkernel = "dot_product"\n')
    assert bare.python(LOAD) == ["blockwise", "dot_product"]


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("flax", "import kernelry; kernelry.flax.AttentionOp()"),
        ("plot", "from kernelry import masks, pictures; pictures.image(masks.Causal(), q_len=4)"),
        ("quant", "import kernelry, jax.numpy as jnp; kernelry.cache.QuantizedArray.quantize(jnp.ones((1, 8)))"),
    ],
)
def test_what_needs_an_extra_says_what_to_install(bare, extra, code):
    done = bare.run("python", "-c", code)
    assert f"pip install 'kernelry[{extra}]'" in done.stderr.splitlines()[-1]


def test_all_plugins_are_listed(complete):
    assert complete.plugins() == OURS


def test_all_plugins_leave_attention_working(complete):
    assert complete.python(ATTEND + RUN) == "dot_product"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_runs(complete, command):
    config = next(block for language, block in PAGES["choosing.md"] if language == "toml")
    (complete.sources / "config.toml").write_text(config)
    times = str(complete.sources / "times") if command.startswith("kernelry tune") else ""  # others print the defaults
    done = complete.run(*shlex.split(command), times=times)
    assert "Traceback" not in done.stderr
    if command.startswith("kernelry check"):
        assert "aot-tpu" in done.stdout + done.stderr  # what brings the compilers
        return
    assert done.returncode == 0, done.stdout + done.stderr


WITH_EXTRA = {"maxtext.md": "flax", "models.md": "flax", "caches.md": "quant"}
WITHOUT_EXTRA = [page for page, program in PROGRAMS.items() if program and page not in WITH_EXTRA]


@pytest.mark.parametrize("page", WITHOUT_EXTRA)
def test_the_programs_shown_run_as_they_are_printed(complete, page):
    done = complete.run("python", "-W", "error", "-c", PROGRAMS[page])
    assert done.returncode == 0, done.stderr


# caches.md computes for long before it asks for its extra.
@pytest.mark.parametrize(("page", "extra"), [each for each in WITH_EXTRA.items() if each[0] != "caches.md"])
def test_a_program_that_needs_an_extra_says_what_to_install(complete, page, extra):
    done = complete.run("python", "-c", PROGRAMS[page])
    assert f"pip install 'kernelry[{extra}]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("page", WITH_EXTRA)
def test_the_programs_that_need_an_extra_run_with_it(extended, page):
    done = extended.run("python", "-W", "error", "-c", PROGRAMS[page])
    assert done.returncode == 0, done.stderr


def test_third_partys_kernel_is_chosen_by_config_and_equals_dot_product(extended):
    assert extended.python(ATTEND + RUN_BY_CONFIG) == "example_reference"


def test_third_partys_kernel_is_not_chosen_unasked(extended):
    assert extended.python(ATTEND + RUN) == "dot_product"


def test_third_partys_mask_equals_dense(extended):
    assert extended.python(ATTEND + RUN_MASK) == "ok"


def test_third_partys_kernel_is_in_the_commands_list(extended):
    done = extended.run("kernelry", "list", "--json")
    listed = {kernel["name"]: kernel["distribution"] for kernel in json.loads(done.stdout)["kernels"]}
    assert listed["example_reference"] == "kernelry-example-third-party 1.0"


def test_third_partys_mask_is_known_to_the_command(extended):
    done = extended.run("kernelry", "explain", "--mask", "strided(2)", "--json")
    assert json.loads(done.stdout)["plan"]["kernel"] == "blockwise"  # at the default 1024 tokens


def test_doctor_finds_no_fault(extended):
    done = extended.run("kernelry", "doctor", "--json")
    assert json.loads(done.stdout)["faults"] == []


def test_uninstalling_the_third_party_removes_its_kernel(restored):
    assert "example_reference" not in restored.kernels()


def test_uninstalling_the_third_party_leaves_the_others(restored):
    assert restored.plugins() == OURS


def test_uninstalling_the_third_party_leaves_attention_working(restored):
    assert restored.python(ATTEND + RUN) == "dot_product"


def test_config_that_still_names_the_third_partys_kernel_says_it_is_not_installed(restored):
    done = restored.run("python", "-c", ATTEND + RUN_BY_CONFIG)
    assert "example_reference: no installed plugin brings a kernel of that name" in done.stderr
