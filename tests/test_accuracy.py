"""The distances to the exact root are what they are said to be, and the figure is drawn from the record."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import accuracy


def test_distance_of_a_known_spectrum(monkeypatch):
    # Two uncorrelated channels of equal variance: A = I / 2, and each step maps s to s (3 - s^2) / 2.
    monkeypatch.setattr(accuracy, "STEPS", (1, 2, 6))
    x = torch.tensor([[[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]]], dtype=torch.float64)
    s, expected = 0.5**0.5, {}
    for n in range(1, 7):
        s = s * (3 - s * s) / 2
        expected[n] = 1 - s
    for of in ("kernels", "reference"):
        assert accuracy.distances(of, x, None) == pytest.approx([expected[n] for n in (1, 2, 6)], abs=1e-14)


@pytest.mark.parametrize("floor", (None, 1e-2))
def test_kernels_and_reference_agree(floor):
    x = torch.randn(2, 8, 40, dtype=torch.float64)
    torch.testing.assert_close(accuracy.root("kernels", x, 3, floor), accuracy.root("reference", x, 3, floor))


def test_run_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "SPECTRA", {"tiny": ("randn", (2, 6, 4, 4))})
    record, figure = tmp_path / "result.json", tmp_path / "result.png"
    assert accuracy.main(["--json", str(record), "--plot", str(figure)]) == 0
    (entry,) = json.loads(record.read_text())["spectra"]
    assert entry["steps"] == list(accuracy.STEPS) and entry["rank"] == 6
    assert len(entry["curves"]) == len(accuracy.VARIANTS) * (1 + len(accuracy.FLOORS))
    assert entry["smallest"] < 1 / 6
    assert "as printed, kernels, float64" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
