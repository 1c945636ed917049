"""The CPU engine under sanitizers: its memory, and the threads that share its work."""

import pytest

from emulation.sanitize import run


# One sample, and as many channels and positions as it takes for threads to share its loops; and several small ones.
@pytest.mark.parametrize("mode", ("address", "thread"))
def test_sanitizers_find_nothing_in_the_cpu_engine(mode):
    status, output = run("cpu_check", mode, *(1, 129, 129), *(3, 17, 9), *(2, 1, 5), *(2, 20, 300))
    assert status == 0, output[:4000]
