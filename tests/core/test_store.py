"""The file of times: found, read without a lock, written by several processes, killed, damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import importlib_metadata
import pytest

import kernelry
from kernelry import Request
from kernelry.errors import ConfigError
from kernelry.policy import policy
from kernelry.policy.measurements import Entry
from kernelry.policy.policy import Switches
from kernelry.policy.store import FORMAT, Store, versions_here, versions_of

pytestmark = pytest.mark.xdist_group("test_store")

REQUEST = Request(q_len=512, q_heads=4)


def entry(number, kernel="blockwise"):
    return Entry.of(REQUEST, kernel, 1e-3 * (number + 1), tiling=(("block_q", number + 1),), time=f"2026-{number:04}")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "folder" / "times.json")


def test_what_is_added_is_read_again(store):
    assert store.read() == ()
    store.add([entry(1)])
    store.add([entry(2), entry(1)])
    assert set(store.read()) == {entry(1), entry(2)}
    assert json.loads(store.path.read_text())["format"] == FORMAT
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["times.json", "times.json.lock"]


WRITE = """
import sys
sys.path.insert(0, {tests!r})
from core.test_store import entry
from kernelry.policy.store import Store
store = Store({path!r})
print("ready", flush=True)
sys.stdin.readline()
for number in range({first}, {last}):
    store.add([entry(number)])
    print(number, flush=True)
"""


def writer(store, first, last):
    """A process that adds one entry after another, and prints the number of each when it is stored."""
    code = WRITE.format(tests=str(Path(__file__).parents[1]), path=str(store.path), first=first, last=last)
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = subprocess.Popen(
        [sys.executable, "-c", code], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout.readline() == "ready\n"
    return started


def test_two_processes_and_a_reader_at_once_lose_and_corrupt_nothing(store):
    with writer(store, 0, 15) as one, writer(store, 15, 30) as other:
        for each in (one, other):
            each.stdin.write("go\n")
            each.stdin.flush()
        seen = [0]
        while None in (one.poll(), other.poll()):
            count = len(store.read())  # raises where the file is not whole
            assert count >= seen[-1], "an entry was lost"
            seen.append(count)
    assert (one.returncode, other.returncode) == (0, 0)
    assert set(store.read()) == {entry(number) for number in range(30)}
    assert len(set(seen)) > 3, "the reader saw no file in between"


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.03])
def test_a_writer_that_is_killed_leaves_all_that_it_had_stored(store, delay):
    with writer(store, 0, 100_000) as killed:
        killed.stdin.write("go\n")
        killed.stdin.flush()
        for _ in range(5):
            killed.stdout.readline()
        time.sleep(delay)
        killed.send_signal(signal.SIGKILL)
        told = 5 + len(killed.stdout.read().splitlines())
    assert killed.returncode == -signal.SIGKILL
    found = set(store.read())
    assert {entry(number) for number in range(told)} <= found <= {entry(number) for number in range(told + 1)}
    store.add([entry(200_000)])  # the lock went with the process, and what it left over is removed
    assert set(store.read()) == found | {entry(200_000)}
    assert [path.name for path in store.path.parent.iterdir() if path.suffix == ".tmp"] == []


def test_a_reader_does_not_wait_for_a_writer(store):
    filelock = pytest.importorskip("filelock")
    store.add([entry(1)])
    with filelock.FileLock(f"{store.path}.lock"):
        found = []
        reader = threading.Thread(target=lambda: found.append(store.usable()))
        reader.start()
        reader.join(5)
    assert found[0].entries == (entry(1),)


def test_a_writer_that_waits_too_long_says_for_what(store, monkeypatch):
    filelock = pytest.importorskip("filelock")
    monkeypatch.setattr("kernelry.policy.store._PATIENCE", 0.01)
    store.add([])
    with (
        filelock.FileLock(f"{store.path}.lock"),
        pytest.raises(ConfigError, match=r"another process has held .*times\.json\.lock"),
    ):
        store.add([entry(1)])


DAMAGED = {
    "cut off": '{"format": 1, "entries": [{"device": "cpu"',
    "empty": "",
    "of another program": "[1, 2]",
    "of a later format": '{"format": 2, "entries": []}',
    "without entries": '{"format": 1}',
    "entry without a kernel": '{"format": 1, "entries": [{}]}',
    "a time that is not one": json.dumps({"format": 1, "entries": [{**entry(1).to_json(), "seconds": -1}]}),
    "a time that is too large": json.dumps({"format": 1, "entries": [{**entry(1).to_json(), "seconds": 10**400}]}),
    "a tiling that is a list": json.dumps({"format": 1, "entries": [{**entry(1).to_json(), "tiling": [1]}]}),
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_file_is_not_used_and_set_aside_by_the_next_writer(store, caplog, text):
    store.path.parent.mkdir()
    store.path.write_text(text)
    assert store.usable() is None
    assert "no measured times are used" in caplog.text
    assert store.path.read_text() == text, "a reader changes nothing"
    with pytest.raises(ConfigError, match=r"times\.json is not a file of times that can be read"):
        store.read()
    with pytest.warns(UserWarning, match=r"it is now times\.json\.damaged-1, and a new one was begun"):
        store.add([entry(1)])
    assert store.read() == (entry(1),)
    assert (store.path.parent / "times.json.damaged-1").read_text() == text


def test_a_second_damaged_file_does_not_replace_the_first(store):
    store.path.parent.mkdir()
    for text in ("one", "two"):
        store.path.write_text(text)
        with pytest.warns(UserWarning, match="damaged-"):
            store.add([])
    assert [(store.path.parent / f"times.json.damaged-{n}").read_text() for n in (1, 2)] == ["one", "two"]


def test_bytes_that_are_not_text_are_damage(store):
    store.path.parent.mkdir()
    store.path.write_bytes(b"\xff\xfe\x00")
    assert store.usable() is None


def test_a_folder_or_a_file_that_may_not_be_read_is_not_used(store, monkeypatch):
    store.path.mkdir(parents=True)
    assert store.usable() is None
    monkeypatch.setattr(
        Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert store.usable() is None


def test_a_place_that_cannot_be_written_says_what_to_set(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write the times to .*; set KERNELRY_MEASUREMENTS"):
        Store(tmp_path / "file" / "times.json").add([entry(1)])


@pytest.mark.parametrize("name", [".", "/", "fifo", "folder", "device"])
def test_what_is_not_a_file_is_neither_replaced_nor_renamed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to(os.devnull)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"cannot write the times to .*: it is not a file; set KERNELRY_MEASUREMENTS"):
        Store(name).add([entry(1)])
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert Path(os.devnull).is_char_device()


def test_a_link_to_the_file_stays_one(store, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(store.path)
    Store(link).add([entry(1)])
    store.add([entry(2)])
    assert link.is_symlink()
    assert set(Store(link).read()) == set(store.read()) == {entry(1), entry(2)}
    assert list(tmp_path.glob("*.lock")) == [], "both names have one lock"


def test_a_file_keeps_its_permissions_and_a_new_one_has_those_of_new_files(store, tmp_path):
    (tmp_path / "new").touch()
    store.add([entry(1)])
    assert store.path.stat().st_mode == (tmp_path / "new").stat().st_mode
    for mode in (0o664, 0o600):
        store.path.chmod(mode)
        store.add([entry(2)])
        assert store.path.stat().st_mode & 0o777 == mode


def test_a_file_that_must_not_be_set_aside_stays_as_it_is(store):
    store.path.parent.mkdir()
    store.path.write_text("[attention]")
    with pytest.raises(ConfigError, match=r"times\.json is not a file of times .* and it stays as it is: name another"):
        store.add([entry(1)], set_aside=False)
    assert store.path.read_text() == "[attention]"


def test_what_fails_while_it_is_written_leaves_the_old_file(store, monkeypatch):
    store.add([entry(1)])
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="No space left on device"):
        store.add([entry(2)])
    assert store.read() == (entry(1),)
    assert [path.name for path in store.path.parent.iterdir() if path.suffix == ".tmp"] == []


# Where it is


@pytest.fixture
def process(monkeypatch):
    """Puts environment variables in force, as if the process had been started with them."""

    def put(**variables):
        switches = Switches.parse(variables)
        monkeypatch.setattr(policy, "_of_process", lambda: switches)
        policy.measurements_of_process.cache_clear()

    yield put
    policy.measurements_of_process.cache_clear()


def test_calls_use_the_times_of_the_file_that_the_variable_names(store, process):
    alone = Request(q_len=513, q_heads=4)
    process(KERNELRY_MEASUREMENTS="")
    assert kernelry.explain(alone).kernel == "dot_product"
    store.add([Entry.of(alone, "blockwise", 1e-3, versions=versions_of("cpu", _distribution()))])
    process(KERNELRY_MEASUREMENTS=str(store.path))
    assert kernelry.explain(alone).rule == "measured on cpu: blockwise 1 ms"
    assert kernelry.resolve(alone).kernel == "blockwise"


def _distribution():
    return next(kernel.distribution for kernel in kernelry.kernels() if kernel.name == "blockwise")


def test_the_file_is_looked_for_once_and_read_once(store, process, monkeypatch):
    store.add([entry(1)])
    process(KERNELRY_MEASUREMENTS=str(store.path))
    looked = []
    monkeypatch.setattr(policy.os.path, "exists", lambda path: looked.append(path) or False)
    for q_len in range(3001, 3006):
        kernelry.explain(Request(q_len=q_len), changes=False)
    assert looked == [str(store.path)]


@pytest.mark.parametrize("value", ["", None])
def test_an_empty_variable_means_none_and_tune_says_so(process, value):
    process(**({} if value is None else {"KERNELRY_MEASUREMENTS": value}))
    if value is None:
        assert policy.Switches.unchecked().measurements is None
        return
    assert policy.measurements_of_process() is None
    with pytest.raises(ConfigError, match="KERNELRY_MEASUREMENTS is empty"):
        Store.of_process()


def test_without_a_home_directory_there_are_no_times_and_tune_says_so(process, monkeypatch):
    def homeless(name):
        raise RuntimeError("could not determine the home directory for '~/.cache'")

    monkeypatch.setattr("platformdirs.user_cache_path", homeless)
    process()
    assert policy.measurements_of_process() is None
    with pytest.raises(ConfigError, match=r"no home directory, .*: set KERNELRY_MEASUREMENTS to the path of a file"):
        Store.of_process()


DEFAULT = """
import sys
import kernelry
before = set(sys.modules)
resolution = kernelry.explain(kernelry.Request(q_len=512, q_heads=4), changes=False)
print(resolution.kernel)
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] in ("platformdirs", "filelock")))
print("kernelry.policy.store" in sys.modules)
"""


def test_by_default_the_file_is_in_the_users_cache_directory(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "KERNELRY_MEASUREMENTS"}
    environ |= {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def run(code):
        command = [sys.executable, "-W", "error", "-c", code]
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.split("\n")

    [path, _] = run("from kernelry.policy.store import Store; print(Store.of_process().path)")
    assert Path(path).is_relative_to(tmp_path)
    assert Path(path).name == f"measurements-{FORMAT}.json"
    kernel, imported, with_store, _ = run(DEFAULT)
    assert (kernel, with_store) == ("dot_product", "False"), "without a file nothing is imported to read it"
    assert "filelock" not in imported
    versions = versions_of("cpu", _distribution())
    Store(path).add([Entry.of(REQUEST, "blockwise", 1e-3, versions=versions)])
    assert run(DEFAULT)[0] == "blockwise"


def test_versions_name_what_times_depend_on():
    here = dict(versions_here())
    of_cpu = dict(versions_of("cpu", "some-kernels 1.2"))
    assert of_cpu == {name: here[name] for name in ("jax", "jaxlib", "kernelry", "processor")} | {"some-kernels": "1.2"}
    assert "processor" not in dict(versions_of("tpu:v5e", "some-kernels 1.2"))
    assert here["processor"].endswith(" cores")


def install(folder, name, version, *requires):
    """Puts the metadata of a distribution into a folder, in place of those of another version."""
    for before in folder.glob(f"{name.replace('-', '_')}-*.dist-info"):
        shutil.rmtree(before)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {name}",
        f"Version: {version}",
        *map("Requires-Dist: {}".format, requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n\n")
    os.utime(folder, ns=(time.time_ns(), time.time_ns()))
    importlib_metadata.MetadataPathFinder.invalidate_caches()


@pytest.fixture
def vendor(tmp_path, monkeypatch):
    """Installs some-kernels, which need a vendor by an extra, and returns a function that installs that vendor."""
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "some-linter", "5")
    install(tmp_path, "some-kernels", "1.2", *SOME_REQUIRE)
    yield lambda version: install(tmp_path, "some-vendor", version)
    importlib_metadata.MetadataPathFinder.invalidate_caches()


SOME_REQUIRE = (
    "jax<0.13,>=0.10",
    "Some.Vendor[core_cu13,jax]!=2.12.*,>=2.11; python_version >= '3' and extra == 'vendor'",
    "missing-vendor; extra == 'other'",
    "some-linter>=1; extra == 'dev'",
    "some-kernels[vendor]; extra == 'all'",
)


def test_versions_name_what_the_kernels_distribution_requires(vendor):
    assert "some-vendor" not in dict(versions_of("tpu:v5e", "some-kernels 1.2"))
    vendor("2.14")
    here = dict(versions_here())
    wanted = {name: here[name] for name in ("jax", "jaxlib", "kernelry", "libtpu") if name in here}
    assert dict(versions_of("tpu:v5e", "some-kernels 1.2")) == wanted | {"some-kernels": "1.2", "some-vendor": "2.14"}


def test_times_of_another_version_of_the_vendor_are_not_used(vendor, store):
    vendor("2.14")
    timed = Entry.of(REQUEST, "some", 1e-3, versions=versions_of("cpu", "some-kernels 1.2"))
    store.add([timed])
    assert store.usable().why_not(timed, "some-kernels 1.2") is None
    vendor("2.15")
    why = "measured with some-vendor 2.14, this is 2.15: not used; run kernelry tune"
    assert store.usable().why_not(timed, "some-kernels 1.2") == why
    for kernel in kernelry.kernels():  # each plugin's metadata can be read
        assert kernel.distribution.split(" ")[0] in dict(versions_of("cpu", kernel.distribution))


def test_names_that_no_distribution_can_have_and_damaged_ones_are_taken_as_they_are(vendor, store, tmp_path):
    vendor("2.14")
    (tmp_path / "some_vendor-2.14.dist-info" / "METADATA").unlink()
    assert "some-vendor" not in dict(versions_of("cpu", "some-kernels 1.2"))
    names = ("", "../x y", "some-kernels", "some-vendor")
    timed = Entry.of(REQUEST, "some", 1e-3, versions=tuple((name, "1.2") for name in names))
    store.add([timed])
    assert store.usable().why_not(timed, "some-kernels 1.2") is None
