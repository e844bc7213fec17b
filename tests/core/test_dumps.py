"""What libtpu and XLA have written is read as that of one program; nothing is compiled here."""

import importlib.util
import os
import tempfile

import pytest

from kernelry.aot import NoCompilerError, devices, dumps
from kernelry.aot.dumps import Dumps, dumps_for
from kernelry.request.target import Target

TPU, GPU = Target.parse("tpu:v5e"), Target.parse("gpu:h100")
BUNDLES, SLOTS = "03-final_bundles.txt", "01-final_hlo-static-per-bundle-utilization.txt"


def _write(folder, stamp, kernel, what, text):
    (folder / f"{stamp}-{kernel}-{what}").write_text(text)


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path, 11, "flash_fwd.1", BUNDLES, "first")
    _write(tmp_path, 11, "flash_fwd.1", SLOTS, "slots of the first")
    _write(tmp_path, 15, "flash_fwd.12", BUNDLES, "twelfth")
    _write(tmp_path, 14, "flash_fwd.3", BUNDLES, "third")
    _write(tmp_path, 12, "copy-done.4", BUNDLES, "a copy")
    _write(tmp_path, 12, "flash_fwd.1", "02-schedule-analysis_final_bundles.txt", "another report")
    (tmp_path / "11-TLP-hlo.txt").write_text("HloModule")
    return tmp_path


def _after(folder, own=True):
    """Dumps that were opened before the folder had files."""
    kept = {path: path.read_text() for path in folder.glob("*")}
    for path in kept:
        path.unlink()
    opened = Dumps(folder, {}, own=own)
    for path, text in kept.items():
        path.write_text(text)
    return opened


def test_schedules_are_found_by_the_kernels_name_in_the_order_of_its_numbers(folder):
    found = _after(folder).collect().schedules
    assert found["flash_fwd"] == (("first", "slots of the first"), ("third", None), ("twelfth", None))
    assert found["copy-done"] == (("a copy", None),)
    assert set(found) == {"flash_fwd", "copy-done"}


def test_what_was_read_is_deleted_and_not_read_again(folder):
    opened = _after(folder)
    opened.collect()
    assert list(folder.glob("*")) == []
    assert opened.collect().schedules == {}


def test_a_folder_of_the_users_keeps_its_files_and_each_is_read_once(folder, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--xla_other=1 --xla_jf_dump_to={folder}")
    before = sorted(folder.glob("*"))
    with dumps_for(TPU) as opened:
        assert opened.collect().schedules == {}  # from before
        _write(folder, 21, "flash_bwd", BUNDLES, "new")
        assert opened.collect().schedules == {"flash_bwd": (("new", None),)}
        assert opened.collect().schedules == {}
    assert sorted(folder.glob("*")) == sorted([*before, folder / f"21-flash_bwd-{BUNDLES}"])


def test_a_libtpu_that_was_loaded_before_writes_nothing_and_the_reason_is_said(monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    monkeypatch.setattr(dumps, "_is_loaded", lambda library: library == "libtpu")
    dumps._folder_of_libtpu.cache_clear()
    with dumps_for(TPU) as opened:
        missing = opened.collect().missing
    dumps._folder_of_libtpu.cache_clear()
    assert missing == (
        "libtpu was loaded before it was told to write its schedules, which it reads only then: "
        "ask in a new process, before anything is compiled for a TPU"
    )


def test_nothing_is_left_behind_where_there_is_no_compiler(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_other=1")
    dumps._folder_of_libtpu.cache_clear()
    devices._described_tpus.cache_clear()
    with pytest.raises(NoCompilerError), dumps_for(TPU):
        pass
    assert list(tmp_path.iterdir()) == []
    assert os.environ["LIBTPU_INIT_ARGS"] == "--xla_other=1"


LAUNCHES = "001: kCustomKernel [source] {name} grid: [4, 1, 1] threads: [128, 1, 1]  shared_memory: 64 bytes\n"
PTX = ".version 9.0\n.target sm_90a\n.visible .entry flash()\n.reqntid 128\n{ wgmma.mma_async.sync; }\n"


def test_xla_is_told_with_each_program_and_its_folder_is_deleted(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with dumps_for(GPU) as opened:
        folder = opened.folder
        assert opened.options == {"xla_dump_to": str(folder)}
        (folder / "module_0001.jit_f.thunk_sequence.txt").write_text(LAUNCHES.format(name="flash"))
        (folder / "module_0001.jit_f.3.ptx").write_text(PTX)
        [found] = opened.collect().listed
        assert (found.launch.kernel, found.ptx.products) == ("flash", (("wgmma", 1),))
        assert opened.collect().listed == ()
    assert not folder.exists()


def test_a_folder_that_xla_flags_name_is_read_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path} --xla_gpu_autotune_level=0")
    (tmp_path / "module_0001.jit_before.thunk_sequence.txt").write_text(LAUNCHES.format(name="before"))
    with dumps_for(GPU) as opened:
        assert opened.options == {}
        (tmp_path / "module_0002.jit_f.thunk_sequence.txt").write_text(LAUNCHES.format(name="flash"))
        assert [found.launch.kernel for found in opened.collect().listed] == ["flash"]
        assert opened.collect().listed == ()
    assert len(list(tmp_path.glob("*"))) == 2
