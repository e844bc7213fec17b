"""The built site: every page opens at two widths without errors, and every link, anchor, picture and name is there."""

import functools
import html
import re
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

import kernelry
import kernelry.pictures

SITE = Path(__file__).parents[2] / "build" / "docs"
DESKTOP, PHONE = 1280, 390
OVERFLOW = """() => {
    const width = document.documentElement.clientWidth;
    const inBox = (element) => {
        for (let at = element.parentElement; at; at = at.parentElement)
            if (["auto", "scroll", "hidden"].includes(getComputedStyle(at).overflowX)) return true;
        return false;
    };
    const wide = [...document.querySelectorAll(".md-content *")].filter((element) => {
        const box = element.getBoundingClientRect();
        return box.width && box.right > width + 1 && !inBox(element);
    });
    const broken = [...document.images].filter((image) => !(image.complete && image.naturalWidth));
    const cut = [...document.querySelectorAll(".md-typeset__scrollwrap")]
        .filter((box) => innerWidth < 600 && box.scrollWidth > box.clientWidth + 1);
    const said = (element) => element.tagName + ": " + (element.textContent || element.src).slice(0, 80);
    return {page: document.documentElement.scrollWidth - innerWidth, wide: [...wide, ...cut].map(said),
            broken: broken.map(said)};
}"""
"""What is wider than the page, in no box that scrolls; on a phone, tables to be scrolled; images that did not load."""

NO_SEARCH = "window.Worker = class extends EventTarget { postMessage() {} terminate() {} };"
"""Each page would index the whole site for its search, which takes longer than to show it."""


class _Page(HTMLParser):
    """The links, sources and ids of a page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src") if given.get(name) is not None]


@functools.cache
def _page(path):
    return _Page(path)


def _pages():
    return sorted(path for path in SITE.rglob("*.html") if path.name != "404.html")


def _address(path):
    return path.relative_to(SITE).as_posix().removesuffix("index.html")


def test_the_site_has_pages(site):
    assert len(_pages()) > 40


def test_every_page_opens_without_errors_and_fits_at_the_widths_of_a_desktop_and_a_phone(open_page, site):
    page = open_page("404.html")
    page.add_init_script(NO_SEARCH)
    wrong = {}
    for path in _pages():
        for width in (DESKTOP, PHONE):
            page.set_viewport_size({"width": width, "height": 900})
            if width == DESKTOP:
                page.goto(f"{site}/{_address(path)}", wait_until="load")
            found = page.evaluate(OVERFLOW)
            if found["page"] > 0 or found["wide"] or found["broken"]:
                wrong[_address(path), width] = found
    assert wrong == {}


def test_pages_are_described_and_name_each_other_by_their_titles():
    text = (SITE / "choosing" / "index.html").read_text(encoding="utf-8")
    assert '<meta name="description" content="Kernels are chosen by name (kernel=' in text
    assert '<a href="../tuning/">Tuning</a>' in text
    named = [_address(path) for path in _pages() if ".md</a>" in path.read_text(encoding="utf-8")]
    assert named == []


def test_every_link_leads_somewhere():
    wrong = []
    for path in _pages():
        for link in _page(path).links:
            target = urllib.parse.urlsplit(link)
            if target.scheme in ("http", "https", "mailto", "data") or target.netloc:
                continue
            to = path if not target.path else (path.parent / urllib.parse.unquote(target.path)).resolve()
            to = to / "index.html" if to.is_dir() else to
            anchor = urllib.parse.unquote(target.fragment)
            if not to.exists() or (anchor and to.suffix == ".html" and anchor not in _page(to).ids):
                wrong.append((_address(path), link))
    assert wrong == []


def test_nothing_is_asked_of_another_host():
    """Links may lead elsewhere; what a page loads may not."""
    loaded = [
        (_address(path), word)
        for path in _pages()
        for word in path.read_text(encoding="utf-8").split()
        if word.startswith(('src="http', "src='http", 'src="//'))
    ]
    styles = [
        path.name for path in SITE.rglob("*.css") if "@import" in path.read_text() or "url(http" in path.read_text()
    ]
    assert (loaded, styles) == ([], [])


def test_search_finds_a_page(open_page):
    page = open_page("")
    page.locator(".md-search__input").click()
    page.keyboard.type("sliding window")
    first = page.locator(".md-search-result__link").first
    first.wait_for()
    results = page.locator(".md-search-result__item").all_inner_texts()
    assert any("window" in text.lower() for text in results), results
    with page.expect_navigation():
        first.click()
    assert "window" in page.locator(".md-content").inner_text().lower()


def test_the_colours_can_be_changed(open_page):
    page = open_page("concepts/")
    colour = "() => getComputedStyle(document.querySelector('figure.mask .seen')).fill"
    light = page.evaluate(colour)
    page.locator("label[title='Dark colours']").click()
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
    assert page.evaluate(colour) != light


def test_masks_are_drawn_with_words_for_those_who_do_not_see_them(open_page):
    page = open_page("concepts/")
    drawn = page.locator("figure.mask svg")
    said = [drawn.nth(number).get_attribute("aria-label") for number in range(drawn.count())]
    assert len(said) > 8
    assert all(words.startswith("The mask ") for words in said)
    assert page.locator("figure.mask").first.locator("rect.seen").count() == 36  # causal, eight queries


PAGES = {
    "kernelry": sorted({*kernelry.__all__} - {"__version__", "cache", "errors", "masks", "moba", "parallel"}),
    "kernelry.masks": kernelry.masks.__all__,
    "kernelry.cache": kernelry.cache.__all__,
    "kernelry.parallel": kernelry.parallel.__all__,
    "kernelry.models": kernelry.models.__all__,
    "kernelry.config": kernelry.config.__all__,
    "kernelry.flax": kernelry.flax.__all__,
    "kernelry.aot": kernelry.aot.__all__,
    "kernelry.plugin": kernelry.plugin.__all__,
    "kernelry.testing": kernelry.testing.__all__,
}
ERRORS = [name for name, found in vars(kernelry.errors).items() if isinstance(found, type) and name.endswith("Error")]


PAGES |= {"kernelry.errors": ERRORS, "kernelry.moba": ["select_blocks"], "kernelry.pictures": kernelry.pictures.__all__}
TOGETHER = ("kernelry", "kernelry.moba", "kernelry.pictures")
"""Modules of one page."""


@pytest.mark.parametrize("module", PAGES)
def test_every_public_name_is_in_the_reference(module):
    page = "kernelry" if module in TOGETHER else module.removeprefix("kernelry.")
    ids = _page(SITE / "reference" / page / "index.html").ids
    assert [name for name in PAGES[module] if f"{module}.{name}" not in ids] == []


def test_a_long_signature_has_a_line_for_each_parameter():
    page = (SITE / "reference" / "kernelry" / "index.html").read_text(encoding="utf-8")
    assert "attention(\n    query: " in html.unescape(re.sub("<[^>]+>", "", page))
