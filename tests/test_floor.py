"""The floor charges what is needed: work counted by hand, and by running the recurrences that it counts."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import floor
import methods


@pytest.mark.parametrize(
    "iterations, output, expected",
    [
        (1, "matrix", (1, 3)),  # A A; then, in direction G, G A + A G, and Y_1 for <G, Y_1>
        (2, "matrix", (3, 9)),  # S, S S, Y; or 1 + T, Y
        (3, "matrix", (5, 15)),  # 1 + T, S, S S, Y
        (4, "matrix", (7, 21)),  # S, S S, Y + T, S, S S, Y
        (5, "matrix", (10, 30)),
        (5, "triu", (10, 30)),
        (5, "mean", (8, 27)),  # S, S S, Y + T, S, S S, Y, Z; 1 + 15 + 11
        (2, "mean", (1, 6)),
        (1, "mean", (0, 0)),
    ],
)
def test_half_products_by_hand(iterations, output, expected):
    assert floor.flops.half_products(iterations, output) == expected


def test_tangent_recurrence_is_what_is_counted():
    """The gradient in as many half products as the floor charges: the recurrence is run, and its products counted."""
    torch.manual_seed(0)
    count = 0

    def product(p, q):  # of symmetric matrices that commute: one triangle
        nonlocal count
        count += 1
        return p @ q

    def symmetric_sum(p, q):  # p q + q p: one triangle of both products
        nonlocal count
        count += 2
        return p @ q + q @ p

    def mixed(p, q, r, s):  # p q + r s, which is symmetric
        nonlocal count
        count += 2
        return p @ q + r @ s

    n, steps = 6, 5
    a = torch.randn(n, n, dtype=torch.float64)
    a = (a @ a.mT / (a @ a.mT).trace()).requires_grad_()
    g = torch.randn(n, n, dtype=torch.float64)
    y_n, _ = methods.reference.newton_schulz(a[None], steps)
    (expected,) = torch.autograd.grad(y_n[0], a, g)
    a = a.detach()
    g = (g + g.mT) / 2

    # First step, from Z = I and Zt = 0; then two at once.
    y, yt = 1.5 * a - 0.5 * product(a, a), 1.5 * g - 0.5 * symmetric_sum(g, a)
    z, zt = 1.5 * torch.eye(n, dtype=a.dtype) - 0.5 * a, -0.5 * g
    for step in range(1, steps, 2):
        t, tt = product(z, y), mixed(zt, y, z, yt)
        s, st = product(t, t) - 4.5 * t, symmetric_sum(t, tt) - 4.5 * tt
        v = (27 * s - 34.5 * t + 4 * product(s, s)) / 64
        vt = (27 * st - 34.5 * tt + 4 * symmetric_sum(s, st)) / 64
        new_y, yt = 2.25 * y + product(y, v), 2.25 * yt + mixed(yt, v, y, vt)
        if step + 2 < steps:
            z, zt = 2.25 * z + product(v, z), 2.25 * zt + mixed(vt, z, v, zt)
        y = new_y
    assert count == floor.flops.half_products(steps, "matrix")[1]
    torch.testing.assert_close(y, y_n[0].detach())
    torch.testing.assert_close(yt, (expected + expected.mT) / 2)


def test_work_by_hand():
    # B = 2, C = 3, M = 4 * 5 = 20, N = 5, float32.
    forward, step = floor.work((2, 3, 4, 5), 5, "matrix", 4)
    assert forward.flops == 2 * (9 * 20 + 10 * 27)
    assert step.flops == 2 * (9 * 20 + 10 * 27 + 30 * 27 + 2 * 9 * 20)
    assert forward.bytes == 2 * 4 * (3 * 20 + 9)
    # x twice, dX, output, upstream gradient, and the kept matrix written and read.
    assert step.bytes == 2 * 4 * (3 * 3 * 20 + 4 * 9)
    forward, step = floor.work((2, 3, 4, 5), 5, "triu", 8)
    assert forward.bytes == 2 * 8 * (3 * 20 + 6)
    assert step.bytes == 2 * 8 * (3 * 3 * 20 + 2 * 6 + 2 * 9)
    forward, _ = floor.work((2, 3, 4, 5), 5, "mean", 4)
    assert forward.flops == 2 * (9 * 20 + 8 * 27 + 3 * 2 * 9)
    assert forward.bytes == 2 * 4 * (3 * 20 + 3)


def test_work_by_hand_of_fewer_positions():
    # B = 2, C = 30, M = 11, N = 5, float32: 10 and 30 half products of 10 x 10 matrices.
    forward, step = floor.work((2, 30, 1, 11), 5, "matrix", 4)
    assert forward.flops == 2 * (30 * 100 + 10 * 1000 + 2 * 30 * 100 + 900 * 10)
    assert step.flops == forward.flops + 2 * (2 * 900 * 10 + 30 * 100 + 30 * 1000 + 4 * 30 * 100)
    assert step.bytes == 2 * 4 * (3 * 30 * 11 + 2 * 900 + 2 * 100)
    forward, step = floor.work((2, 30, 1, 11), 5, "mean", 4)
    assert forward.flops == 2 * (30 * 100 + 8 * 1000 + 4 * 300 + 2 * 100 + 6 * 100)
    assert step.flops == forward.flops + 2 * (27 * 1000 + 2 * 30 * 100 + 8 * 300)
    forward, _ = floor.work((2, 30, 1, 11), 2, "matrix", 4)
    assert forward.flops == 2 * (30 * 100 + 2 * 1000 + 2 * 30 * 100 + 900 * 10)  # T = K; S, S S: Z is a sum
    # Where the products beside the iteration outweigh it, it is done by channels: 40 C^3 against 40 n^3 and these.
    _, step = floor.work((1, 30, 1, 30), 5, "matrix", 4)
    assert step.flops == 900 * 30 + 40 * 27000 + 2 * 900 * 30


def test_floor_is_the_greater_of_arithmetic_and_traffic():
    work = floor.Work(flops=2_000_000, bytes=3_000_000)
    assert floor.floor_ms(work, gemm_flops_per_s=1e9, copy_bytes_per_s=1e10) == pytest.approx(2.0)
    assert floor.floor_ms(work, gemm_flops_per_s=1e9, copy_bytes_per_s=1e9) == pytest.approx(3.0)
