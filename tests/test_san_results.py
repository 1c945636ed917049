"""What evaluate and compare write: never over an input, whole, and before anything is printed."""

import io
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse", reason="san_model needs the extra [san]")
pytest.importorskip("png", reason="san_model needs the extra [san]")

from san import image, refused, run
from san_model import compare as comparing
from san_model import evaluate as evaluating
from san_model.images import Picture, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def hr(tmp_path):
    """A folder with one image, leaf.png."""
    write(tmp_path / "hr/leaf.png", Picture(image(40, 48)[0]))
    return tmp_path / "hr"


def test_an_input_is_not_overwritten(hr, tmp_path, capsys):
    lr = tmp_path / "lr"
    write(lr / "leaf_x2.png", Picture(torch.zeros(3, 20, 24)))
    (tmp_path / "link").symlink_to(lr)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/leaf_x2.png").hardlink_to(hr / "leaf.png")
    before = (lr / "leaf_x2.png").read_bytes()
    for arguments in (
        ["--bicubic", "--lr", lr, "--save", lr],
        ["--bicubic", "--lr", lr, "--save", tmp_path / "link"],
        ["--bicubic", "--save", tmp_path / "links"],
        ["--sr", lr, "--save", lr],
    ):
        said = refused(capsys, "evaluate", "--hr", hr, "--scale", 2, *arguments)
        assert f"--save {arguments[-1] / 'leaf_x2.png'}: would overwrite an input" in said
    assert (lr / "leaf_x2.png").read_bytes() == before


@pytest.mark.parametrize("flag", ["--json", "--csv", "--save", "--table", "--figure"])
def test_what_cannot_be_written_is_refused_before_the_work(hr, tmp_path, capsys, monkeypatch, flag):
    for module in (evaluating, comparing):
        monkeypatch.delattr(module, "measure")
    command = ["compare", "--methods", "bicubic"] if flag in ("--table", "--figure") else ["evaluate", "--bicubic"]
    command += ["--hr", hr, "--scale", 2]
    suffix = ".svg" if flag == "--figure" else ".md"
    (tmp_path / "file").touch()
    below = tmp_path / "file" / f"a{suffix}"
    assert f"{flag} {below}" in refused(capsys, *command, flag, below)
    if flag != "--save":
        folder = tmp_path / f"folder{suffix}"
        folder.mkdir()
        assert f"{flag} {folder}: a folder, expected a file" in refused(capsys, *command, flag, folder)


def test_results_are_there_before_anything_is_printed_and_whole(hr, tmp_path, monkeypatch):
    results = tmp_path / "results"
    links = {name: tmp_path / name for name in ("a.json", "a.csv", "a.md", "a.svg")}  # links stay
    for name, link in links.items():
        link.symlink_to(results / name)
    common = ["--hr", hr, "--scale", 2]
    measured = ["evaluate", *common, "--bicubic", "--json", links["a.json"], "--csv", links["a.csv"]]
    table, figure = (["compare", *common, "--methods", "bicubic"] for _ in range(2))
    table += ["--table", links["a.md"]]
    figure += ["--figure", links["a.svg"]]

    def closed(_):
        raise BrokenPipeError("the reader has gone")

    for module in (evaluating, comparing):
        monkeypatch.setattr(module, "show", closed)
    assert [run(*command) for command in (measured, table, figure)] == [2, 2, 0]
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    assert before.keys() == links.keys() and all(before.values()) and all(link.is_symlink() for link in links.values())

    def full(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: full(path))
    assert [run(*command) for command in (measured, table, figure)] == [2, 2, 2]
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_a_stream_is_written_to(hr, tmp_path):
    """And not replaced, as /dev/stdout would be."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert run("evaluate", "--hr", hr, "--scale", 2, "--bicubic", "--json", tmp_path / "pipe") == 0
    assert os.read(reader, 1000).startswith(b'{\n "bicubic x2 hr": {')
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_names_that_the_output_cannot_spell(hr, tmp_path, monkeypatch):
    (hr / "leaf.png").rename(hr / os.fsdecode(b"l\xe9af.png"))  # a name that is not UTF-8
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    common = ["--hr", hr, "--scale", 2]
    assert run("evaluate", *common, "--bicubic", "--name", "Größe", "--csv", tmp_path / "a.csv") == 0
    assert run("compare", *common, "--methods", "Größe=bicubic", "--table", tmp_path / "a.md") == 0
    assert printed.buffer.getvalue().count(rb"Gr\xf6\xdfe") == 2
    assert b"l\xe9af" in (tmp_path / "a.csv").read_bytes()
    assert "| Größe |" in (tmp_path / "a.md").read_text("utf-8")


def test_names_are_no_formulas_and_no_columns(hr, tmp_path):
    hr = hr.rename(tmp_path / r"$\frac|x")
    (hr / "leaf.png").rename(hr / "$_$.png")
    arguments = ["compare", "--hr", hr, "--scale", 2, "--methods", "a|b $^$=bicubic", os.fsdecode(b"\xe9=bicubic")]
    assert run(*arguments, "--figure", tmp_path / "a.svg", "--table", tmp_path / "a.md") == 0
    lines = (tmp_path / "a.md").read_text("utf-8", "surrogateescape").splitlines()
    assert lines[0] == r"| method | $\frac\|x PSNR | $\frac\|x SSIM |" and lines[2].startswith(r"| a\|b $^$ | **")
