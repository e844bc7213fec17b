"""The built site over a local server, and pages of it in a headless Chromium that may not use the network."""

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest

SITE = Path(__file__).parents[2] / "build" / "docs"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ALONE = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
"""Arguments of Chromium: nothing that talks to other hosts by itself."""


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.docs)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def site():
    """The address of the site that `make docs` built, without a slash at its end."""
    assert (SITE / "index.html").exists(), f"{SITE} is missing: run `make docs` first"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=SITE)) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, by playwright."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    assert path, f"no browser: install one of {', '.join(CHROMIUM)}"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=[*ALONE])
        yield launched
        launched.close()


@pytest.fixture
def open_page(site, browser):
    """`open_page("masks/", width=390)` opens a page; errors and requests to other hosts fail the test at its end."""
    wrong, opened = [], []

    def opening(path, *, width=1280, height=900):
        page = browser.new_page(viewport={"width": width, "height": height})
        opened.append(page)
        watch(page, site, wrong)
        page.goto(f"{site}/{path.lstrip('/')}", wait_until="load")
        return page

    yield opening
    for page in opened:
        page.close()
    assert wrong == []


def watch(page, site, wrong):
    """Adds to `wrong` what a page logs as an error, raises, fails to load, or asks of another host."""
    page.on("console", lambda said: wrong.append(f"{page.url}: {said.text}") if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on("response", lambda got: wrong.append(f"{page.url}: {got.status} {got.url}") if got.status >= 400 else None)
    page.on("request", lambda asked: wrong.append(f"{page.url} asks {asked.url}") if _is_foreign(asked, site) else None)


def _is_foreign(request, site):
    return not request.url.startswith((f"{site}/", "data:", "blob:"))
