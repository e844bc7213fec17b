"""The picture of a report that was made up."""

import builtins

import pytest
from device_reports import kernel, report, timed
from on_device import picture
from on_device.peers import CUDNN, MHA

PROGRAMS = {
    "fast": kernel("fast", 1.0),
    "auto": kernel("fast", 1.0),
    MHA: timed("peer", 3.0),
    CUDNN: timed("peer", 1.5),
}


def test_a_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    cells = {("causal_8k", "forward"): PROGRAMS, ("mla_192_128_4k", "forward"): {"fast": kernel("fast", 2.0)}}
    assert picture.draw(report(cells), tmp_path / "made-up.png") is None
    assert (tmp_path / "made-up.png").read_bytes().startswith(b"\x89PNG")


def test_no_times_no_picture(tmp_path):
    assert picture.draw(report({}), tmp_path / "none.png") == "no picture: nothing was timed"
    wrong = {("causal_8k", "forward"): {"wrong": kernel("wrong", 1.0, wrong=True)}}
    assert "nothing was timed" in picture.draw(report(wrong), tmp_path / "none.png")


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *arguments, **others):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", absent)
    said = picture.draw(report({("causal_8k", "forward"): PROGRAMS}), tmp_path / "none.png")
    assert "kernelry[plot]" in said
    assert not (tmp_path / "none.png").exists()
