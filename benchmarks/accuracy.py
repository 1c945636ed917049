#!/usr/bin/env python3
"""How near N steps come to the exact root: the paper's coefficients and the minimax ones, on real and made spectra.

    python benchmarks/accuracy.py                                        the table, in a minute
    python benchmarks/accuracy.py --json result.json --plot result.png

The root is isqrt_cov.cov_sqrt; the exact one an eigen-decomposition in float64 of the covariance of the same numbers.
What N steps lack is measured in float64; float32 is run as well, and further, to show where rounding takes over, and
beside it isqrt_cov.reference, the plain loop in full products.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this file, also when it is imported

import torch  # noqa: E402

import features  # noqa: E402
import methods  # noqa: E402
import report  # noqa: E402

# What the maps are, and their shape: M above C and below it.
SPECTRA = {
    "photo-64": ("photo", (4, 64, 48, 48)),
    "flat-64": ("randn", (4, 64, 48, 48)),
    "decay-64": ("decay", (4, 64, 48, 48)),
    "photo-256": ("photo", (4, 256, 14, 14)),
    "flat-256": ("randn", (4, 256, 14, 14)),
    "decay-256": ("decay", (4, 256, 28, 28)),
}
FLOORS = (1e-2, 1e-3, 1e-4)  # of the minimax coefficients; None stands for the paper's
STEPS = (*range(1, 17), 20, 24, 28, 32)
VARIANTS = (("kernels", torch.float64), ("kernels", torch.float32), ("reference", torch.float32))
EXPLANATION = {
    "distance": "relative Frobenius distance of the root to the exact one, the mean over the samples, for each number "
    "of steps; null where it is not finite",
    "smallest": "the smallest eigenvalue of the covariance over its trace, and ``rank`` the number of those above "
    "1e-12; the means over the samples",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--spectra", nargs="+", choices=tuple(SPECTRA), default=list(SPECTRA), metavar="NAME", help="default: all")
    add("--json", type=report.writable, metavar="FILE", help="write everything measured")
    add("--plot", type=report.writable, metavar="FILE", help="draw it (PNG, or what the name's ending says)")
    return report.parse(parser, argv)


def root(of: str, x: torch.Tensor, iterations: int, floor: float | None) -> torch.Tensor:
    if of == "kernels":
        options = {} if floor is None else {"coefficients": "minimax", "spectrum_floor": floor}
        return methods.load_library().cov_sqrt(x, iterations, **options)
    reference = methods.reference
    step = reference.PAPER_STEP if floor is None else reference.minimax_steps(iterations, floor)
    return reference.cov_sqrt(x, iterations, step=step)


def distances(of: str, x: torch.Tensor, floor: float | None) -> list[float]:
    """Of the roots after ``STEPS`` steps in the dtype of ``x``, from the exact one."""
    exact = methods.reference.exact_sqrt(methods.reference.covariance_pool(x.double()))
    errors = ((root(of, x, n, floor).double() - exact).flatten(1).norm(dim=1) for n in STEPS)
    return [(error / exact.flatten(1).norm(dim=1)).mean().item() for error in errors]


def run(name: str) -> dict[str, Any]:
    kind, shape = SPECTRA[name]
    x = features.feature_maps(kind, shape, torch.float64, "cpu")
    values = torch.linalg.eigvalsh(methods.reference.covariance_pool(x))
    values = values / values.sum(1, keepdim=True)
    curves = [
        {
            "coefficients": "newton_schulz" if floor is None else "minimax",
            "spectrum_floor": floor,
            "of": of,
            "dtype": str(dtype).removeprefix("torch."),
            "distance": distances(of, x.to(dtype), floor),
        }
        for of, dtype in VARIANTS
        for floor in (None, *FLOORS)
    ]
    return {
        "name": name,
        "input": kind,
        "shape": list(shape),
        "smallest": values[:, 0].mean().item(),
        "rank": (values > 1e-12).sum(1).double().mean().item(),
        "steps": list(STEPS),
        "curves": curves,
    }


# ---- What is said


def label(curve: dict[str, Any]) -> str:
    floor = curve["spectrum_floor"]
    return "as printed" if floor is None else f"minimax, floor {floor:.0e}".replace("e-0", "e-")


def text(entry: dict[str, Any]) -> str:
    shown = [n for n in entry["steps"] if n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)]
    rows = [[f"{entry['name']}: distance after N =", *map(str, shown)]]
    for curve in entry["curves"]:
        at = dict(zip(entry["steps"], curve["distance"], strict=True))
        rows.append([f"{label(curve)}, {curve['of']}, {curve['dtype']}", *(report.number(at[n], 2) for n in shown)])
    return report.table(rows)


COLOURS = {None: "#6b7280", 1e-2: "#f59e0b", 1e-3: "#c2410c", 1e-4: "#7c2d12"}


def plot(result: dict[str, Any], path: str | Path) -> None:
    """For each spectrum the distance over the steps, float64; float32 dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = result["spectra"]
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3.4 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, entry in zip(axes.flat, entries, strict=False):
        for curve in (curve for curve in entry["curves"] if curve["of"] == "kernels"):
            double = curve["dtype"] == "float64"
            points = [(n, d) for n, d in zip(entry["steps"], curve["distance"], strict=True) if n <= 12]
            axis.plot(
                *zip(*points, strict=True),
                color=COLOURS[curve["spectrum_floor"]],
                linestyle="-" if double else (0, (1, 1.5)),
                linewidth=1.6 if double else 1.2,
                marker="o" if double else None,
                markersize=3,
                label=label(curve) if double else None,
            )
        batch, channels, height, width = entry["shape"]
        axis.set_title(
            f"{features.TITLES[entry['input']]}, {channels} x {height * width}, rank {entry['rank']:.0f}",
            loc="left",
            fontsize=10,
        )
        axis.set_yscale("log")
        axis.set_ylim(1e-7, 2)
        axis.set_xticks(range(1, 13))
        axis.grid(linewidth=0.4, alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("steps N")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative distance to the root")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"Distance of N steps to the exact root; dotted: float32\ntorch {result['software']['torch']}; "
        f"{result['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    result = report.record("accuracy", arguments, EXPLANATION) | {"spectra": []}
    progress = report.Progress()
    for name in arguments.spectra:
        progress.stage(name)
        result["spectra"].append(run(name))
        progress.clear()
        print(text(result["spectra"][-1]) + "\n", flush=True)
    if arguments.json:
        report.write_json(arguments.json, result)
    if arguments.plot:
        plot(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
