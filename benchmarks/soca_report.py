"""Tables and the figure of bench_soca, from the dictionary that it writes as JSON."""

import textwrap
from pathlib import Path
from typing import Any

import torch

import floor
from report import mebibytes, number, table

EXPLANATION = {
    "forward": "time of inference in ms: median over the rounds; nothing is recorded for a gradient",
    "forward_backward": "time of forward and backward in ms, with a fresh gradient: median over the rounds",
    "spread": "half the distance between the quartiles of forward + backward, in % of the median",
    "speedup": "time of the other over time of this method, the median of the ratios of each round: over 1 "
    "is faster. On a GPU those named graph are replayed, without any Python; the others are called from Python, and "
    "torch.compile may replay graphs of its own within such a call",
    "floor": "time of N steps at torch's own rates, whatever a method computes: max(flops needed / GEMM rate, bytes "
    "needed / copy rate), the best rates of each round; x is in cache where it fits, as it is for the methods",
    "times_floor": "time over the floor, the median of the ratios of each round",
    "peak_memory_torch": "most memory held at once in forward + backward beyond x and the upstream gradient, in "
    "torch's allocator (output and dX included; scratch of extensions and BLAS not seen)",
    "peak_memory_process": "the same of a fresh process, all memory that was touched (CPU on Linux), +- 1 MiB",
    "kept_for_backward": "memory that the autograd graph holds after the forward, beyond x",
    "page_faults": "pages handed out by the kernel in one forward + backward",
    "accuracy": "relative Frobenius error of the worst sample. value, gradient: against float64 of the function that "
    "the method computes, N steps or (EIG) the exact root with its clamp; root: distance of the value from the exact "
    "root without a clamp",
}


def title(entry: dict[str, Any]) -> str:
    shape = "x".join(map(str, entry["shape"]))
    return f"{shape}, {entry['dtype']}, N = {entry['iterations']}, output {entry['output']!r}"


def _ran(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [method for method in entry["methods"] if method["ran"]]


def timing_table(entry: dict[str, Any]) -> str:
    rows = [
        ["", "forward", "x", "vs", "fwd+bwd", "+-", "x", "vs", "vs", "peak MiB", "peak MiB", "kept", "page"],
        ["", "ms", "floor", "EIG", "ms", "%", "floor", "EIG", "eager", "torch", "process", "MiB", "faults"],
    ]
    for method in _ran(entry):
        forward, step, memory = method["forward"], method["forward_backward"], method["memory"]
        rows.append(
            [
                method["name"],
                number(forward["median_ms"]),
                number(forward["times_floor"]),
                number(forward["speedup_over"].get("eig")),
                number(step["median_ms"]),
                number(step["spread_percent"], 2),
                number(step["times_floor"]),
                number(step["speedup_over"].get("eig")),
                number(step["speedup_over"].get("eager")),
                mebibytes(memory["peak_torch_bytes"]),
                mebibytes(memory["peak_process_bytes"]),
                mebibytes(memory["kept_for_backward_bytes"]),
                "-" if memory["page_faults"] is None else str(memory["page_faults"]),
            ]
        )
    return table(rows, headings=2)


def accuracy_table(entry: dict[str, Any]) -> str:
    inputs = entry["inputs"]
    rows = [[""] + [cell for kind in inputs for cell in (f"[{kind}", "", "]")]]
    rows.append([""] + ["value", "gradient", "root"] * len(inputs))
    for method in _ran(entry):
        row = [method["name"]]
        for kind in inputs:
            errors = method["accuracy"].get(kind) or {}
            row += [number(errors.get(key), 2) for key in ("value", "gradient", "distance_to_exact_root")]
        rows.append(row)
    return table(rows, headings=2)


def floor_line(entry: dict[str, Any]) -> str:
    floor = entry["floor"]
    parts = []
    for name, key in (("forward", "forward"), ("forward + backward", "forward_backward")):
        one = floor[key]
        work = f"{number(one['flops'] / 1e9)} Gflop, {number(one['bytes'] / 1e6)} MB"
        parts.append(f"{name} {number(one['ms'])} ms ({work}; bound by {one['bound_by']})")
    gemm = f"{number(floor['gemm_flops_per_s'] / 1e9)} Gflop/s (product {floor['gemm_fastest']})"
    copy = f"{number(floor['copy_bytes_per_s'] / 1e9)} GB/s (copy of {floor['copy_fastest']})"
    return f"floor: {'; '.join(parts)}\n       at {gemm} and {copy}"


REPLAYED = ("graph", "ours_graph")  # methods of nothing but a CUDA graph


def ours_lines(entry: dict[str, Any]) -> list[str]:
    """How many times as fast ours is: as it is called against calls, as a CUDA graph against graphs."""
    lines = []
    for method in _ran(entry):
        ours = method["name"]
        if ours not in ("ours", "ours_graph"):
            continue
        faster = method["forward_backward"]["speedup_over"].items()
        alike = ((name, value) for name, value in faster if (name in REPLAYED) == (ours in REPLAYED) and name != ours)
        if others := [f"{number(value)} x {name}" for name, value in alike]:
            lines.append(f"{ours}, forward + backward, in times as fast: " + ", ".join(others))
    return lines


def text(entry: dict[str, Any]) -> str:
    """All that is said about one shape."""
    lines = [f"\n== {title(entry)}, timed on {entry['inputs'][0]!r}, {entry['rounds']} rounds", floor_line(entry)]
    others = entry["processor_time_of_others_percent"]
    if others and others > 5:
        lines.append(f"Others took {others:.0f} % of the processors in these rounds: ratios may hold, times do not.")
    lines.append("")
    if _ran(entry):
        lines += [timing_table(entry), "", accuracy_table(entry), ""]
    lines += ours_lines(entry)
    for method in entry["methods"]:
        if not method["ran"]:
            lines.append(f"{method['name']} did not run: {method['reason']}")
            continue
        if method["detail"]:
            lines.append(f"{method['name']}: {method['detail']}")
        lines += [f"{method['name']}: {key}: {reason}" for key, reason in method["not_measured"].items()]
        failed = ((kind, errors["failed"]) for kind, errors in method["accuracy"].items() if "failed" in errors)
        lines += [f"{method['name']}: accuracy on {kind}: {reason}" for kind, reason in failed]
    return "\n".join(lines)


def explanation() -> str:
    entries = (f"{name.replace('_', ' ')}: {meaning}" for name, meaning in EXPLANATION.items())
    return "\n".join(textwrap.fill(entry, 118, initial_indent="  ", subsequent_indent="      ") for entry in entries)


# ---- Figure

COLOURS = {
    "ours": "#c2410c",
    "ours_graph": "#7f1d1d",
    "minimax": "#f59e0b",
    "eig": "#6b7280",
    "eig_gram": "#d1d5db",
    "eager": "#93c5fd",
    "baddbmm": "#3b82f6",
    "compile": "#1e3a8a",
    "graph": "#0f766e",
    "mxm": "#a8a29e",
    "pade": "#7c3aed",
    "matrix_sqrth": "#a16207",
    "cupy": "#4d7c0f",
}


# Where they are not said by the names that they are asked for by.
TITLES = {
    "ours_graph": "ours, replayed",
    "minimax": "3 minimax steps",
    "eig": "EIG",
    "eig_gram": "EIG of positions",
    "compile": "torch.compile",
    "graph": "baddbmm, replayed",
    "mxm": "published M x M",
    "pade": "Padé",
    "cupy": "CuPy's EIG",
}


def times_floor(entry: dict[str, Any], method: dict[str, Any]) -> float:
    """Of forward + backward: what needs fewer flops today than it did then counts for old results, too."""
    about, itemsize = entry["floor"], getattr(torch, entry["dtype"]).itemsize
    rates = about["gemm_flops_per_s"], about["copy_bytes_per_s"]
    counted = floor.Work(about["forward_backward"]["flops"], about["forward_backward"]["bytes"])
    _, needed = floor.work(tuple(entry["shape"]), entry["iterations"], entry["output"], itemsize)
    return method["times_floor"] * floor.floor_ms(counted, *rates) / floor.floor_ms(needed, *rates)


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Bars for each shape: forward + backward over the floor, and how many times faster than EIG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = result["shapes"]
    names = [n for n in COLOURS if any(method["name"] == n for entry in entries for method in _ran(entry))]
    panels = [
        ("times_floor", "time / floor", "Forward + backward over what N steps need at torch's own rates"),
        ("eig", "speed-up over EIG", "Forward + backward against eigen-decomposition (1 = as fast)"),
    ]
    figure, axes = plt.subplots(2, 1, figsize=(max(7, 1.2 + 0.42 * len(names) * len(entries)), 8), layout="constrained")
    width = 0.86 / max(len(names), 1)
    for axis, (key, label, heading) in zip(axes, panels, strict=True):
        for i, name in enumerate(names):
            for j, entry in enumerate(entries):
                step = next((m["forward_backward"] for m in _ran(entry) if m["name"] == name), None)
                value = step and (times_floor(entry, step) if key == "times_floor" else step["speedup_over"].get(key))
                if not value or value != value:
                    continue
                # On a logarithmic axis a bar has no natural foot but 1: the floor, or as fast as EIG.
                x = j + (i - (len(names) - 1) / 2) * width
                axis.bar(x, value - 1, width * 0.92, bottom=1, color=COLOURS[name])
                axis.annotate(
                    number(value, 2),
                    (x, value),
                    ha="center",
                    va="bottom" if value >= 1 else "top",
                    xytext=(0, 2 if value >= 1 else -2),
                    textcoords="offset points",
                    fontsize=8,
                    fontweight="bold" if name in ("ours", "ours_graph") else "normal",
                )
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: number(value, 1)))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.margins(y=0.15)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(entries)), ["x".join(map(str, entry["shape"])) for entry in entries])
        axis.set_ylabel(label)
        axis.set_title(heading, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4, alpha=0.5)
        axis.set_axisbelow(True)
    patches = [matplotlib.patches.Patch(color=COLOURS[name], label=TITLES.get(name, name)) for name in names]
    figure.legend(handles=patches, loc="outside lower center", ncols=max(1, min(7, len(names))), frameon=False)
    machine, arguments = result["machine"], result["arguments"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(
        f"Square root of a covariance, {arguments['dtype']}, N = {arguments['iterations']}, "
        f"output {arguments['output']!r}\n{where}; torch {result['software']['torch']}; {result['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
