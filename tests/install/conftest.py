"""One environment for all tests of installing, in four states that are each made once, in this order."""

import pytest
from fresh_venv import ROOT, Venv


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    venv = Venv(tmp_path_factory.mktemp("install"))
    venv.pip("install", "./core", "./plugins/dot_product")
    return venv


@pytest.fixture(scope="session")
def complete(bare):
    bare.install(*(f"./plugins/{folder.name}" for folder in sorted((ROOT / "plugins").iterdir())))
    return bare


@pytest.fixture(scope="session")
def extended(complete):
    complete.install("./core[flax,quant]", "./third_party")
    return complete


@pytest.fixture(scope="session")
def restored(extended):
    extended.pip("uninstall", "-y", "kernelry-example-third-party")
    return extended
