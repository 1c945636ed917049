#!/usr/bin/env python3
"""SAN, one training step and one inference, with each way to compute the root of the covariances in its attention.

    python benchmarks/bench_san.py                      a small network, in seconds
    python benchmarks/bench_san.py --preset full        the paper's network: minutes on a CPU
    python benchmarks/bench_san.py --preset full --device cuda --json result.json

All methods run in the same network with the same weights; only the covariance layer of each group is exchanged. In each
round every method is timed once, in another order; times and shares are medians over the rounds and ratios the medians
of the ratios of each round. A training step is forward, L1 loss, backward and Adam. A method that cannot run is listed
with its reason.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this file, also when it is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import measure  # noqa: E402
import methods  # noqa: E402
import report  # noqa: E402
from san_model import SAN  # noqa: E402
from san_model.model import second_order  # noqa: E402

NETWORKS = {
    "small": {"n_resgroups": 4, "n_resblocks": 2, "n_feats": 32, "reduction": 8},
    "full": {"n_resgroups": 20, "n_resblocks": 10, "n_feats": 64, "reduction": 16},
}
# Patch (low resolution) and batch of the training step, side of the image of the inference, rounds.
SIZES = {
    ("small", "cpu"): {"patch": 32, "batch": 4, "image": 64, "rounds": 7},
    ("small", "cuda"): {"patch": 32, "batch": 16, "image": 128, "rounds": 21},
    ("full", "cpu"): {"patch": 48, "batch": 4, "image": 96, "rounds": 3},
    ("full", "cuda"): {"patch": 48, "batch": 16, "image": 256, "rounds": 11},
}
# Under autocast the first group's features are bfloat16, for which there is no eigh: like ours, all compute in float32.
METHODS: dict[str, tuple[str, Callable[[Tensor, int], Tensor]]] = {
    "ours": ("isqrt_cov.cov_sqrt", lambda x, n: methods.load_library().cov_sqrt(x, n, "mean")),
    "eig": (
        "torch.linalg.eigh, clamped, stable backward",
        methods.working(lambda x, n: methods.eig_cov_sqrt(x, "mean")),
    ),
    "eager": (
        "Newton-Schulz, bmm and autograd",
        methods.working(lambda x, n: methods.eager_cov_sqrt(x, n, "mean")),
    ),
    "baddbmm": (
        "Newton-Schulz, fused products, autograd",
        methods.working(lambda x, n: methods.reference.baddbmm_cov_sqrt(x, n, "mean")),
    ),
    "mxm": (
        "baddbmm after the published pooling by an M x M matrix",
        methods.working(lambda x, n: methods.reference.mxm_cov_sqrt(x, n, "mean")),
    ),
}
BLOCKS = ("training", "inference")
EXPLANATION = {
    "ms": "time of one step or one inference: median over the rounds",
    "spread": "half the distance between the quartiles, in % of the median",
    "times_first": "time over that of the first method, the median of the ratios of each round: over 1 is slower",
    "share": "part of the time spent in the covariance layers, forward and backward: from before to after each call",
    "peak": "most memory held at once in torch's allocator beyond network, optimiser state and images "
    "(scratch of extensions and BLAS not seen)",
    "difference": "largest difference of the inference's output from that of the first method, 0..255",
}


# ---- Arguments


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    listed = "; ".join(f"{name}: {summary}" for name, (summary, _) in METHODS.items())
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--preset", choices=tuple(NETWORKS), default="small", help="the network (default: small)")
    add("--scale", type=int, choices=(2, 3, 4, 8), default=2, help="upscaling factor (default: 2)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: under torch.autocast")
    add("--iterations", type=report.positive, default=5, metavar="N", help="Newton-Schulz steps (default: 5)")
    add(
        "--patch",
        type=report.positive,
        metavar="SIDE",
        help="training patch in low resolution (default: by preset, device)",
    )
    add("--batch", type=report.positive, metavar="N", help="patches in a training step (default: by preset, device)")
    add("--image", type=report.positive, metavar="SIDE", help="image of the inference (default: by preset, device)")
    add("--rounds", type=report.positive, metavar="N", help="default: by preset, device")
    add("--methods", nargs="+", choices=tuple(METHODS), metavar="METHOD", help=f"default: all. {listed}")
    add("--threads", type=report.positive, metavar="N", help="CPU threads (default: torch's choice)")
    add("--json", type=report.writable, metavar="FILE", help="write everything measured, each sample included")
    arguments = report.parse(parser, argv)
    for name, value in SIZES[arguments.preset, arguments.device].items():
        setattr(arguments, name, getattr(arguments, name) or value)
    arguments.methods = list(dict.fromkeys(arguments.methods or METHODS))
    return arguments


# ---- Time inside the covariance layers


class Stopwatch:
    """Sums the times between every odd mark and the even one after it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def take_ms(self) -> float:
        """The sum since the last call."""
        marks, self.marks = self.marks, []
        pairs = list(zip(marks[::2], marks[1::2], strict=True))
        if self.device.type != "cuda":
            return 1e3 * sum(end - start for start, end in pairs)
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in pairs)


class _Mark(torch.autograd.Function):
    """The identity, which marks when the forward and when the backward comes by."""

    @staticmethod
    def forward(ctx, x: Tensor, stopwatch: Stopwatch) -> Tensor:
        ctx.stopwatch = stopwatch
        stopwatch.mark()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.stopwatch.mark()
        return grad, None


# ---- The network


class Subject:
    """The network in which the methods take turns, and what is timed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        device = torch.device(arguments.device)
        torch.manual_seed(0)
        self.iterations = arguments.iterations
        network = NETWORKS[arguments.preset]
        self.model = SAN(scale=arguments.scale, iterations=arguments.iterations, **network).to(device)
        # All the work of Adam, but no method meets the weights that another one has left.
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0)
        self.patches = 255 * torch.rand(arguments.batch, 3, arguments.patch, arguments.patch, device=device)
        side = arguments.scale * arguments.patch
        self.target = 255 * torch.rand(arguments.batch, 3, side, side, device=device)
        self.image = 255 * torch.rand(1, 3, arguments.image, arguments.image, device=device)
        self.stopwatch = Stopwatch(device)
        half = arguments.dtype == "bfloat16"  # of the convolutions: second_order takes the covariance out of it
        self.autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=half)
        self.training()  # Adam allocates its state in its first step

    def use(self, name: str) -> None:
        """Puts a method into every group."""

        def root(x: Tensor) -> Tensor:
            return _Mark.apply(METHODS[name][1](_Mark.apply(x, self.stopwatch), self.iterations), self.stopwatch)

        for group in self.model.RG:
            group.soca.statistics = partial(second_order, root=root)

    def training(self) -> None:
        self.optimizer.zero_grad()
        with self.autocast():
            loss = torch.nn.functional.l1_loss(self.model(self.patches), self.target)
        loss.backward()
        self.optimizer.step()

    def inference(self) -> Tensor:
        with torch.inference_mode(), self.autocast():
            return self.model(self.image)

    def check_memory(self, name: str) -> None:
        """Raises Unavailable where the M x M matrices, of which training keeps one set a group, do not fit."""
        if name != "mxm":
            return
        in_training = self.model.config["n_resgroups"] * methods.mxm_bytes(self.patches.shape, 4)
        in_inference = methods.mxm_bytes(self.image.shape, 4)
        needed, available = max(in_training, in_inference), measure.available_memory(self.image.device)
        if needed > 0.8 * available:
            raise methods.Unavailable(
                f"its M x M matrices take {needed / 2**30:.1f} GiB; {available / 2**30:.1f} GiB are free"
            )


# ---- The run


def _prepare(arguments, subject: Subject, progress) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Peak memory and difference of the methods that run, and the reasons of those that do not."""
    found, reasons, expected = {}, {}, None
    for name in arguments.methods:
        try:
            subject.check_memory(name)
            subject.use(name)
            output = subject.inference()
            expected = output if expected is None else expected
            about: dict[str, Any] = {"difference": (output - expected).abs().max().item()}
            for block in BLOCKS:
                progress.stage(f"{name}: memory of {block}")
                call = getattr(subject, block)
                call()  # what is allocated once
                subject.optimizer.zero_grad()
                about[block] = {"peak_torch_bytes": measure.peak_torch_memory(call, subject.image.device)}
            found[name] = about
        except Exception as error:  # whatever a method does, the others go on
            first = (str(error).strip().splitlines() or [""])[0]
            reasons[name] = first if isinstance(error, methods.Unavailable) else f"{type(error).__name__}: {first}"
        subject.stopwatch.marks.clear()
    return found, reasons


def run(arguments: argparse.Namespace, progress: report.Progress) -> dict[str, Any]:
    subject = Subject(arguments)
    device = subject.image.device
    found, reasons = _prepare(arguments, subject, progress)
    names = list(found)
    times = {name: {block: [] for block in BLOCKS} for name in names}
    inside = {name: {block: [] for block in BLOCKS} for name in names}
    others = measure.OtherLoad()
    rounds = 0
    try:
        for rounds in range(arguments.rounds if names else 0):
            progress.stage(f"round {rounds + 1}/{arguments.rounds}")
            for name in measure.order(names, rounds):
                progress.update(f"round {rounds + 1}/{arguments.rounds}: {name}")
                subject.use(name)
                for block in BLOCKS:
                    times[name][block].append(measure.time_ms(getattr(subject, block), device))
                    inside[name][block].append(subject.stopwatch.take_ms())
        rounds = arguments.rounds
    except KeyboardInterrupt:
        if rounds == 0:
            raise
        progress.stage(f"interrupted in round {rounds + 1}: what was measured before counts")
    for samples in (*times.values(), *inside.values()):
        for block in BLOCKS:
            del samples[block][rounds:]
    others_percent = others.percent()
    listed = []
    for name in arguments.methods:
        about: dict[str, Any] = {"name": name, "summary": METHODS[name][0], "ran": name in found}
        if name in found:
            about |= found[name]
            for block in BLOCKS:
                about[block] |= _statistics(times[name][block], inside[name][block], times[names[0]][block])
        else:
            about["reason"] = reasons[name]
        listed.append(about)
    return {
        "network": subject.model.config,
        "rounds": rounds,
        "processor_time_of_others_percent": others_percent,
        "methods": listed,
    }


def _statistics(times: list[float], inside: list[float], first: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {
        "median_ms": statistics.median(times),
        "spread_percent": 50 * (quartiles[2] - quartiles[0]) / quartiles[1],
        "times_first": measure.median_ratio(times, first),
        "covariance_ms": statistics.median(inside),
        "covariance_percent": 100 * measure.median_ratio(inside, times),
        "samples_ms": times,
        "covariance_samples_ms": inside,
    }


def text(result: dict[str, Any]) -> str:
    """The table, and why methods are missing from it."""
    ran = [method for method in result["methods"] if method["ran"]]
    first = f"x {ran[0]['name']}" if ran else ""
    each = [["ms", "+- %", first, "cov. ms", "share %", "peak MiB"] for _ in BLOCKS]
    heading = [block if column == 0 else "" for block in BLOCKS for column in range(6)]
    rows = [["", *heading, "output"], ["", *each[0], *each[1], "differs"]]
    number = report.number
    for method in ran:
        cells = []
        for block in BLOCKS:
            about = method[block]
            cells += [number(about["median_ms"]), number(about["spread_percent"], 2), number(about["times_first"])]
            cells += [number(about["covariance_ms"]), number(about["covariance_percent"])]
            cells += [report.mebibytes(about["peak_torch_bytes"])]
        rows.append([method["name"], *cells, number(method["difference"], 2)])
    missing = [f"{method['name']} did not run: {method['reason']}" for method in result["methods"] if not method["ran"]]
    return "\n".join([report.table(rows, headings=2), *missing])


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = report.record("bench_san", arguments, EXPLANATION)
    machine = result["machine"]
    print(
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores_usable']} cores"
        + (f"; {machine['gpu']['name']}" if machine["gpu"] else "")
    )
    if machine["load_average_at_start"] > 0.5 * machine["cores_usable"] and not machine["gpu"]:
        print(f"The machine is busy (load {machine['load_average_at_start']:.1f}): ratios may hold, times do not.")
    print(f"SAN x{arguments.scale}, {NETWORKS[arguments.preset]}, {arguments.dtype}")
    patch, image = arguments.patch, arguments.image
    print(f"training: {arguments.batch} patches of {patch} x {patch}; inference: 1 image of {image} x {image}\n")
    progress = report.Progress()
    result |= run(arguments, progress)
    progress.clear()
    print(text(result))
    if arguments.json:
        report.write_json(arguments.json, result)
    print("\n" + "\n".join(f"{name}: {meaning}" for name, meaning in EXPLANATION.items()))
    return 0 if any(method["ran"] for method in result["methods"]) else 1


if __name__ == "__main__":
    sys.exit(main())
