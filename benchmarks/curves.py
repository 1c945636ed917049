#!/usr/bin/env python3
"""How the time grows with batch, channels, positions and steps, and what nearness to the exact root it buys.

    python benchmarks/curves.py                                           all curves, minutes
    python benchmarks/curves.py --quick --json result.json --plot result.png

Cost: forward + backward where one size changes and the others stay, against the floor of bench_soca, which grows as the
arithmetic needed does. Nearness: time against the distance to the exact root, for each number of steps. Methods take
turns in every round; times are medians over the rounds.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this file, also when it is imported

import torch  # noqa: E402

import features  # noqa: E402
import floor  # noqa: E402
import measure  # noqa: E402
import methods  # noqa: E402
import report  # noqa: E402
import soca_report  # noqa: E402

BASE = {"B": 4, "C": 64, "M": 24 * 24, "N": 5}
SWEEPS = {
    "cpu": {"B": (1, 2, 4, 8, 16, 32), "C": (16, 32, 64, 128, 256, 512), "M": (64, 256, 1024, 4096), "N": (1, 2, 4, 8)},
    "cuda": {
        "B": (1, 4, 16, 64, 256),
        "C": (16, 32, 64, 128, 256, 512, 1024),
        "M": (64, 256, 1024, 4096, 16384, 65536),
        "N": (1, 2, 4, 8),
    },
}
QUICK = {"B": (1, 4), "C": (16, 64), "M": (64, 256), "N": (1, 4)}
COST_METHODS = ("ours", "eager", "eig")
NEARNESS_SHAPES = {"cpu": ((16, 64, 48, 48), (32, 256, 14, 14)), "cuda": ((16, 64, 48, 48), (32, 256, 14, 14))}
STEPS = range(1, 10)
SAMPLE_MS = 5.0
MEANING = {
    "cost": "ms of forward + backward, the median over the rounds, for each value of the size that changes; "
    "floor: the time of that work at the rates measured in the same rounds",
    "nearness": "ms of forward + backward and the relative Frobenius distance of the value to the exact root, on "
    "feature maps of photographs",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--rounds", type=report.positive, default=9, metavar="N", help="default: 9")
    add("--quick", action="store_true", help="two values of each size, one small shape")
    add("--json", type=report.writable, metavar="FILE", help="write the medians and distances")
    add("--plot", type=report.writable, metavar="FILE", help="draw it (PNG, or what the name's ending says)")
    return report.parse(parser, argv)


def cost(arguments, progress) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each size, {"values": [...], method: ms for each value, "floor": ms}."""
    device = torch.device(arguments.device)
    sweeps = QUICK if arguments.quick else SWEEPS[arguments.device]
    for size, values in sweeps.items():
        curve: dict[str, Any] = {"values": list(values), "floor": [], **{name: [] for name in COST_METHODS}}
        for value in values:
            progress.update(f"cost, {size} = {value}")
            at = BASE | {size: value}
            shape = (at["B"], at["C"], 1, at["M"])
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
            case = methods.make_case(x, at["N"], "matrix")
            probes = floor.probes(x, arguments.quick)
            calls = {name: methods.prepare(name, case).step for name in COST_METHODS}
            calls |= {probe.name: probe.call for kind in probes.values() for probe in kind}
            samples = measure.interleaved_ms(calls, arguments.rounds, device, SAMPLE_MS)
            for name in COST_METHODS:
                curve[name].append(statistics.median(samples[name]))
            _, work = floor.work(shape, at["N"], "matrix", x.itemsize)
            rates = (floor.best_rates(probes[kind], samples) for kind in ("gemm", "copy"))
            curve["floor"].append(statistics.median(floor.floor_ms(work, *each) for each in zip(*rates, strict=True)))
        yield size, curve


def nearness(arguments, progress) -> Iterator[dict[str, Any]]:
    """For each shape, {method: {"steps", "ms", "distance"}}; methods without steps have one point."""
    device = torch.device(arguments.device)
    shapes = ((2, 32, 16, 16),) if arguments.quick else NEARNESS_SHAPES[arguments.device]
    library = methods.load_library()
    for shape in shapes:
        x = features.feature_maps("photo", shape, torch.float32, device)
        case = methods.make_case(x, 5, "matrix")
        exact = methods.exact_root(case, case.x.detach().double())
        prepared = {(name, 0): methods.prepare(name, case) for name in ("eig", "pade")}
        for n in STEPS[:: 4 if arguments.quick else 1]:
            stepped = methods.Case(case.x, case.upstream, n, "matrix")
            prepared["ours", n] = methods.prepare("ours", stepped)
            prepared["eager", n] = methods.prepare("eager", stepped)
            tuned = partial(library.cov_sqrt, iterations=n, coefficients="minimax", spectrum_floor=1e-3)
            prepared["minimax", n] = methods.of_function(case, tuned)
        progress.update(f"nearness at {'x'.join(map(str, shape))}")
        calls = {f"{name} {n}": method.step for (name, n), method in prepared.items()}
        samples = measure.interleaved_ms(calls, arguments.rounds, device, SAMPLE_MS)
        curves: dict[str, Any] = {}
        for (name, n), method in prepared.items():
            curve = curves.setdefault(name, {"steps": [], "ms": [], "distance": []})
            curve["steps"].append(n)
            curve["ms"].append(statistics.median(samples[f"{name} {n}"]))
            curve["distance"].append(measure.relative_error(method.forward(), exact))
        yield {"shape": list(shape), "curves": curves}


# ---- Output


def text(result: dict[str, Any]) -> str:
    lines = []
    for size, curve in result["cost"].items():
        rows = [[f"{size} =", *map(str, curve["values"])]]
        rows += [[name, *map(report.number, curve[name])] for name in (*COST_METHODS, "floor")]
        lines += ["", f"ms of forward + backward as {size} changes", report.table(rows)]
    for entry in result["nearness"]:
        rows = [["method", "steps", "ms", "distance to the exact root"]]
        for name, curve in entry["curves"].items():
            for n, ms, distance in zip(curve["steps"], curve["ms"], curve["distance"], strict=True):
                rows.append([name, str(n or "-"), report.number(ms), report.number(distance)])
        lines += ["", "x".join(map(str, entry["shape"])), report.table(rows)]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    columns = max(len(result["cost"]), len(result["nearness"]))
    figure, axes = plt.subplots(2, columns, figsize=(4 * columns, 7.5), layout="constrained")
    names = {"B": "batch B", "C": "channels C", "M": "positions M", "N": "steps N"}
    for axis, (size, curve) in zip(axes[0], result["cost"].items(), strict=False):
        for name in COST_METHODS:
            axis.loglog(curve["values"], curve[name], "o-", color=soca_report.COLOURS[name], label=name, markersize=4)
        axis.loglog(curve["values"], curve["floor"], "k--", linewidth=1, label="floor")
        axis.set_xlabel(names[size])
        axis.set_ylabel("forward + backward, ms")
    axes[0][0].legend(frameon=False)
    for axis, entry in zip(axes[1], result["nearness"], strict=False):
        for name, curve in entry["curves"].items():
            axis.loglog(curve["ms"], curve["distance"], "o-", color=soca_report.COLOURS[name], label=name, markersize=4)
        axis.set_xlabel("forward + backward, ms")
        axis.set_ylabel("distance to the exact root")
        axis.set_title("x".join(map(str, entry["shape"])), fontsize=10)
        axis.legend(frameon=False)
    for axis in axes[1][len(result["nearness"]) :]:
        axis.set_visible(False)
    for axis in axes.flat:
        for direction in (axis.xaxis, axis.yaxis):
            direction.set_major_locator(LogLocator(subs=(1, 2, 5)))
            direction.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            direction.set_minor_formatter(NullFormatter())
        axis.grid(linewidth=0.4, alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    result = report.record("curves", arguments, MEANING) | {"cost": {}, "nearness": []}
    progress = report.Progress()

    def keep() -> None:  # what was measured is not lost with what comes next
        if arguments.json:
            report.write_json(arguments.json, result)

    try:
        for size, curve in cost(arguments, progress):
            result["cost"][size] = curve
            keep()
        for entry in nearness(arguments, progress):
            result["nearness"].append(entry)
            keep()
    except features.PhotographsMissing as error:
        progress.clear()
        print(f"curves.py: {error}", file=sys.stderr)
        return 2
    progress.clear()
    print(text(result))
    if arguments.plot:
        plot(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
