"""The curves of cost and nearness, the Pade approximant that they compare with, and what each option costs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import curves
import methods
import options
import pade
from common import CUDA_ENGINES, missing_cuda


@pytest.mark.parametrize("order", (1, 2, 5))
def test_pade_agrees_with_the_series_of_the_root(order):
    p, q = map(np.polynomial.Polynomial, pade.coefficients(order))
    # sqrt(1 - z): c_0 = 1, c_k = c_{k-1} (k - 3/2) / k. The approximant's first 2 n + 1 terms are the same.
    series = np.cumprod([1, *((k - 1.5) / k for k in range(1, 2 * order + 1))])
    difference = (np.polynomial.Polynomial(series) * q - p).coef[: 2 * order + 1]
    assert np.abs(difference).max() < 1e-12


def test_pade_root_and_its_gradient():
    a = torch.randn(3, 8, 30, dtype=torch.float64)
    a = (a @ a.mT / 30).requires_grad_()
    root = pade.pade_sqrt(a, order=12, iterations=20)
    values, vectors = torch.linalg.eigh(a)
    exact = (vectors * values.sqrt()[:, None]) @ vectors.mT
    assert torch.allclose(root, exact, atol=1e-6)
    upstream = torch.randn_like(root)
    (grad,) = torch.autograd.grad(root, a, upstream)
    (expected,) = torch.autograd.grad(exact, a, (upstream + upstream.mT) / 2)
    assert torch.allclose(grad, expected, atol=1e-4 * float(expected.abs().max()))


def test_curves(tmp_path, capsys):
    outputs = tmp_path / "curves.json", tmp_path / "curves.png"
    assert curves.main(["--quick", "--rounds", "1", "--json", str(outputs[0]), "--plot", str(outputs[1])]) == 0
    result = json.loads(outputs[0].read_text())
    assert set(result["cost"]) == {"B", "C", "M", "N"}
    for curve in result["cost"].values():
        assert all(ms > 0 for name in ("ours", "eager", "eig", "floor") for ms in curve[name])
    (entry,) = result["nearness"]
    distance = {name: dict(zip(c["steps"], c["distance"], strict=True)) for name, c in entry["curves"].items()}
    assert abs(distance["ours"][5] - distance["eager"][5]) < 1e-4
    assert distance["minimax"][5] < distance["ours"][5]
    assert "distance to the exact root" in capsys.readouterr().out
    assert outputs[1].stat().st_size > 10_000


@pytest.mark.cuda
def test_parts_of_a_batch_in_streams_are_the_whole():
    if reason := missing_cuda():
        pytest.skip(reason)
    x = torch.randn(5, 160, 6, 6, device="cuda")
    case = methods.make_case(x, 5, "matrix")
    whole = methods.of_function(case, options.function_of(options.Option(), tuple(x.shape), x.device))
    function = options.in_streams(options.function_of(options.Option(), tuple(x.shape), x.device), 2)
    parts = methods.capture(case, methods.of_function(case, function))
    for mine, theirs in zip(parts.step(), whole.step(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_options_that_do_not_run_are_named(tmp_path, capsys, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("an illegal instruction")

    path = tmp_path / "options.json"
    shape = ["--shape", "2x16x8x8", "--rounds", "1", "--json", str(path)]
    monkeypatch.setattr(options, "function_of", fails)
    assert options.main(shape) == 0
    (entry,) = json.loads(path.read_text())["shapes"]
    assert entry["options"] == {} and entry["left_out"]["base"] == "an illegal instruction" and entry["parts"]
    with pytest.raises(SystemExit):
        options.parse(["--only", "magic"])
    assert "--only 'magic', --without None: none is left of base, " in capsys.readouterr().err


def test_shapes_before_an_interrupt_are_kept(tmp_path, monkeypatch):
    def interrupted(arguments, shape, progress):
        if shape == (2, 32, 3, 3):
            raise KeyboardInterrupt
        return measured(arguments, shape, progress)

    measured, path = options.run_shape, tmp_path / "options.json"
    monkeypatch.setattr(options, "run_shape", interrupted)
    with pytest.raises(KeyboardInterrupt):
        options.main(["--shape", "2x16x8x8", "2x32x3x3", "--only", "triu", "--rounds", "1", "--json", str(path)])
    (entry,) = json.loads(path.read_text())["shapes"]
    assert set(entry["options"]) == {"base", 'output "triu"'}


def test_options(tmp_path, capsys):
    path = tmp_path / "options.json"
    threads = torch.get_num_threads()
    assert options.main(["--shape", "2x16x8x8", "2x32x3x3", "2x16x3x3", "--rounds", "2", "--json", str(path)]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads(path.read_text())
    usual = {
        name for name, option in options.OPTIONS.items() if option.engine not in CUDA_ENGINES and option.streams == 1
    }
    channels, positions = (f"matrices of the {side}" for side in ("channels", "positions"))
    # As many positions as channels at least; fewer ones, of which plan() takes the matrices; and of which it does not.
    for entry, others in zip(result["shapes"], ({channels, positions}, {positions}, {channels}), strict=True):
        assert set(entry["options"]) == usual - others
        for about in entry["options"].values():
            assert all(about[block]["ms"] > 0 and len(about[block]["samples_ms"]) == 2 for block in options.BLOCKS)
        assert entry["options"]["base"]["forward"]["faster"] == 1
        assert list(entry["parts"]) == ["pooling", "root", "gradient of the root", "gradient of pooling"]
        assert all(part["ms"] > 0 and len(part["samples_ms"]) == 2 for part in entry["parts"].values())
    assert [entry["shape"] for entry in result["shapes"]] == [[2, 16, 8, 8], [2, 32, 3, 3], [2, 16, 3, 3]]
    assert all(us > 0 for of in ("cov_sqrt", "empty") for us in result["call_us"][of].values())
    assert "times as fast" in capsys.readouterr().out
