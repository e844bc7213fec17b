"""What the porting pages show is run as it is printed; those about libraries that are not here by tests/models."""

import re
from pathlib import Path

import jax
import pages
import pytest

DOCS = Path(__file__).parents[2] / "docs"
PORTING = {path.stem: path for path in sorted((DOCS / "porting").glob("*.md"))}


@pytest.mark.versions
@pytest.mark.parametrize("page", ["jax_nn", "flax", "tokamax"])
def test_the_page_runs(page):
    if page == "tokamax":
        pytest.importorskip("tokamax")
    with jax.numpy_rank_promotion("allow"):  # as for users
        pages.run(PORTING[page])


def test_every_page_is_listed_and_run():
    listed = re.findall(r"\]\(porting/(\w+)\.md\)", (DOCS / "porting.md").read_text())
    assert {*listed} == PORTING.keys()
    run = "".join((Path(__file__).parents[1] / folder).read_text() for folder in _TESTS)
    assert [page for page in PORTING if f'"{page}"' not in run] == []


_TESTS = ("architecture/test_porting.py", "models/test_porting_pages.py")


@pytest.mark.parametrize("page", PORTING)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```python.*?```", "", PORTING[page].read_text(), flags=re.DOTALL)
    for file in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (DOCS / "porting" / file).exists(), file
