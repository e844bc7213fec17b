"""`tools/dist.py` refuses what must not be released. What it builds is tested by tests/install/test_dist.py."""

import subprocess
import zipfile

import dist
import pytest


@pytest.fixture
def repository(tmp_path):
    """A repository of one commit, which ignores *.log."""
    folder = tmp_path / "repository"
    (folder / "core").mkdir(parents=True)
    (folder / "core" / "pyproject.toml").write_text("[project]\n")
    (folder / ".gitignore").write_text("*.log\n")
    git = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    for arguments in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "-m", "All")):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


def test_a_tree_as_it_was_committed_is_taken(repository):
    (repository / "ignored.log").touch()
    dist.refuse_changes(repository)


@pytest.mark.parametrize(("name", "status"), [("core/pyproject.toml", " M"), ("core/new.py", "??")])
def test_a_tree_with_changes_is_refused(repository, name, status):
    (repository / name).write_text("changed\n")
    with pytest.raises(dist.DistError, match=rf"not committed:\n{status.replace('?', '[?]')} {name}"):
        dist.refuse_changes(repository)


def test_an_export_has_what_was_committed_alone(repository, tmp_path):
    (repository / "core" / "ignored.log").touch()
    (repository / "core" / "pyproject.toml").write_text("changed\n")
    tree = dist.export(repository, tmp_path / "tree")
    assert [path.name for path in (tree / "core").iterdir()] == ["pyproject.toml"]
    assert (tree / "core" / "pyproject.toml").read_text() == "[project]\n"


def test_what_is_released_is_the_core_and_every_plugin():
    folders = dist.distributions(dist.ROOT)
    assert [path.name for path in folders] == ["core", *sorted(path.name for path in dist.ROOT.glob("plugins/*/"))]


@pytest.mark.parametrize("second", [{"a.whl": "1"}, {"a.whl": "1", "b.whl": "3"}])
def test_builds_that_differ_are_refused(second):
    with pytest.raises(dist.DistError, match=r"differ in b\.whl"):
        dist.refuse_differences({"a.whl": "1", "b.whl": "2"}, second)


def wheel(folder, *, version="0.1.0", licence=b"Apache", files=("a/__init__.py", "a/py.typed"), name="a"):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as opened:
        for path in files:
            opened.writestr(path, b"")
        if licence is not None:
            opened.writestr(f"{name}-{version}.dist-info/licenses/LICENSE", licence)


def test_wheels_of_one_version_with_licence_and_types_are_taken(tmp_path):
    wheel(tmp_path)
    wheel(tmp_path, name="b")
    dist.refuse_incomplete(tmp_path, b"Apache")


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"version": "0.2.0"}, r"not of one version: a-0\.1\.0-py3-none-any\.whl, b-0\.2\.0-py3-none-any\.whl"),
        ({"licence": None}, r"b-0\.1\.0.* lacks the repository's LICENSE"),
        ({"licence": b"MIT"}, r"b-0\.1\.0.* lacks the repository's LICENSE"),
        ({"files": ("a/__init__.py", "a/py.typed", "c/__init__.py")}, r"b-0\.1\.0.* lacks c/py\.typed"),
    ],
    ids=["version", "no licence", "another licence", "no types"],
)
def test_a_wheel_that_is_incomplete_or_of_another_version_is_refused(tmp_path, facts, told):
    wheel(tmp_path)
    wheel(tmp_path, name="b", **facts)
    with pytest.raises(dist.DistError, match=told):
        dist.refuse_incomplete(tmp_path, b"Apache")


def test_a_command_that_fails_says_what_it_wrote():
    with pytest.raises(dist.DistError, match=r"git nothing failed:\n.*is not a git command"):
        dist.run("git", "nothing")
