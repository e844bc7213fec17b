"""What README and docs show is run: README in one program for each block, and in the sweep as it is printed.

`make test-install` runs all of it in a fresh environment.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import kernelry
from kernelry.config import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SHOWN = {
    file: text
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    if "```python" in (text := file.read_text())
}

CHECKS = {
    "README.md": """
assert packed.form.atoms and out.shape == (2, 1024, 8, 64), out.shape
assert step.shape == (2, 1, 8, 64) and int(cache.lengths[0]) == 1025
assert kernelry_kernels() == [MINE]
import sys, types
import numpy as np
from kernelry.plugin import Partial, Side
from kernelry.testing import reference_attention

class MyKernel:
    def forward(self, inputs, request, tiling, *, statistics):
        logits = jnp.einsum("bthd,bshd->bhts", inputs.query, inputs.key) * request.scale
        for mask in inputs.mask:
            logits = jnp.where(mask.evaluate(Side.query(request.q_len), Side.kv(request.kv_len)), logits, -jnp.inf)
        out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), inputs.value)
        return Partial(out, dtype=request.dtype)

sys.modules["my_package"] = sys.modules["my_package.kernel"] = types.SimpleNamespace(MyKernel=MyKernel, __path__=[])
asked = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
with kernelry.use("mine", kernels=[MINE]):
    assert "mode=train is not prefill" in str(kernelry.explain(kernelry.Request(q_len=8))), "mine serves no training"
    with kernelry.record() as resolutions:
        served = kernelry.attention(asked, asked, asked, mask=kernelry.masks.Causal(), mode="prefill")
assert [resolution.kernel for resolution in resolutions] == ["mine"], resolutions
expected = reference_attention(*[np.asarray(asked)] * 3, mask=kernelry.masks.Causal()).out
np.testing.assert_allclose(served, expected, atol=1e-5)
""",
    "caches.md": """
import numpy as np
from kernelry import masks
from kernelry.testing import reference_attention

def greedy(tokens):
    x = np.asarray(embedding, np.float64)[tokens]
    for weights in layers:
        qkv = [np.einsum("rtf,fnh->rtnh", x, weights[name]) for name in ("query", "key", "value")]
        out = reference_attention(*qkv, mask=masks.Causal()).out
        x = x + out.reshape(*x.shape[:2], -1) @ np.asarray(weights["out"], np.float64)
    return (x[:, -1] @ np.asarray(logits, np.float64)).argmax(-1)

tokens = np.asarray(prompt)
for found in answer:
    np.testing.assert_array_equal(found, greedy(tokens))
    tokens = np.concatenate([tokens, np.asarray(found)[:, None]], axis=1)
assert len({*np.ravel(answer).tolist()} - {0}) > 3, answer
assert token.tolist() == [0, 0] and bool(cache.overflowed) and cache.lengths.tolist() == [16, 16]
""",
}
"""What holds after the blocks of a file; a file without an entry only has to run."""


def _blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


PRINTED = [pytest.param(file, marks=[pytest.mark.sweep] * (file.name == "README.md"), id=file.name) for file in SHOWN]


@pytest.mark.parametrize("file", PRINTED)
def test_python_runs_as_it_is_printed(file, tmp_path):
    program = tmp_path / "shown.py"
    program.write_text("\n".join([*_blocks("python", SHOWN[file]), CHECKS.get(file.name, "")]))
    environ = {key: value for key, value in os.environ.items() if not key.startswith("KERNELRY_")}
    command = [sys.executable, "-W", "error", program.name]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    if file.name == "README.md":
        assert "→ pallas_flash" in done.stdout
        assert "→ cudnn_te" in done.stdout
    if file.name == "caches.md":
        assert "PagedCache: tokens were appended that did not fit" in done.stdout


def _run(block, names):
    """Compiles a block as one program; run eagerly, each operation would compile one of its own."""

    def run():
        exec(block, names)
        return {name: value for name, value in names.items() if _is_of_arrays(value)}

    names |= jax.jit(run)()


def _is_of_arrays(value):
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_the_blocks_of_readme_run():
    names = {}
    for number, block in enumerate(_blocks("python")):
        _run(block.replace("print(", f"text_{number} = str("), names)
    exec(CHECKS["README.md"], names)
    assert "→ pallas_flash" in names["text_0"]
    assert "→ cudnn_te" in names["text_1"]


def test_the_first_example_is_short():
    assert len([line for line in _blocks("python")[0].splitlines() if line.strip()]) <= 15


def test_every_extra_is_in_the_first_screen():
    extras = tomllib.loads((ROOT / "core" / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    screen = "\n".join(README.splitlines()[:40])
    assert [extra for extra in extras if f"`{extra}`" not in screen] == []
    assert not any("matplotlib" in need or "[plot" in need for need in extras["all"])


def test_the_config_is_valid_and_decides():
    config = load_config(tomllib.loads(_blocks("toml")[0])["attention"])
    resolution = kernelry.explain(kernelry.Request(q_len=2048, target="gpu:a100"), policy=config.policy)
    assert "rule 1" in resolution.rule


def test_every_kernel_of_ours_is_in_the_table():
    ours = {k.name for k in kernelry.kernels() if k.distribution.startswith("kernelry-")}
    assert {name for name in ours if f"| `{name}` |" in README} == ours


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert f"\n{target}:" in makefile
