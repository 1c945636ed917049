"""The benchmark measures what it says: known memory, real input, and a complete record."""

import ctypes
import itertools
import json
import math
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_soca
import features
import measure
import methods
import report
import soca_report

CPU = torch.device("cpu")
SHAPE = (2, 8, 6, 6)


@pytest.fixture
def photographs():
    pytest.importorskip("skimage", reason="photographs need scikit-image")


def maps(kind, shape, seed=0):
    return features.feature_maps(kind, shape, torch.float64, "cpu", seed)


def eigenvalues(x):
    """Spectrum of the covariance, the greatest first, over its sum; (B, C)."""
    values = torch.linalg.eigvalsh(methods.reference.covariance_pool(x)).flip(1)
    return values / values.sum(1, keepdim=True)


# ---- Input


@pytest.mark.parametrize("kind", features.INPUTS)
def test_input_is_a_function_of_shape_and_seed(kind, photographs):
    first, again, other = maps(kind, SHAPE), maps(kind, SHAPE), maps(kind, SHAPE, seed=1)
    assert first.shape == SHAPE and first.isfinite().all()
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert features.feature_maps(kind, SHAPE, torch.float32, "cpu").dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 16, 32, 40), (2, 24, 6, 6), (1, 4, 1, 400)])
def test_photographs_give_real_maps(shape, photographs):
    """Not constant, samples differ, neighbours resemble each other, and few directions carry most of the variance."""
    x = maps("photo", shape)
    assert (x.flatten(2).std(2) > 0).all()
    assert shape[0] == 1 or not torch.equal(x[0], x[1])
    centred = x - x.mean((2, 3), keepdim=True)
    assert (centred[..., 1:] * centred[..., :-1]).mean() > 0.2 * centred.square().mean()
    assert (eigenvalues(x)[:, : max(1, shape[1] // 4)].sum(1) > 0.6).all()


def test_photographs_do_not_touch_the_network(monkeypatch, photographs):
    import socket

    def refuse(*_args, **_options):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(features.load_photographs()) >= 3


def test_spectra_are_as_named():
    flat = eigenvalues(maps("randn", (1, 16, 64, 64)))
    assert flat.max() < 1.3 * flat.min()  # Marchenko-Pastur: ((1 + r) / (1 - r))^2 = 1.28 at r = sqrt(16 / 4096)
    shape = (2, 16, 8, 8)
    low = eigenvalues(maps("rank", shape))
    assert features.rank_of(shape) == 4
    assert (low[:, 3] > 1e-3).all() and (low[:, 4].abs() < 1e-14).all()
    falling = eigenvalues(maps("decay", (1, 16, 64, 64)))[0]
    slope = math.log(falling[0] / falling[15]) / math.log(16)
    assert slope == pytest.approx(2, abs=0.15)


def test_missing_photographs_are_a_message(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    assert bench_soca.main(["--quick", "--shape", "1x2x3x3", "--methods", "eager"]) == 2
    assert "pip install 'isqrt_cov[san]'" in capsys.readouterr().err


# ---- Memory, time, error


def test_kept_for_backward_of_known_functions():
    x = torch.randn(64, 64, requires_grad=True)
    assert measure.kept_for_backward(lambda x: 3 * x, x) == 0
    assert measure.kept_for_backward(lambda x: x * x, x) == 0  # x itself does not count
    assert measure.kept_for_backward(lambda x: x[:, :8].sin().sum(), x) == 0  # nor a view of it
    assert measure.kept_for_backward(lambda x: (3 * x).exp(), x) == x.nbytes
    assert measure.kept_for_backward(lambda x: (y := 3 * x) * y, x) == x.nbytes  # saved twice, held once
    part = measure.kept_for_backward(lambda x: (3 * x)[:8].square().sum(), x)
    assert part == x.nbytes  # a part keeps the whole storage


def test_peak_torch_memory_of_known_functions():
    x = torch.randn(1 << 16)

    def chain():  # y, z = 2 alive; then z, w
        y = x.neg()
        z = y.neg()
        del y
        w = z.neg()
        return w

    measured = measure.peak_torch_memory(chain, CPU)
    assert measured == 2 * x.nbytes
    assert measure.peak_torch_memory(lambda: [x.neg() for _ in range(5)], CPU) == 5 * x.nbytes
    assert measure.peak_torch_memory(lambda: None, CPU) == 0


def test_peak_process_memory_sees_what_torch_does_not():
    size = 32 << 20
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]

    def step():
        block = libc.malloc(size)
        ctypes.memset(block, 1, size)
        libc.free(block)

    try:
        measured = measure.peak_process_memory(step)
    except measure.NotMeasured as error:
        pytest.skip(str(error))
    assert abs(measured - size) < 2 << 20  # the kernel counts pages in portions of 64 for each thread
    assert measure.peak_torch_memory(step, CPU) < 1 << 16


def test_mxm_memory_is_foreseen():
    x = torch.randn(3, 4, 24, 24)
    predicted = methods.mxm_bytes(x.shape, x.itemsize)
    with torch.no_grad():
        measured = measure.peak_torch_memory(lambda: methods.reference.mxm_covariance_pool(x), CPU)
    assert predicted == pytest.approx(measured, rel=0.05)


def test_mxm_is_left_out_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(methods, "available_memory", lambda device: 1 << 20)
    case = methods.make_case(torch.randn(2, 4, 24, 24), 5, "matrix")
    with pytest.raises(methods.Unavailable, match="M x M matrices take .* GiB are free"):
        methods.prepare("mxm", case)


def test_every_method_gets_every_place_and_other_neighbours():
    names = list("abcd")
    orders = [measure.order(names, index) for index in range(32)]
    assert all(sorted(order) == names for order in orders)
    assert orders == [measure.order(names, index) for index in range(32)]
    for name in names:
        assert {order.index(name) for order in orders} == {0, 1, 2, 3}
        assert {order[order.index(name) - 1] for order in orders if order[0] != name} == set(names) - {name}


def test_load_of_others_is_a_share():
    load = measure.OtherLoad()
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:  # own work does not count
        pass
    assert 0 <= load.percent() <= 100


@pytest.mark.parametrize(("ms", "calls", "timed"), ((7.0, 1, 1), (1.0, 5, 2), (1e-4, 50, 2)))
def test_what_takes_longer_than_a_sample_is_called_once_for_it(monkeypatch, ms, calls, timed):
    asked = []
    monkeypatch.setattr(measure, "time_ms", lambda *arguments: asked.append(arguments) or ms)
    assert measure.calls_per_sample(lambda: None, CPU, 5.0) == calls
    assert len(asked) == timed


def test_ratios_are_those_of_the_rounds():
    # A machine that is ten times slower in the last round: each round says 2.
    assert measure.median_ratio([2, 4, 60], [1, 2, 30]) == 2


def test_relative_error_is_that_of_the_worst_sample():
    expected = torch.ones(3, 2, 2, dtype=torch.float64)
    actual = expected.clone()
    actual[1] *= 1.5
    assert measure.relative_error(actual, expected) == pytest.approx(0.5)
    actual[2, 0, 0] = math.nan
    assert math.isnan(measure.relative_error(actual, expected))
    assert measure.relative_error(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.float64)) == 0


@pytest.mark.parametrize("output", ["matrix", "triu", "mean"])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_eager_is_the_function_of_the_oracle(iterations, output):
    case = methods.make_case(maps("decay", SHAPE), iterations, output)
    expected = measure.value_and_gradient(
        lambda x: methods.reference.cov_sqrt(x, iterations, output), case.x, case.upstream
    )
    for actual, oracle in zip(methods.prepare("eager", case).step(), expected, strict=True):
        torch.testing.assert_close(actual, oracle, rtol=1e-10, atol=1e-12)


def test_eig_of_the_smaller_matrix():
    case = methods.make_case(maps("decay", (2, 12, 2, 4)), 5, "matrix")
    assert torch.autograd.gradcheck(lambda x: methods.eig_gram_cov_sqrt(x, "triu", 1e-15), (case.x,))
    root, gradient = methods.prepare("eig_gram", case).step()
    # What the other one clamps at eps of the trace, a square root of that, is zero here.
    torch.testing.assert_close(root, methods.exact_root(case, case.x), rtol=0, atol=1e-7)
    expected = measure.value_and_gradient(partial(methods.gram_root, case), case.x, case.upstream)[1]
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(methods.Unavailable, match="fewer positions than channels"):
        methods.prepare("eig_gram", methods.make_case(maps("decay", SHAPE), 5, "matrix"))
    # Its error in float32 is against the clamp of float32, and its memory is measured, too.
    single = methods.make_case(maps("photo", (2, 24, 3, 5)).float(), 5, "matrix")
    value, gradient = methods.prepare("eig_gram", single).step()
    exact = measure.value_and_gradient(partial(methods.gram_root, single), single.x, single.upstream)
    assert measure.relative_error(value, exact[0]) < 1e-3 and measure.relative_error(gradient, exact[1]) < 2e-2
    assert measure.peak_memory_of_fresh_process("eig_gram", (2, 24, 3, 5), torch.float32, 5, "matrix", {}) > 0


@pytest.mark.parametrize("name", ("ours", "eig", "eager", "baddbmm", "mxm"))
def test_half_precision_is_computed_in_float32(name):
    """Results and gradients are off by the rounding of x's dtype and not by that of a sum in it."""
    x = features.feature_maps("randn", (2, 16, 12, 12), torch.bfloat16, "cpu")
    case = methods.make_case(x, 5, "matrix")
    exact = measure.value_and_gradient(partial(methods.METHODS[name].target, case), case.x, case.upstream)
    value, gradient = methods.prepare(name, case).step()
    assert value.dtype == gradient.dtype == torch.bfloat16
    unit = torch.finfo(torch.bfloat16).eps / 2
    assert measure.relative_error(value, exact[0]) < unit and measure.relative_error(gradient, exact[1]) < unit


def test_upstream_gradient_is_not_symmetric():
    upstream = methods.make_case(torch.randn(SHAPE), 5, "matrix").upstream
    assert not torch.allclose(upstream, upstream.mT)


# ---- Arguments


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--shape", "16x64x48"], "argument --shape: expected BxCxHxW of positive integers.*got '16x64x48'"),
        (["--shape", "0x4x4x4"], "argument --shape:.*'0x4x4x4'"),
        (["--shape", "1x-4x4x4"], "argument --shape:.*'1x-4x4x4'"),
        (["--iterations", "0"], "argument --iterations: expected a positive integer, got '0'"),
        (["--rounds", "few"], "argument --rounds: expected a positive integer, got 'few'"),
        (["--threads", "-1"], "argument --threads"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--methods", "ours", "magic"], "argument --methods: invalid choice: 'magic'"),
        (["--input", "noise"], "argument --input: invalid choice: 'noise'"),
        (["--output", "half"], "argument --output: invalid choice: 'half'"),
        (["--json", "/nowhere/at/all.json"], "argument --json: expected a file in an existing folder.*nowhere"),
        (["--plot", "result.foo"], "argument --plot: 'result.foo': expected an ending of .*png.*, got 'foo'"),
    ],
)
def test_wrong_arguments_are_named(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_soca.parse(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_cuda_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_soca.parse(["--device", "cuda"])
    assert "argument --device: 'cuda' needs a GPU" in capsys.readouterr().err


# ---- A run


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A tiny run with methods that fail at once, at the second call and in the rounds, and two that cannot run here."""
    folder = tmp_path_factory.mktemp("bench")

    def prepare_late(case, good=3):  # preparation, calls per sample, round 1
        prepared, calls = methods.prepare("eager", case), itertools.count(1)

        def step():
            if next(calls) > good:
                raise RuntimeError("too late")
            return prepared.step()

        return methods.Prepared(prepared.forward, step, prepared.function)

    def prepare_never(case):
        raise ValueError("never\nat all")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "late", methods.Method("fails in the rounds", prepare_late))
        second = methods.Method("fails before the rounds", partial(prepare_late, good=1))
        patch.setitem(methods.METHODS, "second", second)
        patch.setitem(methods.METHODS, "never", methods.Method("fails at once", prepare_never))
        patch.setattr(bench_soca, "SAMPLE_MS", 0.0)
        argv = "--quick --shape 2x8x6x6 --rounds 3 --input decay rank".split()
        argv += "--methods eager eig late second never graph ours_graph".split()
        status = bench_soca.main([*argv, "--json", str(folder / "r.json"), "--plot", str(folder / "r.png")])
    assert status == 0
    return json.loads((folder / "r.json").read_text()), folder


def test_record_tells_where_it_comes_from(record):
    result, _ = record
    assert {"benchmark", "format", "date", "machine", "software", "arguments", "meaning", "shapes"} == result.keys()
    assert {"cpu", "cores_usable", "threads", "memory_bytes", "gpu", "system"} <= result["machine"].keys()
    assert {"python", "torch", "git", "isqrt_cov", "float32_matmul_precision"} <= result["software"].keys()
    assert result["software"]["torch"] == torch.__version__
    assert result["arguments"]["rounds"] == 3 and result["arguments"]["dtype"] == "float32"


def test_record_holds_every_sample_and_its_summary(record):
    (entry,) = record[0]["shapes"]
    ran = {method["name"]: method for method in entry["methods"] if method["ran"]}
    assert list(ran) == ["eager", "eig"]
    for method in ran.values():
        for block in ("forward", "forward_backward"):
            timing = method[block]
            assert len(timing["samples_ms"]) == 3 and min(timing["samples_ms"]) > 0
            assert timing["median_ms"] == statistics.median(timing["samples_ms"])
            floors = entry["floor"][block]["samples_ms"]
            assert timing["times_floor"] == pytest.approx(measure.median_ratio(timing["samples_ms"], floors))
            other = ran["eig"][block]["samples_ms"]
            ratio = measure.median_ratio(other, timing["samples_ms"])
            assert timing["speedup_over"]["eig"] == pytest.approx(ratio)
        assert method["memory"]["peak_torch_bytes"] > 2 * 8 * 36 * 4  # dX at least
        assert method["memory"]["kept_for_backward_bytes"] > 0
    assert ran["eig"]["forward"]["speedup_over"]["eig"] == 1
    rates = entry["floor"]
    flops = {name: 2 * int(name.split()[0]) ** 3 for name in rates["gemm_samples_ms"]}
    for index in range(3):
        best = max(flops[name] / samples[index] for name, samples in rates["gemm_samples_ms"].items())
        assert rates["forward"]["samples_ms"][index] >= rates["forward"]["flops"] / best * (1 - 1e-9)
    assert rates["forward"]["ms"] == statistics.median(rates["forward"]["samples_ms"])
    assert rates["gemm_flops_per_s"] > 0
    assert rates["copy_bytes_per_s"] > 0


def test_record_holds_errors_on_every_input(record):
    (entry,) = record[0]["shapes"]
    eager, eig = (method["accuracy"] for method in entry["methods"][:2])
    for kind in ("decay", "rank"):
        # 13 products of 8 terms, each rounded to eps / 2, in random directions: far below 13 * 8 * eps = 1.3e-5.
        assert 0 < eager[kind]["value"] < 1.3e-5 and 0 < eager[kind]["gradient"] < 1.3e-5
        # The clamp raises each of 6 null eigenvalues of A to eps: sqrt(6 eps) = 8e-4 of a root with norm sqrt(t) = 1.
        assert eig[kind]["distance_to_exact_root"] < 1.7e-3
        assert eig[kind]["value_against_truncated"] == pytest.approx(eager[kind]["distance_to_exact_root"], abs=1.7e-3)
    assert eager["decay"]["distance_to_exact_root"] > 1e-2  # 5 steps are not the root


def test_methods_that_do_not_run_are_listed_with_their_reasons(record):
    (entry,) = record[0]["shapes"]
    reasons = {method["name"]: method["reason"] for method in entry["methods"] if not method["ran"]}
    assert reasons == {
        "late": "failed in round 2: RuntimeError: too late",
        "second": "failed before round 1: RuntimeError: too late",
        "never": "ValueError: never",
        "graph": "runs on cuda only",
        "ours_graph": "runs on cuda only",
    }
    text = soca_report.text(entry)
    assert all(f"{name} did not run: {reason}" in text for name, reason in reasons.items())


def test_a_run_without_ours_fails(monkeypatch, capsys):
    def fails(case):
        raise RuntimeError("an illegal instruction")

    monkeypatch.setitem(methods.METHODS, "ours", methods.Method("fails", fails))
    argv = "--quick --shape 2x4x3x3 --rounds 1 --input randn --methods".split()
    assert bench_soca.main([*argv, "eager"]) == 0
    assert bench_soca.main([*argv, "ours", "eager"]) == bench_soca.main([*argv, "ours"]) == 1
    assert "ours did not run: RuntimeError: an illegal instruction" in capsys.readouterr().out


def test_times_are_not_lost_with_what_they_are_compared_with(monkeypatch, tmp_path, capsys):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(measure, "value_and_gradient", too_large)
    file = tmp_path / "r.json"
    argv = "--quick --shape 2x4x3x3 --rounds 1 --input randn --methods eager --json".split()
    assert bench_soca.main([*argv, str(file)]) == 0
    (method,) = json.loads(file.read_text())["shapes"][0]["methods"]
    assert method["forward_backward"]["median_ms"] > 0
    reason = "no float64 to compare with: OutOfMemoryError: no room"
    assert method["accuracy"] == {"randn": {"failed": reason}}
    assert f"eager: accuracy on randn: {reason}" in capsys.readouterr().out


def test_calls_are_compared_with_calls_and_graphs_with_graphs():
    def method(name, **faster):
        return {"name": name, "ran": True, "forward_backward": {"speedup_over": {name: 1.0, **faster}}}

    ours, graph = method("ours", eig=2.0, graph=0.9), method("ours_graph", eig=4.0, ours=2.0, graph=3.0)
    said = ", forward + backward, in times as fast: "
    assert soca_report.ours_lines({"methods": [ours]}) == [f"ours{said}2.00 x eig"]
    both = [f"ours{said}2.00 x eig", f"ours_graph{said}3.00 x graph"]
    assert soca_report.ours_lines({"methods": [ours, graph]}) == both


def test_every_method_has_a_colour():
    assert set(soca_report.COLOURS) == set(methods.METHODS)


def test_commit_is_told_where_there_is_no_checkout(monkeypatch):
    monkeypatch.setattr(report, "_command", lambda *arguments, cwd=None: None)
    monkeypatch.delenv("ISQRT_COMMIT", raising=False)
    assert report.git_commit() is None
    monkeypatch.setenv("ISQRT_COMMIT", "abc-dirty")
    assert report.git_commit() == {"commit": "abc", "uncommitted_changes": True}


def test_figure_is_drawn(record):
    pytest.importorskip("matplotlib")
    assert (record[1] / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_compile_is_left_out_of_a_quick_run_unless_asked_for():
    arguments = bench_soca.parse(["--quick"])
    assert "compile" in arguments.methods and not arguments.asked_methods
    assert not methods.METHODS["compile"].quick


# ---- Text


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        (math.nan, "nan"),
        (0.0, "0"),
        (0.1234, "0.123"),
        (0.001234, "0.00123"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (1234.5, "1234"),
        (1.234e-6, "1.23e-6"),
        (1.234e7, "1.23e+7"),
    ],
)
def test_numbers_are_rounded_to_three_digits(value, text):
    assert report.number(value) == text


def test_json_has_no_nan(tmp_path):
    report.write_json(tmp_path / "a.json", {"a": [math.nan, 1.5, math.inf], "b": {"c": (1, "x")}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5, None], "b": {"c": [1, "x"]}}
