"""Values come in order, a bounded number early, and no thread outlives the iterator."""

import subprocess
import sys
import threading
import time

import pytest

from attnlab.data.prefetch import prefetch
from attnlab.errors import DataError


def reading_threads():
    return [thread for thread in threading.enumerate() if "prefetch" in thread.name]


def test_values_come_in_order_however_long_each_takes():
    def slow_when_even(step):
        time.sleep(0.002 * (step % 2 == 0))
        return step

    values = prefetch(slow_when_even, 5, threads=4)
    assert [next(values) for _ in range(20)] == list(range(5, 25))
    values.close()


def test_closing_ends_the_threads():
    values = prefetch(lambda step: step, 0)
    next(values)
    assert reading_threads()
    values.close()
    assert not reading_threads()


def test_dropping_the_iterator_ends_the_threads():
    values = prefetch(lambda step: step, 0)
    next(values)
    del values
    assert not reading_threads()


def test_a_program_that_ends_with_it_says_nothing():
    use = "import jax; from attnlab.data.prefetch import prefetch; v = prefetch(str, 0); next(v)"
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_exception_comes_out_at_its_step_and_ends_the_threads():
    def fail_at_three(step):
        if step == 3:
            raise DataError("step three")
        return step

    values = prefetch(fail_at_three, 0)
    assert [next(values) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="step three"):
        next(values)
    assert not reading_threads()


def test_reading_ahead_is_bounded():
    made = []
    values = prefetch(lambda step: made.append(step) or step, 0, ahead=3)
    next(values)
    values.close()
    assert max(made) <= 3
