"""Builds the wheel and the source archive of every released distribution, and checks them: `make dist`.

The core and the plugins are released; the workspace at the top of the repository only installs them. All are built from
a clean export of the last commit, so that what is not committed cannot get in, and twice: once with the wheel from the
source archive, as users of the archive do, and once with both from the tree. The same bytes must come out.

Needs git, and `build`, `hatchling`, `twine` and `check-wheel-contents` in the environment that runs it.
"""

import argparse
import concurrent.futures
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class DistError(Exception):
    """Something that must not be released."""


def distributions(tree: Path) -> list[Path]:
    """The folders of what is released: the core and every plugin."""
    return [tree / "core", *sorted(manifest.parent for manifest in tree.glob("plugins/*/pyproject.toml"))]


def run(*command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Runs a command, and returns what it wrote to stdout.

    Raises:
        DistError: it failed, with all that it wrote.
    """
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DistError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def refuse_changes(repository: Path) -> None:
    """Raises DistError where the tree is not what was committed."""
    changes = run("git", "status", "--porcelain", cwd=repository)
    if changes:
        raise DistError(f"the tree has changes that are not committed:\n{changes}Commit, stash or remove them first.")


def export(repository: Path, folder: Path) -> Path:
    """The files of the last commit, in a folder of their own."""
    folder.mkdir()
    archive = folder.with_suffix(".tar")
    run("git", "archive", "--output", archive, "HEAD", cwd=repository)
    shutil.unpack_archive(archive, folder, filter="data")
    return folder


def build(tree: Path, outdir: Path, commit_time: str, *formats: str) -> dict[str, str]:
    """Builds every distribution of a tree, and returns the SHA-256 of each file by its name.

    Args:
        tree: an export of the repository.
        outdir: where the files go.
        commit_time: seconds since 1970, written into the files as the time of everything in them.
        formats: of `build`; without any, the wheel is built from the source archive.
    """
    environ = {**os.environ, "SOURCE_DATE_EPOCH": commit_time}
    command = (sys.executable, "-m", "build", "--no-isolation", *formats, "--outdir", outdir)
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for done in [pool.submit(run, *command, folder, env=environ) for folder in distributions(tree)]:
            done.result()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(outdir.iterdir())}


def refuse_differences(first: Mapping[str, str], second: Mapping[str, str]) -> None:
    """Raises DistError where two builds of the same commit differ."""
    names = sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
    if names:
        raise DistError(f"two builds of the same commit differ in {', '.join(names)}")


def refuse_incomplete(built: Path, licence: bytes) -> None:
    """Raises DistError where versions differ, or where a wheel lacks the licence or a package of it its `py.typed`."""
    wheels = sorted(built.glob("*.whl"))
    versions = {wheel.name: wheel.name.split("-")[1] for wheel in wheels}
    if len(set(versions.values())) > 1:
        raise DistError(f"the distributions are not of one version: {', '.join(versions)}")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as opened:
            names = opened.namelist()
            texts = [opened.read(name) for name in names if name.endswith(".dist-info/licenses/LICENSE")]
        if texts != [licence]:
            raise DistError(f"{wheel.name} lacks the repository's LICENSE: copy it next to pyproject.toml.")
        packages = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
        for marker in sorted({f"{package}/py.typed" for package in packages} - set(names)):
            raise DistError(f"{wheel.name} lacks {marker}: add the empty file to the package.")


def check(tree: Path, built: Path) -> None:
    """Raises DistError where something is missing, or a wheel is not exactly the packages of its distribution."""
    refuse_incomplete(built, (tree / "LICENSE").read_bytes())
    run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *sorted(built.iterdir()))
    for folder in distributions(tree):
        name = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
        wheels = built.glob(f"{name.replace('-', '_')}-*.whl")
        # W009 is about a wheel of two packages: the core has one of pytest's, too.
        run(sys.executable, "-m", "check_wheel_contents", "--ignore", "W009", "--src-dir", folder / "src", *wheels)


def release(repository: Path, outdir: Path) -> dict[str, str]:
    """Builds and checks everything, and returns the SHA-256 of each file by its name.

    Raises:
        DistError: the tree has changes, two builds or versions differ, or a file does not pass its checks.
    """
    refuse_changes(repository)
    commit_time = run("git", "log", "-1", "--format=%ct", cwd=repository).strip()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        built, again = scratch / "built", scratch / "again"
        tree = export(repository, scratch / "first")
        hashes = build(tree, built, commit_time)
        second = build(export(repository, scratch / "second"), again, commit_time, "--sdist", "--wheel")
        refuse_differences(hashes, second)
        check(tree, built)
        shutil.rmtree(outdir, ignore_errors=True)
        shutil.copytree(built, outdir)
    return hashes


def main() -> int:
    """The command; its status is 1 where nothing was built."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--outdir", type=Path, default=ROOT / "dist", help="emptied first; dist by default")
    arguments = parser.parse_args()
    try:
        hashes = release(ROOT, arguments.outdir.resolve())
    except DistError as error:
        print(f"make dist: {error}", file=sys.stderr)
        return 1
    for name, digest in hashes.items():
        print(f"{digest}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
