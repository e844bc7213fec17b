"""A shelf of plugins behind real entry points, for the tests of the registry."""

import itertools
import os
import subprocess
import sys
import textwrap

import importlib_metadata
import pytest

import kernelry
from kernelry.registry import discovery, installed

_HEALTHY = """
    import dataclasses
    from kernelry.plugin import hookimpl
    from kernelry_dot_product.plugin import DOT_PRODUCT

    contract = (1, 1)

    @hookimpl
    def kernelry_kernels():
        return [dataclasses.replace(DOT_PRODUCT, name="{kernel}")]
"""


class Shelf:
    """A folder on sys.path into which distributions are put."""

    def __init__(self, folder):
        self.folder = folder
        self.projects = set()

    def put(self, project, source, *, name=None):
        """Adds distribution `project` 1.0 with a module of the same name, registered as plugin `name`."""
        info = self.folder / f"{project}-1.0.dist-info"
        info.mkdir()
        (self.folder / f"{project}.py").write_text(textwrap.dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{discovery.GROUP}]\n{name or project} = {project}\n")
        self.projects.add(project)
        return info

    def put_kernel(self, project, kernel, *, name=None, extra=""):
        """Adds a distribution with one kernel that works, and `extra` source."""
        return self.put(project, textwrap.dedent(_HEALTHY).format(kernel=kernel) + textwrap.dedent(extra), name=name)

    def put_hook(self, project, hook, body):
        """Adds a distribution with one hook, e.g. `kernelry_rank(request, candidates)`."""
        head = "from kernelry.plugin import hookimpl\ncontract = (1, 1)\n\n@hookimpl\n"
        return self.put(project, f"{head}def {hook}:\n    {body}\n")

    def points(self):
        found = importlib_metadata.entry_points(group=discovery.GROUP)
        return [point for point in found if point.dist.name in self.projects]

    def build(self, allowed=None):
        return discovery.build(self.points(), allowed)

    def run(self, code, **variables):
        """Runs code in a fresh process that has this folder on its path."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("KERNELRY_", "PYTHON"))} | {
            "KERNELRY_MEASUREMENTS": ""
        }
        environ |= {"PYTHONPATH": str(self.folder), "JAX_PLATFORMS": "cpu", **variables}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(
            command, env=environ, cwd=self.folder, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done


@pytest.fixture(scope="session")
def make_shelf(tmp_path_factory):
    """Makes shelves for processes of their own: nothing of them can be imported here."""

    def make():
        shelf = Shelf(tmp_path_factory.mktemp("shelf"))
        shelf.put_kernel("healthy", "healthy_kernel")
        return shelf

    return make


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))  # invalidates the caches of the import system
    shelf = Shelf(tmp_path)
    shelf.put_kernel("healthy", "healthy_kernel")
    yield shelf
    for project in shelf.projects:
        sys.modules.pop(project, None)


_lengths = itertools.count(1001)


@pytest.fixture
def install(shelf, monkeypatch):
    """Puts what is on the shelf in place of what is installed."""

    def put(allowed=None):
        found = shelf.build(allowed)
        monkeypatch.setattr(installed, "registry", lambda: found)
        return found

    return put


@pytest.fixture
def fresh_request():
    """A Request that nobody asked before, so that no resolution of it is cached."""
    return kernelry.Request(q_len=next(_lengths))
