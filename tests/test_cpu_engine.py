"""The CPU engine under sanitizers: its memory, and the threads that share its work."""

import itertools

import pytest

from emulation.sanitize import run

# One sample, and as many channels and positions as it takes for threads to share its loops, those of its Gram matrix,
# too; and several small ones.
SHAPES = ((1, 129, 126), (3, 17, 9), (2, 1, 5), (2, 20, 300))


@pytest.mark.parametrize("mode", ("address", "thread"))
def test_sanitizers_find_nothing(mode):
    status, output = run("cpu_check", mode, *itertools.chain(*SHAPES))
    assert status == 0, output[:4000]
