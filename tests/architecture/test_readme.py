"""What README shows is run."""

import re
import tomllib
from pathlib import Path

import jax
import pytest

import kernelry
from kernelry.config import load_config

README = (Path(__file__).parents[2] / "README.md").read_text()


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _run(block, names):
    """Compiles a block as one program; run eagerly, each operation would compile one of its own."""

    def run():
        exec(block, names)
        return {name: value for name, value in names.items() if _is_of_arrays(value)}

    names |= jax.jit(run)()


def _is_of_arrays(value):
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)


@pytest.mark.parametrize("run", [_run, pytest.param(exec, marks=pytest.mark.sweep)])
def test_the_example_runs(run):
    example = _blocks("python")[0]
    names = {}
    run(example.replace("print(", "text = str("), names)
    assert names["out"].shape == (2, 1, 8, 64)
    run(_blocks("python")[1].replace("print(", "shared = str("), names)
    assert "→ cudnn_te" in names["shared"]
    run(_blocks("python")[2], names)
    assert names["step"].shape == (2, 1, 8, 64)
    assert int(names["cache"].lengths[0]) == 1025
    run(_blocks("python")[3], names)
    assert names["out"].shape == (2, 1024, 8, 64)
    assert "→ pallas_flash" in names["text"]
    assert len([line for line in example.splitlines() if line.strip()]) <= 15


def test_the_config_is_valid_and_decides():
    config = load_config(tomllib.loads(_blocks("toml")[0])["attention"])
    resolution = kernelry.explain(kernelry.Request(q_len=2048, target="gpu:a100"), policy=config.policy)
    assert "rule 1" in resolution.rule


def test_every_kernel_of_ours_is_in_the_table():
    ours = {k.name for k in kernelry.kernels() if k.distribution.startswith("kernelry-")}
    assert {name for name in ours if f"| `{name}` |" in README} == ours


def test_every_make_target_named_exists():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert f"\n{target}:" in makefile
