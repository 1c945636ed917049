#!/usr/bin/env python3
"""isqrt_cov.mpncov against the files that it stands in for: where they agree, and where the published ones are wrong.

    git clone https://github.com/jiangtaoxie/fast-MPN-COV; git clone https://github.com/daitao/SAN
    python benchmarks/published.py --fast-mpn-cov fast-MPN-COV/src/representation/MPNCOV.py \\
        --san SAN/TrainCode/model/MPNCOV/python/MPNCOV.py --json result.json

Each file is run as it is, on the same numbers as the drop-in; errors are relative to isqrt_cov.reference in float64 and
its gradients by autograd. Times are of rounds in turn, and their ratios medians over the rounds.
"""

import argparse
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this file, also when it is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import features  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
from isqrt_cov import mpncov, reference  # noqa: E402

ITERATIONS = 5
SAMPLE_MS = 20.0
EXPLANATION = {
    "float32, float64": "relative Frobenius error of the root of a covariance in this dtype, value and gradient; an "
    "upstream gradient that is not symmetric",
    "covariance_float64": "the same of the covariance in float64",
    "transposed_gradient": "the gradient's error against the transpose of the true one",
    "second_derivative": "error of the gradient of the gradient, float32",
    "layers_gradient": "error of the gradient of covariance and root in a row, with respect to x, float32",
    "constant_map": "whether the root of a constant map and its gradient are finite",
    "time": "time of the file over that of the drop-in, forward + backward of covariance and root",
    "peak_torch_bytes": "most memory held at once in forward + backward beyond x and the upstream gradient",
    "kept_for_backward_bytes": "memory that the graph holds after the forward, beyond x",
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_" + hashlib.sha256(str(path).encode()).hexdigest(), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layers(of: ModuleType, x: Tensor) -> Tensor:
    return of.SqrtmLayer(of.CovpoolLayer(x), ITERATIONS)


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def attempt(call: Callable[[], Any]) -> Any:
    """The result, or what was raised."""
    try:
        return call()
    except Exception as raised:  # whatever the file does
        return f"{type(raised).__name__}: {str(raised).splitlines()[0]}"


def _root(sigma: Tensor) -> Tensor:
    """Eqs. 1-3 of all entries of sigma, as the files define it: the gradient is not made symmetric."""
    trace = sigma.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return trace.sqrt() * reference.newton_schulz(sigma / trace, ITERATIONS)[0]


def numbers(of: ModuleType) -> dict[str, Any]:
    """Errors of value and gradients, and what happens to a constant map."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 7, 7, dtype=torch.float64) + 1
    sigma = reference.covariance_pool(x).requires_grad_()
    upstream, direction = torch.randn(2, *sigma.shape, dtype=torch.float64)
    direction = direction + direction.mT
    symmetric = of is mpncov  # ours is the gradient of the symmetric part of sigma
    root = reference.matrix_sqrt if symmetric else _root
    (gradient,) = torch.autograd.grad(root(sigma), sigma, upstream, create_graph=True)
    (second,) = torch.autograd.grad(gradient, sigma, direction)

    def first_order(dtype: torch.dtype) -> dict[str, float]:
        own = sigma.detach().to(dtype).requires_grad_()
        y = of.SqrtmLayer(own, ITERATIONS)
        (g,) = torch.autograd.grad(y, own, upstream.to(dtype))
        expected = gradient.detach()
        about = {"value": error(y, root(sigma).detach()), "gradient": error(g, expected)}
        return about | {"transposed_gradient": error(g, expected.mT)}

    def second_order() -> float:
        own = sigma.detach().float().requires_grad_()
        y = of.SqrtmLayer(own, ITERATIONS)
        (g,) = torch.autograd.grad(y, own, upstream.float(), create_graph=True)
        (h,) = torch.autograd.grad(g, own, direction.float())
        return error(h + h.mT, second + second.mT)

    def through_both() -> float:
        own, exact = (x.detach().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
        (g,) = torch.autograd.grad(layers(of, own), own, upstream.float())
        (expected,) = torch.autograd.grad(reference.cov_sqrt(exact, ITERATIONS), exact, upstream)
        return error(g, expected)

    def one_step() -> float:
        own = sigma.detach().float().requires_grad_()
        of.SqrtmLayer(own, 1).sum().backward()
        return own.grad.norm().item()

    def constant() -> dict[str, bool]:
        own = torch.full((1, 16, 7, 7), 0.7, requires_grad=True)
        y = layers(of, own)
        y.sum().backward()
        return {"value_finite": y.isfinite().all().item(), "gradient_finite": own.grad.isfinite().all().item()}

    return {
        "float32": attempt(lambda: first_order(torch.float32)),
        "float64": attempt(lambda: first_order(torch.float64)),
        "covariance_float64": attempt(lambda: error(of.CovpoolLayer(x), reference.covariance_pool(x))),
        "second_derivative": attempt(second_order),
        "layers_gradient": attempt(through_both),
        "one_step": attempt(one_step),
        "constant_map": attempt(constant),
        "triangle": attempt(lambda: of.TriuvecLayer(torch.arange(9.0).reshape(1, 3, 3)).flatten().tolist()),
    }


def cost(files: dict[str, ModuleType], shape: features.Shape, rounds: int, progress: report.Progress) -> dict[str, Any]:
    """Memory of each file and its time over the drop-in's, forward + backward."""
    x = features.feature_maps("randn", shape, torch.float32, "cpu").requires_grad_()
    upstream = torch.randn(shape[0], shape[1], shape[1])

    def step(of: ModuleType) -> None:
        layers(of, x).backward(upstream)
        x.grad = None

    progress.update(f"{rounds} rounds")
    calls = {name: partial(step, of) for name, of in files.items()}
    samples = measure.interleaved_ms(calls, rounds, x.device, SAMPLE_MS)
    return {
        name: {
            "samples_ms": samples[name],
            "time": measure.median_ratio(samples[name], samples["isqrt_cov.mpncov"]),
            "peak_torch_bytes": measure.peak_torch_memory(calls[name], x.device),
            "kept_for_backward_bytes": measure.kept_for_backward(lambda x, of=of: layers(of, x), x),
        }
        for name, of in files.items()
    }


def text(result: dict[str, Any]) -> str:
    rows = [["", *(about["name"] for about in result["files"])]]

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
        return report.number(value, 2) if isinstance(value, float) else str(value)

    for key in result["files"][0]["numbers"]:
        rows.append([key, *(shown(about["numbers"][key]) for about in result["files"])])
    rows.append(["time / drop-in", *(report.number(about["cost"]["time"]) for about in result["files"])])
    for key in ("peak_torch_bytes", "kept_for_backward_bytes"):
        rows.append([key[:-6] + ", MiB", *(report.mebibytes(about["cost"][key]) for about in result["files"])])
    return "\n\n".join(
        "\n  ".join(f"{head}: {cell}" for head, cell in zip(rows[0], row, strict=True)) for row in rows[1:]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--fast-mpn-cov", "--san"):
        parser.add_argument(option, type=Path, metavar="FILE", help="MPNCOV.py of that project")
    parser.add_argument("--rounds", type=report.positive, default=7, metavar="N", help="default: 7")
    parser.add_argument("--json", type=report.writable, metavar="FILE", help="write everything measured")
    arguments = parser.parse_args(argv)
    for option, path in (("--fast-mpn-cov", arguments.fast_mpn_cov), ("--san", arguments.san)):
        if path and not path.is_file():
            parser.error(f"argument {option}: no file {path}")
    paths = {"fast-MPN-COV": arguments.fast_mpn_cov, "SAN": arguments.san}
    shape, json = (16, 64, 48, 48), arguments.json
    arguments = argparse.Namespace(device="cpu", rounds=arguments.rounds)  # of paths on this machine nothing is said
    result = report.record("published", arguments, EXPLANATION) | {"shape": list(shape)}
    files = {"isqrt_cov.mpncov": mpncov} | {name: load(path) for name, path in paths.items() if path}
    progress = report.Progress()
    costs = cost(files, shape, arguments.rounds, progress)
    progress.clear()
    result["files"] = [
        {
            "name": name,
            "sha256": hashlib.sha256(Path(of.__file__).read_bytes()).hexdigest(),
            "numbers": numbers(of),
            "cost": costs[name],
        }
        for name, of in files.items()
    ]
    print(text(result))
    if json:
        report.write_json(json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
