#!/usr/bin/env python3
"""Writes the numbers in README.md and docs/, and the figures, from benchmarks/results/.

    python benchmarks/tables.py              fill every block between <!-- table: NAME --> and <!-- end of table -->
    python benchmarks/tables.py --check      say which files would change, and fail if any
    python benchmarks/tables.py --figures    draw the figures anew, too

The tests run the check: no number in a block is typed by hand.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this file, also when it is imported

import features  # noqa: E402
import floor as floors  # noqa: E402
from report import mebibytes, number  # noqa: E402
from soca_report import TITLES, times_floor  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


# Results of a floor at the rate of torch's float32 GEMM, measured before floor.probes() knew that of tensor cores, and
# the result of the same day and GPU that has their rate.
TENSOR_CORES = {"soca_h200": "soca_h200_bfloat16", "soca_h200_more": "soca_h200_bfloat16"}


def load(name: str) -> dict[str, Any]:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    if name in TENSOR_CORES:
        rates = (entry["floor"]["gemm_flops_per_s"] for entry in load(TENSOR_CORES[name])["shapes"])
        at_rate(result, max(rates) / floors.SPLIT_PRODUCTS)
    return result


def at_rate(result: dict[str, Any], gemm_flops_per_s: float) -> None:
    """Puts the floors of forward + backward, and times over them, where this rate of products has them."""
    for entry in result["shapes"]:
        about = entry["floor"]
        work = floors.Work(about["forward_backward"]["flops"], about["forward_backward"]["bytes"])
        rates = about["gemm_flops_per_s"], max(about["gemm_flops_per_s"], gemm_flops_per_s)
        before, after = (floors.floor_ms(work, rate, about["copy_bytes_per_s"]) for rate in rates)
        about["gemm_flops_per_s"] = rates[1]
        for method in entry["methods"]:
            if method["ran"]:
                method["forward_backward"]["times_floor"] *= before / after


def markdown(heading: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (heading, ["---"] * len(heading), *rows)]


def where(result: dict[str, Any]) -> str:
    """One line: the machine, torch and commit that the numbers belong to."""
    machine, software = result["machine"], result["software"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    processor = (
        machine["gpu"]["name"] if machine["gpu"] else f"{threads} of {machine['cpu']} ({machine['cpu_capability']})"
    )
    commit = software["git"]["commit"][:12] if software["git"] else "no commit"
    return f"{processor}, torch {software['torch']}, commit {commit}, {result['date'][:10]}."


# ---- Speed


def _shape(entry: dict[str, Any]) -> str:
    return " x ".join(map(str, entry["shape"]))


def speed(name: str, others: tuple[str, ...]) -> list[str]:
    """Forward + backward: how many times as fast ours is, and its memory."""
    result = load(name)
    rows = []
    for entry in result["shapes"]:
        methods = {method["name"]: method for method in entry["methods"] if method["ran"]}
        ours = methods["ours"]
        faster = ours["forward_backward"]["speedup_over"]
        rows.append([_shape(entry), *(number(faster[other], 2) if other in faster else "-" for other in others)])
        rows[-1].append(number(times_floor(entry, ours["forward_backward"])))
        for key in ("peak_process_bytes", "kept_for_backward_bytes"):
            rows[-1].append(" / ".join(mebibytes(about["memory"][key]) for about in (ours, methods["eager"])))
    heading = ["B x C x H x W", *(TITLES.get(other, other) for other in others)]
    heading += ["time / floor", "peak MiB", "kept MiB"]
    others = max(entry["processor_time_of_others_percent"] or 0 for entry in result["shapes"])
    shared = f" Others took up to {others:.0f} % of the processors meanwhile." if others > 5 else ""
    return [*markdown(heading, rows), "", where(result) + shared]


def gpu_speed(*names: str) -> list[str]:
    """Forward + backward in us, and how many times as fast: calls against calls, the replay of a graph against one."""
    others = {"eig": "torch's eigh", "cupy": "CuPy's eigh", "eager": "eager", "compile": "torch.compile"}
    results = [load(name) for name in names]
    rows = []
    for result in results:
        for entry in result["shapes"]:
            methods = {method["name"]: method["forward_backward"] for method in entry["methods"] if method["ran"]}
            called, replayed = methods["ours"], methods["ours_graph"]
            rows.append([_shape(entry), f"{1e3 * called['median_ms']:.0f} ± {called['spread_percent']:.0f} %"])
            rows[-1] += [number(called["speedup_over"].get(other), 2) for other in others]
            rows[-1] += [f"{1e3 * replayed['median_ms']:.0f}", number(replayed["speedup_over"].get("graph"), 2)]
            if entry["dtype"] == "float32":  # floors were measured by the GEMM of x's own dtype
                rows[-1].append(number(times_floor(entry, replayed), 2))
    heading = ["B x C x H x W", "us, called", *others.values(), "us, replayed", "baddbmm replayed", "time / floor"]
    runs = [
        f"{len(result['shapes'])} shapes, {result['shapes'][0]['rounds']} rounds, load of the host "
        f"{result['machine']['load_average_at_start']:.1f}"
        for result in results
    ]
    return [*markdown(heading[: len(rows[0])], rows), "", f"{where(results[0])} Runs: {'; '.join(runs)}."]


def gpu_accuracy(*names: str) -> list[str]:
    """Errors against float64 of the same function, of the worst sample."""
    methods = ("ours", "eager", "baddbmm")
    results = [load(name) for name in names]
    rows = []
    for entry in (entry for result in results for entry in result["shapes"]):
        found = {method["name"]: method["accuracy"] for method in entry["methods"] if method["ran"]}
        rows.append([_shape(entry)])
        for of in ("value", "gradient"):
            rows[-1] += [number(max(about[of] for about in found[name].values()), 2) for name in methods]
    heading = ["B x C x H x W", *(f"{of}, {name}" for of in ("root", "gradient") for name in methods)]
    return [*markdown(heading, rows), "", where(results[0])]


def gpu_san(name: str) -> list[str]:
    """A training step of SAN with each way to compute the root."""
    result = load(name)
    rows = []
    for method in result["methods"]:
        if "training" not in method:
            continue
        training = method["training"]
        rows.append([method["name"], f"{training['median_ms']:.0f}", number(training["times_first"])])
        rows[-1] += [f"{training['covariance_percent']:.1f}", mebibytes(training["peak_torch_bytes"])]
    heading = ["root by", "ms a step", "times ours", "% in the covariance layers", "peak MiB"]
    return [*markdown(heading, rows), "", where(result)]


def minimax() -> list[str]:
    """Three minimax steps beside five as printed and EIG: time and distance to the exact root."""
    result = load("soca_cpu")
    rows = []
    for entry in result["shapes"]:
        methods = {method["name"]: method for method in entry["methods"] if method["ran"]}
        few = methods["minimax"]
        rows.append([_shape(entry)])
        rows[-1] += [number(few["forward_backward"]["speedup_over"][other], 2) for other in ("ours", "eig")]
        for method in ("minimax", "ours"):
            rows[-1].append(number(methods[method]["accuracy"]["photo"]["distance_to_exact_root"], 2))
    heading = ["B x C x H x W", "than 5 steps", "than EIG", "distance, 3 minimax steps", "distance, 5 as printed"]
    return [*markdown(heading, rows), "", where(result)]


def options(name: str) -> list[str]:
    """What each option costs: forward + backward in ms and beside the base."""
    result = load(name)
    rows = []
    for option in dict.fromkeys(name for entry in result["shapes"] for name in entry["options"]):
        rows.append([option])
        for entry in result["shapes"]:
            about = entry["options"].get(option, {}).get("forward_backward")
            rows[-1].append(f"{number(about['ms'])} ({number(about['faster'])})" if about else "-")
    heading = ["", *map(_shape, result["shapes"])]
    us = result["call_us"]
    calls = (
        f"A call that has next to nothing to do, of shape 1 x 4 x 4 x 4: {us['cov_sqrt']['forward']:.0f} us forward, "
        f"{us['cov_sqrt']['forward_backward']:.0f} us with its gradient; an empty operator with a gradient takes "
        f"{us['empty']['forward']:.0f} and {us['empty']['forward_backward']:.0f} us."
    )
    return [*markdown(heading, rows), "", calls, "", where(result)]


def parts(name: str) -> list[str]:
    """us of each operator that a call consists of."""
    result = load(name)
    found = [entry["parts"] for entry in result["shapes"]]
    rows = [[part, *(number(1e3 * of[part]["ms"]) if part in of else "-" for of in found)] for part in found[0]]
    return [*markdown(["us", *map(_shape, result["shapes"])], rows), "", where(result)]


# ---- Distance to the root

# What is shown: floor of the minimax coefficients (None: the paper's), and the steps.
SHOWN = ((None, 5), (1e-2, 3), (1e-3, 5), (None, 12), (1e-2, 7), (1e-3, 7))


def _title(floor: float | None) -> str:
    return "as printed" if floor is None else f"floor {floor:.0e}".replace("e-0", "e-")


def _distance(entry: dict[str, Any], floor: float | None, of: str, dtype: str) -> dict[int, float | None]:
    (curve,) = (c for c in entry["curves"] if (c["spectrum_floor"], c["of"], c["dtype"]) == (floor, of, dtype))
    return dict(zip(entry["steps"], curve["distance"], strict=True))


def _spectrum(entry: dict[str, Any]) -> str:
    _, channels, height, width = entry["shape"]
    return f"{features.TITLES[entry['input']]}, {channels} x {height * width}"


def accuracy(shown: Iterable[tuple[float | None, int]] = SHOWN) -> list[str]:
    result = load("accuracy")
    entries = result["spectra"]
    rows = [
        [f"{steps} steps, {_title(floor)}"]
        + [number(_distance(entry, floor, "kernels", "float64")[steps], 2) for entry in entries]
        for floor, steps in shown
    ]
    return [*markdown(["", *map(_spectrum, entries)], rows), "", where(result)]


def nearest(entry: dict[str, Any], floor: float | None, of: str) -> tuple[float, int]:
    """The least distance to the root in float32, and after how many steps."""
    return min((d, n) for n, d in _distance(entry, floor, of, "float32").items() if d is not None)


def steps() -> list[str]:
    result = load("accuracy")
    spectrum_floors = list(dict.fromkeys(curve["spectrum_floor"] for curve in result["spectra"][0]["curves"]))
    rows = []
    for of, title in (("kernels", "kernels"), ("reference", "plain loop")):
        for floor in spectrum_floors:
            found = (nearest(entry, floor, of) for entry in result["spectra"])
            rows.append([f"{title}, {_title(floor)}", *(f"{number(d, 2)} after {n}" for d, n in found)])
    return [*markdown(["", *map(_spectrum, result["spectra"])], rows), "", where(result)]


# ---- The drop-in


def classifier() -> list[str]:
    result = load("classifier")
    rows = [
        [f"{about['training_images']}", about["pooling"], f"{about['parameters']}", f"{about['rate']:g}"]
        + [f"{100 * about['mean']:.2f} ± {100 * about['deviation']:.2f}"]
        + [" ".join(f"{100 * value:.1f}" for value in about["accuracy"])]
        for about in result["runs"]
    ]
    heading = ["training images", "pooling", "parameters", "learning rate", "accuracy, %", "each seed"]
    return [*markdown(heading, rows), "", where(result)]


def published() -> list[str]:
    result = load("published")
    files = result["files"]

    def row(title: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [title, *(cell(about) for about in files)]

    def error(*keys: str) -> Callable[[dict[str, Any]], str]:
        def cell(about: dict[str, Any]) -> str:
            value = about["numbers"]
            for key in keys:
                value = value[key] if isinstance(value, dict) else value
            return value.partition(":")[0] if isinstance(value, str) else number(value, 2)

        return cell

    def finite(about: dict[str, Any]) -> str:
        return "finite" if all(about["numbers"]["constant_map"].values()) else "NaN"

    rows = [
        row("constant map: root and gradient", finite),
        row("`CovpoolLayer` in float64, error", error("covariance_float64")),
        row("`SqrtmLayer` in float64, error", error("float64", "value")),
        row("its gradient, upstream not symmetric", error("float32", "gradient")),
        row("its second derivative", error("second_derivative")),
        row("`SqrtmLayer(sigma, 1)`, gradient's norm", error("one_step")),
        row("both layers in a row, gradient's error", error("layers_gradient")),
        row("forward + backward, times ours", lambda about: number(about["cost"]["time"], 2)),
        row("peak memory, MiB", lambda about: mebibytes(about["cost"]["peak_torch_bytes"])),
        row("kept for the backward pass, MiB", lambda about: mebibytes(about["cost"]["kept_for_backward_bytes"])),
    ]
    names = ["", *(about["name"] for about in files)]
    return [*markdown(names, rows), "", where(result)]


# ---- The files

TABLES: dict[str, Callable[[], list[str]]] = {
    "soca": lambda: speed("soca_cpu", ("eig", "eig_gram", "eager", "baddbmm", "compile", "mxm", "pade")),
    "soca_avx2": lambda: speed("soca_cpu_avx2", ("eig", "eager", "baddbmm", "compile")),
    "soca_wide": lambda: speed("soca_cpu_wide", ("eig", "eig_gram", "eager", "baddbmm", "compile")),
    "gpu": lambda: gpu_speed("soca_h200", "soca_h200_more"),
    "gpu_accuracy": lambda: gpu_accuracy("soca_h200", "soca_h200_more"),
    "gpu_bfloat16": lambda: gpu_speed("soca_h200_bfloat16"),
    "gpu_san": lambda: gpu_san("san_h200"),
    "gpu_san_bfloat16": lambda: gpu_san("san_h200_bfloat16"),
    "gpu_options": lambda: options("options_h200"),
    "minimax": minimax,
    "options": lambda: options("options_cpu"),
    "parts": lambda: parts("options_cpu"),
    "accuracy": accuracy,
    "accuracy_short": lambda: accuracy(SHOWN[:3]),
    "nearest": steps,
    "classifier": classifier,
    "published": published,
}
# Results with a figure beside them, and what draws it.
FIGURES = {
    "soca_cpu": "soca_report",
    "soca_h200": "soca_report",
    "curves_cpu": "curves",
    "accuracy": "accuracy",
    "classifier": "classifier",
    "convergence_cpu": "convergence",
}
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(text: str) -> str:
    """``text`` with the blocks as the results have them."""

    def block(found: re.Match[str]) -> str:
        return found[1] + "\n" + "\n".join(TABLES[found[2]]()) + "\n\n" + found[3]

    return BLOCK.sub(block, text)


def files() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RESULTS.glob("*.md"))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--figures", action="store_true", help="draw all figures")
    arguments = parser.parse_args(argv)
    for name, module in FIGURES.items() if arguments.figures else ():
        importlib.import_module(module).plot(load(name), RESULTS / f"{name}.png")
    stale = [path for path in files() if filled(path.read_text()) != path.read_text()]
    for path in stale:
        print(path.relative_to(ROOT))
        if not arguments.check:
            path.write_text(filled(path.read_text()))
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
