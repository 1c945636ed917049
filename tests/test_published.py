"""What is said of a published file is found by running it: a file with known faults is found out."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import published
from isqrt_cov import mpncov

FAULTY = """
import torch
from isqrt_cov import reference

CovpoolLayer = reference.mxm_covariance_pool

class Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sigma, iterations):
        with torch.enable_grad():
            ctx.sigma = sigma.detach().requires_grad_()
            trace = ctx.sigma.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
            ctx.y = trace.sqrt() * reference.newton_schulz(ctx.sigma / trace, iterations)[0]
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad):
        (grad,) = torch.autograd.grad(ctx.y, ctx.sigma, grad)
        return grad.mT, None

def SqrtmLayer(var, iterN):
    return Root.apply(var, iterN)

def TriuvecLayer(var):
    raise TypeError("not in this Python")
"""


def test_the_drop_in_has_no_fault():
    about = published.numbers(mpncov)
    assert max(about["float32"].values()) < 1e-5 and max(about["float64"].values()) < 1e-13
    assert about["covariance_float64"] < 1e-14
    assert about["second_derivative"] < 1e-5 and about["layers_gradient"] < 1e-5
    assert all(about["constant_map"].values())
    assert about["triangle"] == [0, 1, 2, 4, 5, 8]


def test_faults_are_found(tmp_path):
    file = tmp_path / "faulty.py"
    file.write_text(FAULTY)
    about = published.numbers(published.load(file))
    assert about["float64"]["value"] < 1e-13
    assert about["float64"]["gradient"] > 0.1 and about["float64"]["transposed_gradient"] < 1e-13
    assert about["layers_gradient"] < 1e-5  # the covariance's gradient makes it symmetric
    assert isinstance(about["second_derivative"], str)  # what was raised
    assert not about["constant_map"]["value_finite"] and not about["constant_map"]["gradient_finite"]
    assert about["triangle"] == "TypeError: not in this Python"


def test_cost(monkeypatch):
    progress = published.report.Progress()
    about = published.cost({"isqrt_cov.mpncov": mpncov}, (2, 4, 6, 6), 2, progress)["isqrt_cov.mpncov"]
    assert about["time"] == 1 and len(about["samples_ms"]) == 2
    assert about["peak_torch_bytes"] > 0 and about["kept_for_backward_bytes"] > 0


@pytest.mark.parametrize("value", ("0", "few"))
def test_wrong_arguments_are_named(value, capsys):
    with pytest.raises(SystemExit):
        published.main(["--rounds", value])
    assert "--rounds" in capsys.readouterr().err
