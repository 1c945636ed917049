#!/usr/bin/env python3
"""Square-root normalised covariance pooling: isqrt_cov against every other way to compute it, and against the machine.

    python benchmarks/bench_soca.py                     all methods, the usual shapes, every kind of input
    python benchmarks/bench_soca.py --quick             the same in half a minute, without torch.compile
    python benchmarks/bench_soca.py --device cuda --json result.json --plot result.png

In each round every method is timed once, in another order, forward and then forward + backward; times are medians over
the rounds and ratios the medians of the ratios of each round, so that a slower minute of the machine cancels. The
upstream gradient is a fixed, non-symmetric random one. A method that cannot run is listed with its reason.
"""

import argparse
import statistics
import sys
import time
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

SHAPES = {
    ("cpu", False): ["16x64x48x48", "32x256x14x14"],
    ("cpu", True): ["4x64x24x24", "4x128x14x14"],
    ("cuda", False): "8x64x48x48 16x64x48x48 64x64x48x48 1x64x256x256 32x256x14x14 128x256x14x14 64x128x28x28 "
    "16x512x14x14".split(),
    ("cuda", True): ["16x64x48x48", "32x256x14x14"],
}
ROUNDS = {("cpu", False): 21, ("cpu", True): 5, ("cuda", False): 51, ("cuda", True): 11}
WARM_UP_S = 0.3  # of a method after its first call; a slow one is not called for nothing
SAMPLE_MS = 5.0  # a sample lasts about as long, of several calls where one is shorter
BLOCKS = ("forward", "forward_backward")


# ---- Arguments


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    listed = "; ".join(f"{name}: {method.summary}" for name, method in methods.METHODS.items())
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--shape", type=report.shape, nargs="+", metavar="BxCxHxW", help="default: by device, fewer with --quick")
    add("--dtype", choices=("float32", "float64", "float16", "bfloat16"), default="float32", help="of x")
    add("--iterations", type=report.positive, default=5, metavar="N", help="Newton-Schulz steps (default: 5)")
    add("--output", choices=("matrix", "triu", "mean"), default="matrix")
    add("--methods", nargs="+", choices=tuple(methods.METHODS), metavar="METHOD", help=f"default: all. {listed}")
    kinds = f"of {', '.join(features.INPUTS)}: timed on the first, accuracy on each (default: all, photo with --quick)"
    add("--input", nargs="+", choices=tuple(features.INPUTS), metavar="KIND", help=kinds)
    add("--rounds", type=report.positive, metavar="N", help="default: 21 on a CPU, 51 on a GPU, fewer with --quick")
    add("--threads", type=report.positive, metavar="N", help="CPU threads (default: torch's choice)")
    add("--quick", action="store_true", help="small shapes, few rounds, one kind of input, no torch.compile")
    add("--json", type=report.writable, metavar="FILE", help="write everything measured, each sample included")
    add(
        "--plot", type=report.writable, metavar="FILE", help="draw the comparison (PNG, or what the name's ending says)"
    )
    arguments = report.parse(parser, argv)
    which = arguments.device, arguments.quick
    arguments.shape = arguments.shape or [report.shape(shape) for shape in SHAPES[which]]
    arguments.rounds = arguments.rounds or ROUNDS[which]
    arguments.input = list(dict.fromkeys(arguments.input or (["photo"] if arguments.quick else features.INPUTS)))
    arguments.asked_methods = arguments.methods is not None
    arguments.methods = list(dict.fromkeys(arguments.methods or methods.METHODS))
    return arguments


# ---- One shape


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, methods.Unavailable | measure.NotMeasured) else f"{type(error).__name__}: {first}"


def _warm_up(method: methods.Prepared, device: torch.device) -> None:
    """A call both ways, which loads what it needs, and on a GPU up to four more."""
    deadline = float("inf")
    for _ in range(5 if device.type == "cuda" else 1):
        method.forward()
        method.step()
        measure.synchronize(device)
        if time.perf_counter() > deadline:
            break
        deadline = min(deadline, time.perf_counter() + WARM_UP_S)


def _prepare(arguments, case, progress) -> tuple[dict[str, methods.Prepared], dict[str, str]]:
    """Methods that run, each called once both ways, and the reasons of those that do not."""
    prepared, reasons = {}, {}
    for name in arguments.methods:
        progress.update(f"preparing {name}")
        if arguments.quick and not arguments.asked_methods and not methods.METHODS[name].quick:
            reasons[name] = f"left out by --quick; ask for it with --methods {name}"
            continue
        try:
            method = methods.prepare(name, case)
            _warm_up(method, case.x.device)
            prepared[name] = method
        except Exception as error:  # whatever a method does, the others go on
            reasons[name] = _reason(error)
        case.x.grad = None
    return prepared, reasons


def _time(arguments, case, prepared, reasons, rates, progress) -> tuple[dict, dict]:
    """Samples in ms, samples[name][block][round]; calls per sample. A method that fails here leaves ``prepared``."""
    clock = partial(measure.time_ms, device=case.x.device)
    timed = {kind: {rate.name: rate.call for rate in probes} for kind, probes in rates.items()}
    timed |= {name: {"forward": method.forward, "forward_backward": method.step} for name, method in prepared.items()}
    samples = {name: {block: [] for block in blocks} for name, blocks in timed.items()}
    calls = {name: dict.fromkeys(blocks, 1) for name, blocks in timed.items()}
    for index in range(-1, arguments.rounds):  # before the first round it is found out how many calls make a sample
        for name in measure.order(list(timed), index):
            progress.update(f"round {index + 1}/{arguments.rounds}: {name}")
            try:
                for block, call in timed[name].items():
                    if index < 0:
                        calls[name][block] = measure.calls_per_sample(call, case.x.device, SAMPLE_MS)
                    else:
                        samples[name][block].append(clock(call, calls=calls[name][block]))
            except Exception as error:
                if name in rates:
                    raise  # without rates there is no floor
                when = "before round 1" if index < 0 else f"in round {index + 1}"
                reasons[name] = f"failed {when}: {_reason(error)}"
                del prepared[name], timed[name], samples[name]
    case.x.grad = None
    return samples, calls


def _floor(arguments, case, samples, rates) -> dict[str, Any]:
    """The floors, one for each round, from the best rates of that round."""
    about: dict[str, Any] = {}
    best = {}
    for kind, unit in (("gemm", "flops_per_s"), ("copy", "bytes_per_s")):
        best[kind] = floor.best_rates(rates[kind], samples[kind])
        fastest = max(rates[kind], key=lambda rate: rate.amount / statistics.median(samples[kind][rate.name]))
        about |= {f"{kind}_{unit}": statistics.median(best[kind]), f"{kind}_fastest": fastest.name}
        about[f"{kind}_samples_ms"] = samples[kind]
    needed = floor.work(tuple(case.x.shape), arguments.iterations, arguments.output, case.x.itemsize)
    for block, work in zip(BLOCKS, needed, strict=True):
        each = [floor.floor_ms(work, *of_round) for of_round in zip(best["gemm"], best["copy"], strict=True)]
        arithmetic, traffic = work.flops / about["gemm_flops_per_s"], work.bytes / about["copy_bytes_per_s"]
        about[block] = {
            "flops": work.flops,
            "bytes": work.bytes,
            "bound_by": "arithmetic" if arithmetic > traffic else "memory",
            "ms": statistics.median(each),
            "samples_ms": each,
        }
    return about


def _timing(name: str, block: str, samples, calls, floors) -> dict[str, Any]:
    own = samples[name][block]
    quartiles = statistics.quantiles(own, n=4, method="inclusive") if len(own) > 1 else [own[0]] * 3
    others = [other for other in samples if other not in ("gemm", "copy")]
    return {
        "median_ms": statistics.median(own),
        "spread_percent": 50 * (quartiles[2] - quartiles[0]) / quartiles[1],
        "times_floor": measure.median_ratio(own, floors[block]["samples_ms"]),
        "speedup_over": {other: measure.median_ratio(samples[other][block], own) for other in others},
        "calls_per_sample": calls[name][block],
        "samples_ms": own,
    }


def _memory(arguments, case, name, method) -> tuple[dict[str, int | None], dict[str, str]]:
    """Bytes, None where they cannot be had, and the reasons for those."""
    on_cuda = case.x.is_cuda

    def peak_torch():
        if method.own_pool:
            raise measure.NotMeasured(f"outside torch's books: {method.own_pool} own pool")
        case.x.grad = None
        return measure.peak_torch_memory(lambda: (method.step(), setattr(case.x, "grad", None)), case.x.device)

    def peak_process():
        shape = tuple(case.x.shape)
        return measure.peak_memory_of_fresh_process(
            name, shape, case.x.dtype, arguments.iterations, arguments.output, method.options
        )

    def kept():
        if method.function is None:
            raise measure.NotMeasured("a graph has no forward apart from its backward")
        return measure.kept_for_backward(method.function, case.x)

    wanted = {"peak_torch_bytes": peak_torch, "kept_for_backward_bytes": kept}
    if not on_cuda:
        wanted |= {"page_faults": lambda: measure.page_faults(method.step), "peak_process_bytes": peak_process}
    keys = ("peak_torch_bytes", "peak_process_bytes", "kept_for_backward_bytes", "page_faults")
    values, reasons = dict.fromkeys(keys), {}
    for key, measured in wanted.items():
        try:
            values[key] = measured()
        except Exception as error:
            reasons[key] = _reason(error)
    case.x.grad = None
    return values, reasons


def _accuracy(arguments, case, prepared, shape, progress) -> dict[str, dict[str, dict[str, float]]]:
    """accuracy[name][input]: errors against float64 of what the method computes, and the distance to the exact root."""
    found = {name: {} for name in prepared}
    for kind in arguments.input:
        progress.update(f"accuracy on {kind}")
        with torch.no_grad():
            case.x.copy_(features.feature_maps(kind, shape, case.x.dtype, case.x.device))
        try:
            oracles = {
                target: measure.value_and_gradient(partial(target, case), case.x, case.upstream)
                for target in {methods.truncated_root, *(methods.METHODS[name].target for name in prepared)}
            }
            truncated = oracles[methods.truncated_root]
            exact = methods.exact_root(case, case.x.detach().double())
        except RuntimeError as error:  # float64 may need more memory than all that was timed
            for about in found.values():
                about[kind] = {"failed": f"no float64 to compare with: {_reason(error)}"}
            continue
        for name, method in prepared.items():
            try:
                value, gradient = method.step()
                target = oracles[methods.METHODS[name].target]
                found[name][kind] = {
                    "value": measure.relative_error(value, target[0]),
                    "gradient": measure.relative_error(gradient, target[1]),
                    "value_against_truncated": measure.relative_error(value, truncated[0]),
                    "gradient_against_truncated": measure.relative_error(gradient, truncated[1]),
                    "distance_to_exact_root": measure.relative_error(value, exact),
                }
            except Exception as error:
                found[name][kind] = {"failed": _reason(error)}
    return found


def run_shape(arguments: argparse.Namespace, shape: tuple[int, int, int, int], progress) -> dict[str, Any]:
    """Everything about one shape, as it stands in the JSON."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    progress.stage("x".join(map(str, shape)))
    x = features.feature_maps(arguments.input[0], shape, dtype, device)
    case = methods.make_case(x, arguments.iterations, arguments.output)

    prepared, reasons = _prepare(arguments, case, progress)
    rates = floor.probes(case.x, arguments.quick)
    others = measure.OtherLoad()
    samples, calls = _time(arguments, case, prepared, reasons, rates, progress)
    others_percent = others.percent()
    floors = _floor(arguments, case, samples, rates)
    memory = {}
    for name, method in prepared.items():
        progress.update(f"memory of {name}")
        memory[name] = _memory(arguments, case, name, method)
    accuracy = _accuracy(arguments, case, prepared, shape, progress)

    listed = []
    for name in arguments.methods:
        about: dict[str, Any] = {"name": name, "summary": methods.METHODS[name].summary, "ran": name in prepared}
        if about["ran"]:
            about |= {
                "computes": methods.METHODS[name].target.__name__,
                "detail": prepared[name].detail,
                **{block: _timing(name, block, samples, calls, floors) for block in BLOCKS},
                "memory": memory[name][0],
                "not_measured": memory[name][1],
                "accuracy": accuracy[name],
            }
        else:
            about["reason"] = reasons[name]
        listed.append(about)
    return {
        "shape": list(shape),
        "dtype": arguments.dtype,
        "iterations": arguments.iterations,
        "output": arguments.output,
        "inputs": arguments.input,
        "rounds": arguments.rounds,
        "processor_time_of_others_percent": others_percent,
        "floor": floors,
        "methods": listed,
    }


# ---- The run


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = report.record("bench_soca", arguments, soca_report.EXPLANATION) | {"shapes": []}
    machine, software = result["machine"], result["software"]
    print(
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores_usable']} cores"
        + (f"; {machine['gpu']['name']}" if machine["gpu"] else "")
    )
    print(f"torch {software['torch']}, float32 products at precision {software['float32_matmul_precision']!r}")
    progress = report.Progress()
    try:
        for shape in arguments.shape:
            entry = run_shape(arguments, shape, progress)
            result["shapes"].append(entry)
            progress.clear()
            print(soca_report.text(entry), flush=True)
            if arguments.json:  # after each shape: what was measured is not lost with the next
                report.write_json(arguments.json, result)
    except features.PhotographsMissing as error:
        progress.clear()
        print(f"bench_soca.py: {error}", file=sys.stderr)
        return 2
    if arguments.plot:
        soca_report.plot(result, arguments.plot)
    print(f"\nWhat the columns mean\n{soca_report.explanation()}")
    ran = [{method["name"] for method in entry["methods"] if method["ran"]} for entry in result["shapes"]]
    return 0 if all(names and ("ours" in names or "ours" not in arguments.methods) for names in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
