"""What README and docs show is run, in the sweep as it is printed; what they say is printed is compared with it.

`make test-install` runs it in a fresh environment.
"""

import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement

import kernelry
from kernelry import pictures
from kernelry.config import load_config
from kernelry.masks.parse import parse_mask

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
FOLLOWED = ["writing-a-kernel.md"]
"""Commands and edits in order, which tests/install follows in a fresh environment."""

SHOWN = [name for name, text in PAGES.items() if "```python" in text and name not in FOLLOWED]
IN_THIS_PROCESS = ["README.md", "attention.md", "concepts.md", "index.md", "masks.md", "maxtext.md", "plugins.md"]
"""Of these, each block is compiled as one program here; a fresh process runs them in the sweep."""

CHECKS = {
    "README.md": "assert out.shape == (2, 1024, 8, 64), out.shape",
    "attention.md": """
assert packed.form.atoms and out.shape == (2, 1, 8, 64), out.shape
assert biased.shape == query.shape, biased.shape
import numpy as np
from kernelry.testing import reference_attention

expected = reference_attention(absorbed, latent, latent[..., :512], mask=masks.Full()).out
np.testing.assert_allclose(absorbed_out, expected, atol=2e-5)
np.testing.assert_allclose(paged_out, expected, atol=2e-5)
""",
    "concepts.md": """
import numpy as np
from kernelry.testing import reference_attention

expected = reference_attention(*map(np.asarray, (query, key, value)), mask=masks.Full()).out
np.testing.assert_allclose(out, expected, atol=2e-6)
""",
    "index.md": "assert out.shape == (2, 256, 8, 64), out.shape",
    "masks.md": "assert balanced.form.atoms and decode_step.form.atoms",
    "maxtext.md": "assert out.shape == (2, 1024, 8, 64), out.shape",
    "models.md": "assert (out.shape, features.shape) == ((1, 64, 32, 128), (1, 64, 64))",
    "plugins.md": """
assert kernelry_kernels() == [MINE]
import sys, types
import jax, jax.numpy as jnp
import numpy as np
import kernelry
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
with kernelry.use(kernels=[CAREFUL]):
    facts = dict(mode="prefill", dtype="float32", head_dim=8, target="cpu")
    answers = [str(kernelry.explain(kernelry.Request(q_len=size, **facts))) for size in (65536, 131072)]
assert "careful: could serve, ranked lower" in answers[0], answers[0]
assert "careful: passed over: kv_len=131072 > 65536 was never tried; it serves with kernel=" in answers[1], answers[1]
assert kernelry_rank(kernelry.Request(q_len=4096, target="gpu:h100"), ()).kernels == ("careful", "mine")
facts |= dict(kv_layout="value_in_key", q_len=8)
with kernelry.use(kernels=[LATENT, MINE]):
    latent, mine = (kernelry.explain(kernelry.Request(**facts), kernel=name).plan for name in ("latent", "mine"))
assert ([*latent.steps], [step.adapter.name for step in mine.steps]) == ([], ["separate_kv"])
assert COMPILED.signature(kernelry.Request(q_len=8)) == ("my_kernels.forward_*", "my_package.compiled")
""",
    "mesh.md": """
import numpy as np
from kernelry.testing import reference_attention

expected = reference_attention(*map(np.asarray, (query, key, value)), mask=masks.Causal()).out
np.testing.assert_allclose(out, expected, atol=2e-6)
with jax.set_mesh(mesh), kernelry.use(sharding=sharding):
    np.testing.assert_allclose(layer(query, key, value), expected, atol=2e-6)
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
assert out.shape == (2, 1, 8, 64), out.shape
assert token.tolist() == [0, 0] and bool(cache.overflowed) and cache.lengths.tolist() == [16, 16]

every = np.concatenate([latent, new], axis=1)
expected = reference_attention(absorbed, every, every[..., :LATENT], scale=(128 + ROTARY) ** -0.5, mask=masks.Full())
np.testing.assert_allclose(seen, expected.out, atol=2e-5)
assert mla.lengths.tolist() == [21, 21]
""",
}
"""What holds after the blocks of a page; a page without an entry only has to run."""

PRINTS = {
    "README.md": ["→ pallas_flash"],
    "attention.md": ["→ pallas_flash", "→ cudnn_te"],
    "concepts.md": ["pallas_decode"],
    "index.md": ["→ cudnn_jax"],
    "models.md": ["sliding: layers 0, 2, …, 44: mask=window(4095, 0)", "\npallas_decode\n"],
    "mesh.md": ["'data', 'context', None, None", "dual_chunk contiguous"],
    "caches.md": ["PagedCache: tokens were appended that did not fit"],
}


def _blocks(language, text=README):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for its_language, block in found if its_language == language]


def _printed_pages():
    """Every page that shows programs; those that also run in this process are in the sweep."""
    return [pytest.param(name, marks=[pytest.mark.sweep] * (name in IN_THIS_PROCESS)) for name in SHOWN]


@pytest.mark.parametrize("name", _printed_pages())
def test_python_runs_as_it_is_printed(name, tmp_path):
    program = tmp_path / "shown.py"
    program.write_text("\n".join([*_blocks("python", PAGES[name]), CHECKS.get(name, "")]))
    environ = {key: value for key, value in os.environ.items() if not key.startswith("KERNELRY_")} | {
        "KERNELRY_MEASUREMENTS": ""
    }
    command = [sys.executable, "-W", "error", program.name]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for expected in PRINTS.get(name, ()):
        assert expected in done.stdout


def _run(block, names):
    """Compiles a block as one program; run eagerly, each operation would compile one of its own."""

    def run():
        exec(block, names)
        return {name: value for name, value in names.items() if _is_of_arrays(value)}

    names |= jax.jit(run)()


def _is_of_arrays(value):
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_the_blocks_run(name):
    names = {"printed": []}
    for block in _blocks("python", PAGES[name]):
        _run(block.replace("print(", "printed.append("), names)
    exec(CHECKS[name], names)
    printed = "\n".join(map(str, names["printed"]))
    for expected in PRINTS.get(name, ()):
        assert expected in printed


def test_the_first_example_is_short():
    assert len([line for line in _blocks("python")[0].splitlines() if line.strip()]) == 5


def test_the_resolution_shown_is_the_one_printed(tmp_path):
    environ = os.environ | {"KERNELRY_PLUGINS": "cudnn_te,dot_product,gpu_pallas"}
    program = "import kernelry\n" + _blocks("python")[1]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert _blocks("text")[0] == done.stdout, done.stdout + done.stderr


def test_the_model_is_the_one_printed(capsys):
    page = PAGES["models.md"]
    exec(compile(_blocks("python", page)[0], "models.md", "exec"), {})
    assert _blocks("text", page)[0] == capsys.readouterr().out


def test_the_table_of_a_model_is_the_one_printed(tmp_path):
    page = PAGES["models.md"]
    _, *arguments = _blocks("", page)[0].split()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KERNELRY_")} | {
        "KERNELRY_MEASUREMENTS": ""
    }
    environ |= {"COLUMNS": "80", "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", "from kernelry.cli import main; main()", *arguments]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    printed = "\n".join(line.rstrip() for line in done.stdout.splitlines())
    [table] = [block for block in _blocks("text", page) if "┏" in block]
    assert table.strip() == printed, done.stdout + done.stderr


def test_the_mask_shown_is_the_one_drawn():
    [expression] = re.findall(r"^\$ kernelry mask \"(.*)\"$", README, re.MULTILINE)
    assert _blocks("text")[1].strip() == pictures.text(parse_mask(expression)).strip()


def test_readme_is_short():
    assert len(README.splitlines()) <= 180


def test_every_extra_is_in_readme():
    extras = tomllib.loads((ROOT / "core" / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = [line for line in README.splitlines() if line.startswith("| `")]
    assert [extra for extra in extras if not any(f"`{extra}`" in line.split("|")[1] for line in table)] == []
    assert not any("matplotlib" in need or "[plot" in need for need in extras["all"])


def test_the_config_is_valid_and_decides():
    block, *_ = _blocks("toml", PAGES["choosing.md"])
    config = load_config(tomllib.loads(block)["attention"])
    resolution = kernelry.explain(kernelry.Request(q_len=2048, target="gpu:a100"), policy=config.policy)
    assert "rule 1" in resolution.rule


def test_every_kernel_of_ours_is_in_the_tables():
    ours = {k.name for k in kernelry.kernels() if k.distribution.startswith("kernelry-")}
    assert {name for name in ours if f"| `{name}` |" in PAGES["kernels.md"]} == ours
    assert {name for name in ours if f"`{name}`" in README} == ours


def test_the_table_of_kernels_has_the_versions_of_every_vendor():
    rows = [line for line in PAGES["kernels.md"].splitlines() if line.startswith("| `")]
    for file in sorted(ROOT.glob("plugins/*/pyproject.toml")):
        project = tomllib.loads(file.read_text())["project"]
        for extra, needs in project.get("optional-dependencies", {}).items():
            found = [row for row in rows if project["name"] in row and f"[{extra}]" in row]
            assert found, extra
            for need, row in itertools.product(map(Requirement, needs), found):
                versions = [bound.version.removesuffix(".*") for bound in need.specifier]
                python = re.findall(r"python_version >= .([0-9.]+)", str(need.marker))
                said = [re.sub("-cu[0-9]+$", "", need.name), *versions, *(f"Python {version}" for version in python)]
                assert [fact for fact in said if fact not in row] == [], (extra, row)


def test_every_page_is_linked_from_readme():
    assert [name for name in PAGES if name != "README.md" and f"](docs/{name})" not in README] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for file, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", PAGES[name]):
        path = folder / file if file else folder / name
        assert path.exists(), file
        assert not heading or heading in _anchors(path.read_text()), heading


def _anchors(text):
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", [*PAGES, "CONTRIBUTING.md"])
def test_every_make_target_named_exists(file):
    text = PAGES[file] if file in PAGES else (ROOT / file).read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", text)):
        assert f"\n{target}:" in makefile, target


def test_every_make_target_is_in_contributing():
    [names] = re.findall(r"^\.PHONY: (.*(?:\\\n.*)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    table = (ROOT / "CONTRIBUTING.md").read_text()
    assert [name for name in names.replace("\\", "").split() if f"`make {name}" not in table] == []
