"""The installed MaxText, asked again how the layers of its models attend: the record of it is still right.

MaxText 0.2.5 needs Python 3.12; without it these tests are skipped. The record is compared with kernelry in
tests/core/test_models_maxtext.py; here kernelry reads MaxText's own files as well.
"""

import importlib
import json

import pytest
from tests.support import maxtext_layers

from kernelry.config.maxtext.blocks import BLOCKS, MODEL, WITHOUT_ATTENTION
from kernelry.models import from_maxtext_model

_ASKED = json.loads(maxtext_layers.RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def _installed():
    if not maxtext_layers.models():
        pytest.skip("the package maxtext (Python 3.12) is not installed")
    with maxtext_layers.quiet():
        try:
            importlib.import_module("maxtext.models.models")
        except ImportError as error:
            pytest.skip(f"maxtext is installed without what its models import: {error}")


@pytest.mark.parametrize("name", _ASKED["models"])
def test_maxtext_builds_the_layers_of_the_record(name):
    entry = _ASKED["models"][name]
    options = maxtext_layers.yml(name)
    assert {key: value for key, value in options.items() if key in entry["options"]} == entry["options"]
    with maxtext_layers.quiet():
        assert maxtext_layers.answer(name, {}) == entry["layers"]


@pytest.mark.parametrize("name", _ASKED["variations"])
def test_maxtext_builds_the_layers_of_the_record_where_options_differ(name):
    entry = _ASKED["variations"][name]
    assert maxtext_layers.variations()[name] == (entry["model"], entry["options"])
    with maxtext_layers.quiet():
        assert maxtext_layers.answer(entry["model"], entry["options"]) == entry["layers"]


@pytest.mark.parametrize("name", _ASKED["models"])
def test_maxtexts_own_files_are_described_as_maxtext_builds_them(name):
    folder = maxtext_layers.folder()
    model = from_maxtext_model(folder / "base.yml", folder / "models" / f"{name}.yml")
    assert maxtext_layers.described(model) == _ASKED["models"][name]["layers"]


def test_the_record_has_all_models_and_the_tables_all_blocks_and_defaults():
    assert maxtext_layers.models() == sorted(_ASKED["models"])
    blocks = importlib.import_module("maxtext.common.common_types").DecoderBlockType
    assert {block.value for block in blocks} == {*BLOCKS, *WITHOUT_ATTENTION}
    yaml = pytest.importorskip("yaml")
    base = yaml.safe_load((maxtext_layers.folder() / "base.yml").read_text(encoding="utf-8"))
    assert {name: base[name] for name in MODEL} == {name: option.default for name, option in MODEL.items()}
