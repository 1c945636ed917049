"""Measuring one call: its time, its memory, what it keeps for the backward, its error.

Peak memory is told in two ways, since neither sees everything. "torch": the high-water mark of torch's allocator. On a
CPU it is read off the profiler's list of allocations; scratch that an extension or a BLAS takes for itself does not
show. "process" (CPU, Linux): the high-water mark of the resident anonymous memory of a fresh process, which shows
everything that was touched, to about 1 MiB.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class NotMeasured(Exception):
    """A number that cannot be had here; the message is the reason."""


# ---- Time


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Milliseconds a call, the mean of ``calls`` in a row: events on a GPU, where idle gaps count; else the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - start) / calls
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / calls


def calls_per_sample(call: Callable[[], object], device: torch.device, sample_ms: float, limit: int = 50) -> int:
    """How many calls make a sample of ``sample_ms``: below it a clock, or a GPU's first launch, would be measured."""
    once = time_ms(call, device)
    if once > sample_ms:
        return 1
    once = min(once, time_ms(call, device))
    return max(1, min(limit, round(sample_ms / max(once, 1e-6))))


def order(names: list[str], round_index: int) -> list[str]:
    """Another order in each round, the same ones in every run: no method always follows the same neighbour."""
    return random.Random(round_index).sample(names, len(names))


def interleaved_ms(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    sample_ms: float,
    limit: int = 50,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """samples[name][round] in ms, all of them once in every round; ``before(name)`` is not part of it."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # what a first call does once must not make it seem too slow to repeat
        call()
    repeats = {name: calls_per_sample(call, device, sample_ms, limit) for name, call in calls.items()}
    for index in range(rounds):
        for name in order(list(calls), index):
            before(name)
            samples[name].append(time_ms(calls[name], device, calls=repeats[name]))
    return samples


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of the ratios of each round: what slows a whole round cancels."""
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


class OtherLoad:
    """Share of the machine's processor time that others took since this was made."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: all processors, all that was idle, this process."""
        ticks = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))  # the guests' are in user's
        own = os.times()
        second = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / second, (ticks[3] + ticks[4]) / second, own.user + own.system

    def percent(self) -> float | None:
        total, idle, own = (after - before for after, before in zip(self._now(), self.start, strict=True))
        return max(0.0, 100 * (total - idle - own) / total) if total > 0 else None


def page_faults(call: Callable[[], object]) -> int:
    """Pages that the kernel had to hand out during one call (4 KiB each as a rule)."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


# ---- Memory


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: of the GPU, or of the machine and of the cgroup that this runs in."""
    if device.type == "cuda":
        unused_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused_by_torch
    free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Libraries say nothing: the profiler writes two lines at every use, whatever its log level; a BLAS its errors."""
    c_library, saved = ctypes.CDLL(None), {stream: os.dup(stream) for stream in (1, 2)}

    def flush():  # what was written belongs to where the stream led then
        sys.stdout.flush(), sys.stderr.flush(), c_library.fflush(None)

    flush()
    with open(os.devnull, "w") as nowhere:
        for stream in saved:
            os.dup2(nowhere.fileno(), stream)
    try:
        yield
    finally:
        flush()
        for stream, copy in saved.items():
            os.dup2(copy, stream)
            os.close(copy)


def peak_torch_memory(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes held at once in torch's allocator during ``call``, beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()  # its result dies here: a block freed outside would leave a stale entry in the profiler's books
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["args"]["Ev Idx"]):
        if event["args"]["Device Type"] == 0:
            held += event["args"]["Bytes"]
            peak = max(peak, held)
    return peak


def kept_for_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that the autograd graph of ``function(x)`` keeps alive beyond x: whole storages, each counted once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != x.untyped_storage().data_ptr():
            kept[storage.data_ptr()] = tensor  # the tensor too: an address is unique only while its memory lives
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x)
    del y
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


_M_MMAP_THRESHOLD = -3  # of malloc.h


def _resident() -> dict[str, int]:
    """Bytes of VmHWM (highest resident set since it was reset), RssAnon, RssFile and RssShmem of this process."""
    status = Path("/proc/self/status").read_text()
    names = ("VmHWM", "RssAnon", "RssFile", "RssShmem")
    return {name: int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024 for name in names}


def _settle() -> None:
    """Gives the C library's free blocks back to the kernel and restarts VmHWM from what is resident now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError) as error:
        raise NotMeasured(f"this system does not tell a process's peak memory ({error})") from error


def peak_process_memory(step: Callable[[], object], settled: Callable[[], object] = lambda: None) -> int:
    """Most bytes of anonymous memory during ``step`` beyond those held after ``settled``.

    ``settled`` loads what is loaded once. ``step`` is called twice: scratch that it keeps from its first call counts,
    and by the second all program pages that it needs are mapped, so that the rest of VmHWM is anonymous memory.
    """
    settled()
    _settle()
    before = _resident()["RssAnon"]
    step()
    _settle()
    step()
    after = _resident()
    return max(0, after["VmHWM"] - after["RssFile"] - after["RssShmem"] - before)


def _measure_in_child(connection, name, shape, dtype, iterations, output, threads, options) -> None:
    import methods

    try:
        torch.set_num_threads(threads)
        # Larger blocks go back to the kernel as soon as they are freed: holes in the heap are not the method's memory.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)

        def case(shape):
            return methods.make_case(torch.randn(shape, dtype=dtype), iterations, output)

        measured = case(shape)
        prepared = methods.prepare(name, measured, **options)

        def settled():
            a = torch.randn(512, 512, dtype=dtype)
            torch.mm(a, a)  # the buffers of the BLAS, which any network has already
            if name == "compile":
                prepared.step()  # compilation
            else:
                methods.prepare(name, case((1, 8, 2, 2)), **options).step()  # fewer positions than channels
            measured.x.grad = None

        with _silent():  # an error comes as an exception, too
            connection.send(peak_process_memory(prepared.step, settled))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def peak_memory_of_fresh_process(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    iterations: int,
    output: str,
    options: dict,
    timeout_s: float = 300,
) -> int:
    """``peak_process_memory`` of one forward + backward of a method, in a process that has done nothing else."""
    if not Path("/proc/self/clear_refs").exists():
        raise NotMeasured("this system does not tell a process's peak memory")
    context = multiprocessing.get_context("forkserver")  # forked from one that has imported torch and used nothing
    context.set_forkserver_preload(["torch"])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, name, shape, dtype, iterations, output, torch.get_num_threads(), options)
    child = context.Process(target=_measure_in_child, args=arguments, daemon=name != "compile")
    child.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(timeout_s) else f"no answer in {timeout_s:.0f} s"
    except EOFError:
        answer = "the measuring process died"
    if child.is_alive() and not isinstance(answer, int):
        child.terminate()
    child.join()
    if isinstance(answer, int):
        return answer
    raise NotMeasured(answer)


# ---- Error


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected`` (float64), of the worst sample; NaN if one has NaN."""
    if not actual.shape[0]:
        return 0.0
    difference = (actual.double() - expected).flatten(1).norm(dim=1)
    norm = expected.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return (difference / norm).max().item()


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient in float64 on the very same numbers."""
    x = x.detach().double().requires_grad_()
    y = function(x)
    (gradient,) = torch.autograd.grad(y, x, upstream.double())
    return y.detach(), gradient
