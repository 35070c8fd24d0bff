"""Read ahead by threads, in order.

Batches are pure functions of the step, so there is no iterator state to save: to resume is to start
at another step.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(
    make: Callable[[int], T], start: int, *, threads: int = 2, ahead: int = 8
) -> Iterator[T]:
    """``make(start), make(start + 1), ...`` without end, up to `ahead` of them computed early.

    An exception of `make` is raised at its step. Closing the iterator, or dropping it, ends the
    threads after what they are computing.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    finalizing = sys.is_finalizing  # a name of a module may be gone by then
    try:
        waiting = deque(pool.submit(make, start + n) for n in range(ahead))
        start += ahead
        while True:
            ready = waiting.popleft().result()
            waiting.append(pool.submit(make, start))
            start += 1
            yield ready
    finally:
        if not finalizing():  # after which the threads have ended and their module may be empty
            pool.shutdown(cancel_futures=True)
