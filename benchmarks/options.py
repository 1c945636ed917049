#!/usr/bin/env python3
"""What each choice costs: isqrt_cov with one thing changed, against itself.

    python benchmarks/options.py                                      the usual shapes
    python benchmarks/options.py --shape 16x64x48x48 --json result.json

The base is float32, NCHW, output "matrix", 5 steps, all threads and the engines that plan() chooses; options that do
not run are listed with the reason. Everything is timed once in every round, each time in another order; ratios are the
medians of the ratios of each round. On a GPU replays of CUDA graphs are timed, which the cost of a call is no part of.
Below come the operators alone that a call with matrices of the channels consists of, and at the end that cost: of a
call that has next to nothing to do, beside an empty operator of torch.library.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this file, also when it is imported

import torch  # noqa: E402

import features  # noqa: E402
import measure  # noqa: E402
import methods  # noqa: E402
import report  # noqa: E402

SHAPES = {
    "cpu": ["16x64x48x48", "32x256x14x14", "1x64x256x256", "1x256x28x28"],
    "cuda": ["16x64x48x48", "32x256x14x14", "1x64x256x256", "64x128x28x28", "64x64x48x48", "128x256x14x14"],
}
# Engines of the root that are timed apart from the rest, and how many calls follow each other in a CUDA graph.
ROOT_ENGINES = {"cpu": ("auto",), "cuda": ("auto", "block", "grid", "warpgroup")}
IN_A_ROW = 10
TINY = (1, 4, 4, 4)
BLOCKS = ("forward", "forward_backward")
MEANING = {
    "ms": "milliseconds, the median over the rounds; on a GPU of a replay of a CUDA graph",
    "left_out": "the options that do not run there, and why",
    "faster": "how many times as fast as the base, the median of the ratios of each round",
    "parts": f"milliseconds of an operator alone, the median over the rounds; on a GPU {IN_A_ROW} in a row are a graph",
    "page_faults": "pages that the kernel hands out during one forward + backward, the gradient's buffer being fresh",
    "call_us": f"microseconds of a call on {'x'.join(map(str, TINY))}, the median over the rounds; on a GPU, "
    "too, from Python and not from a graph",
}


@dataclass(frozen=True)
class Option:
    """How a variation differs from the base."""

    dtype: torch.dtype = torch.float32
    output: str = "matrix"
    memory_format: torch.memory_format = torch.contiguous_format
    threads: int | None = None  # all
    streams: int = 1  # that each have a part of the batch
    engine: str = "auto"
    gram: bool | None = None  # the positions' matrices, or the channels', where plan() chooses the other ones
    arguments: dict[str, Any] = field(default_factory=dict)  # of cov_sqrt


OPTIONS = {
    "base": Option(),
    'output "triu"': Option(output="triu"),
    'output "mean"': Option(output="mean"),
    "channels_last": Option(memory_format=torch.channels_last),
    "bfloat16": Option(dtype=torch.bfloat16),
    "float16": Option(dtype=torch.float16),
    "float64": Option(dtype=torch.float64),
    "3 minimax steps": Option(arguments={"iterations": 3, "coefficients": "minimax", "spectrum_floor": 1e-2}),
    "1 thread": Option(threads=1),
    "matrices of the channels": Option(gram=False),
    "matrices of the positions": Option(gram=True),
    'engine "library"': Option(engine="library"),
    'engine "grid"': Option(engine="grid"),
    'engine "warpgroup"': Option(engine="warpgroup"),
    'engine "block"': Option(engine="block"),  # never a cluster
    "halves of the batch in two streams": Option(streams=2),
    'the same by engine "warpgroup"': Option(engine="warpgroup", streams=2),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--shape", type=report.shape, nargs="+", metavar="BxCxHxW", help="default: those of the device")
    add("--rounds", type=report.positive, default=21, metavar="N", help="default: 21")
    add("--only", metavar="TEXT", help="beside the base those options, and engines, that have TEXT in their names")
    add("--without", metavar="TEXT", help="not those that have TEXT in their names")
    add("--json", type=report.writable, metavar="FILE", help="write everything measured")
    arguments = report.parse(parser, argv)
    arguments.shape = arguments.shape or [report.shape(shape) for shape in SHAPES[arguments.device]]
    if not any(wanted(arguments, name) for name in OPTIONS if name != "base"):
        parser.error(
            f"--only {arguments.only!r}, --without {arguments.without!r}: none is left of {', '.join(OPTIONS)}"
        )
    return arguments


def wanted(arguments: argparse.Namespace, name: str) -> bool:
    """Of an option, or an engine of the root; "base" and "auto" are what others are compared with."""
    if name in ("base", "auto"):
        return True
    return (not arguments.only or arguments.only in name) and not (arguments.without and arguments.without in name)


def function_of(option: Option, shape: tuple[int, ...], device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """cov_sqrt with this option; RuntimeError where its engine does not run."""
    library = methods.load_library()
    given: dict[str, Any] = {"iterations": 5, "output": option.output} | option.arguments
    if option.engine == "auto" and option.gram is None:
        return lambda x: library.cov_sqrt(x, **given)
    plan = library.plan(shape, option.dtype, device, option.engine)
    if plan["gram"] == option.gram:
        raise RuntimeError("they are the base's")
    if option.gram and not 1 < math.prod(shape[2:]) < shape[1]:
        raise RuntimeError("no fewer positions than channels")
    code = library.ops.code
    output, engine = (
        code("output", option.output, library.ops.OUTPUTS),
        code("engine", option.engine, library.ops.ENGINES),
    )
    gram = plan["gram"] if option.gram is None else option.gram
    return lambda x: torch.ops.isqrt_cov.cov_sqrt(x, given["iterations"], output, engine=engine, gram=gram)[0]


def in_streams(function: Callable[[torch.Tensor], torch.Tensor], count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """``function`` of so many parts of its batch side by side: kernels of one may fill what others leave idle."""
    streams = [torch.cuda.Stream() for _ in range(count)]

    def call(x):
        here, results = torch.cuda.current_stream(), []
        for stream in streams:
            stream.wait_stream(here)
        for stream, part in zip(streams, x.chunk(count), strict=False):  # a batch may have fewer
            with torch.cuda.stream(stream):
                results.append(function(part))
        for stream in streams:
            here.wait_stream(stream)
        return torch.cat(results)

    return call


def variations(arguments: argparse.Namespace, shape: tuple[int, ...]) -> tuple[dict[str, methods.Prepared], dict]:
    """Options as they are timed, and the reasons of those that do not run."""
    device = torch.device(arguments.device)
    maps = features.feature_maps("photo", shape, torch.float32, device)
    prepared, reasons = {}, {}
    for name, option in OPTIONS.items():
        if (option.threads and device.type != "cpu") or (option.streams > 1 and device.type != "cuda"):
            continue
        if not wanted(arguments, name):
            continue
        x = maps.to(dtype=option.dtype, memory_format=option.memory_format, copy=True)
        case = methods.make_case(x, 5, option.output)
        try:
            function = function_of(option, shape, device)
            function = in_streams(function, option.streams) if option.streams > 1 else function
            method = methods.of_function(case, function)
            prepared[name] = methods.capture(case, method) if device.type == "cuda" else method
        except RuntimeError as error:
            reasons[name] = _first_line(error)
    return prepared, reasons


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def samples_ms(calls: dict[str, Callable[[], object]], arguments, sample_ms: float) -> dict[str, list[float]]:
    """samples[name][round]; options that ask for other threads are timed with those."""
    everything = torch.get_num_threads()

    def before(name):
        torch.set_num_threads((OPTIONS[name].threads if name in OPTIONS else None) or everything)
        calls[name]()  # the first one after a change of threads starts them

    try:
        return measure.interleaved_ms(calls, arguments.rounds, torch.device(arguments.device), sample_ms, 1000, before)
    finally:
        torch.set_num_threads(everything)


def run_shape(arguments: argparse.Namespace, shape: tuple[int, ...], progress) -> dict[str, Any]:
    progress.stage("x".join(map(str, shape)))
    prepared, reasons = variations(arguments, shape)
    if "base" not in prepared:  # nothing to compare with
        prepared.clear()
    found: dict[str, dict[str, Any]] = {name: {} for name in prepared}
    others = measure.OtherLoad()
    for block in BLOCKS:
        calls = {name: method.forward if block == "forward" else method.step for name, method in prepared.items()}
        samples = samples_ms(calls, arguments, 5.0)
        for name, own in samples.items():
            faster = measure.median_ratio(samples["base"], own)
            found[name][block] = {"ms": statistics.median(own), "faster": faster, "samples_ms": own}
    others_percent = others.percent()
    for name, method in prepared.items():
        found[name]["page_faults"] = measure.page_faults(method.step) if arguments.device == "cpu" else None
    about = {"shape": list(shape), "processor_time_of_others_percent": others_percent}
    return about | {"options": found, "left_out": reasons, "parts": parts(arguments, shape, reasons)}


def parts(arguments: argparse.Namespace, shape: tuple[int, ...], reasons: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The operators that a call with matrices of the channels consists of, float32 and 5 steps.

    Those of the root by each engine that runs; what does not goes to ``reasons``.
    """
    library, operators, device = methods.load_library(), torch.ops.isqrt_cov, torch.device(arguments.device)
    x = features.feature_maps("photo", shape, torch.float32, device)
    (sigma, mean), upstream = operators.covariance_pool(x), methods.make_case(x, 5, "matrix").upstream
    grad = operators.matrix_root_backward(upstream, sigma, 5, 0)
    calls: dict[str, Callable[[], object]] = {"pooling": lambda: operators.covariance_pool(x)}
    for engine in filter(partial(wanted, arguments), ROOT_ENGINES[arguments.device]):
        try:
            library.plan(shape, torch.float32, device, engine)
        except RuntimeError:
            continue
        code = library.ops.code("engine", engine, library.ops.ENGINES)
        by = "" if engine == "auto" else f', engine "{engine}"'
        calls[f"root{by}"] = lambda code=code: operators.matrix_root(sigma, 5, 0, engine=code)
        calls[f"gradient of the root{by}"] = lambda code=code: operators.matrix_root_backward(
            upstream, sigma, 5, 0, engine=code
        )
    calls["gradient of pooling"] = lambda: operators.covariance_pool_backward(grad, x, mean)
    in_a_row = IN_A_ROW if device.type == "cuda" else 1
    for name, call in tuple(calls.items()):
        try:
            calls[name] = replay_of(call, in_a_row) if device.type == "cuda" else call
            calls[name]()
        except RuntimeError as error:
            reasons[name] = _first_line(error)
            del calls[name]
    samples = {
        name: [ms / in_a_row for ms in own]
        for name, own in measure.interleaved_ms(calls, arguments.rounds, device, 5.0, 1000).items()
    }
    return {name: {"ms": statistics.median(own), "samples_ms": own} for name, own in samples.items()}


def replay_of(call: Callable[[], object], in_a_row: int) -> Callable[[], object]:
    """A CUDA graph of so many calls; those of methods.capture are of one, and of its gradient."""
    call()  # library handles and workspaces must exist before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(in_a_row):
            call()

    def replay(inputs=call):  # which the graph does not keep
        graph.replay()

    return replay


def overhead(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """us[of][block]"""
    library = methods.load_library()
    x = torch.randn(TINY).to(arguments.device).requires_grad_()
    calls = {}
    for name, function in (("cov_sqrt", library.cov_sqrt), ("empty", empty_operator())):
        y = function(x)
        upstream = torch.ones_like(y)

        def forward(function=function):
            with torch.no_grad():
                return function(x)

        def step(function=function, upstream=upstream):
            return torch.autograd.grad(function(x), x, upstream)

        calls |= {f"{name}, forward": forward, f"{name}, forward_backward": step}
    samples = samples_ms(calls, arguments, 10.0)
    us = {name: 1e3 * statistics.median(values) for name, values in samples.items()}
    return {name: {block: us[f"{name}, {block}"] for block in BLOCKS} for name in ("cov_sqrt", "empty")}


def empty_operator() -> Callable[[torch.Tensor], torch.Tensor]:
    """An operator with a gradient that allocates its result, (B, C, C), and no more."""

    @torch.library.custom_op("isqrt_cov_benchmark::empty", mutates_args=())
    def empty(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], x.shape[1], x.shape[1])

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0])

    empty.register_autograd(backward, setup_context=setup)
    return empty


def text(entry: dict[str, Any]) -> str:
    rows = [["", "forward ms", "times as fast", "forward + backward ms", "times as fast", "page faults"]]
    for name, about in entry["options"].items():
        rows.append([name])
        for block in BLOCKS:
            rows[-1] += [report.number(about[block]["ms"]), report.number(about[block]["faster"])]
        rows[-1].append("-" if about["page_faults"] is None else str(about["page_faults"]))
    left_out = [f"{name} did not run: {reason}" for name, reason in entry["left_out"].items()]
    of_parts = [["an operator alone", "us"]]
    of_parts += [[name, report.number(1e3 * about["ms"])] for name, about in entry["parts"].items()]
    shape = "x".join(map(str, entry["shape"]))
    return "\n".join(["", shape, report.table(rows), *left_out, "", report.table(of_parts)])


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    result = report.record("options", arguments, MEANING) | {"shapes": []}
    progress = report.Progress()
    try:
        for shape in arguments.shape:
            result["shapes"].append(run_shape(arguments, shape, progress))
            progress.clear()
            print(text(result["shapes"][-1]), flush=True)
            if arguments.json:  # what was measured is not lost with the next
                report.write_json(arguments.json, result)
    except features.PhotographsMissing as error:
        progress.clear()
        print(f"options.py: {error}", file=sys.stderr)
        return 2
    result["call_us"] = overhead(arguments)
    rows = [[f"a call on {'x'.join(map(str, TINY))}, us", "forward", "forward + backward"]]
    rows += [[name, *(report.number(us[block]) for block in BLOCKS)] for name, us in result["call_us"].items()]
    print("\n" + report.table(rows))
    if arguments.json:
        report.write_json(arguments.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
