"""What pages say of the repository: the tests that docs/semantics.md names, and the masks that are drawn as text."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEMANTICS = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
RULES = re.findall(r"^- \*\*(\d+\.\d+)\*\* (.*?)(?=^- |^#|\Z)", SEMANTICS, re.MULTILINE | re.DOTALL)


def test_rules_are_numbered_in_order_by_section():
    sections = re.split(r"^## ", SEMANTICS, flags=re.MULTILINE)[1:]
    for number, section in enumerate(sections, 1):
        found = re.findall(r"^- \*\*(\d+\.\d+)\*\*", section, re.MULTILINE)
        assert found == [f"{number}.{place}" for place in range(1, len(found) + 1)]


@pytest.mark.parametrize(("number", "text"), RULES, ids=[number for number, _ in RULES])
def test_every_rule_names_tests_that_exist(number, text):
    named = re.findall(r"`(tests/\S+?)::(\w+)`", text)
    assert named, f"{number} names no test"
    for path, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (path, test)


def test_the_masks_drawn_as_text_are_those_of_their_comments(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "docs" / "site")])
    import mask_pictures

    pages = [path.read_text(encoding="utf-8") for path in ROOT.glob("docs/**/*.md")]
    drawn = [page for page in pages if mask_pictures.PICTURE.search(page)]
    assert drawn
    for page in drawn:
        assert mask_pictures.with_texts(page) == page


def test_a_mask_is_drawn_as_a_figure(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "docs" / "site")])
    import mask_pictures

    figure = mask_pictures.with_pictures("before\n\n<!-- mask: causal T=3 S=3 -->\n\n```text\nold\n```\nafter\n")
    assert (figure.count('class="seen"'), figure.count('class="hidden"')) == (6, 3)
    assert "old" not in figure
    assert "3 queries as rows, 3 keys as columns" in figure
    assert figure.startswith("before\n")
    assert figure.endswith("after\n")
    blocks = mask_pictures.with_pictures("<!-- mask: causal T=4 S=4 blocks=2 -->\n")
    assert [blocks.count(f'class="block {kind}"') for kind in ("full", "partial", "empty")] == [1, 2, 1]
