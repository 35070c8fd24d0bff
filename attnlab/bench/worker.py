"""The process that measures one subject: ``python -m attnlab.bench.worker``, told by its stdin.

The first line says what, as JSON; every line after it asks for one call. It answers each with a
line of JSON: first what compiling took and what the call is worth, then the seconds of each call,
on the wall and of all processors together. So a parent may ask two of them in turn. An error is
answered with {"error", "code"} and ends it.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnlab.errors import AttnlabError, UserError

SHORT = ("RESOURCE_EXHAUSTED", "Out of memory", "can't allocate memory")  # of jax and torch


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    asked = json.loads(sys.stdin.readline())
    try:
        pin(asked["threads"])
        limit_memory()
        call = prepare(asked, answers)
        for _ in sys.stdin:
            wall, processors = time.perf_counter(), time.process_time()
            call()
            measured = {
                "wall": time.perf_counter() - wall,
                "cpu": time.process_time() - processors,
                "peak": peak_memory(),
            }
            answers.write(json.dumps(measured) + "\n")
        return 0
    except AttnlabError as error:
        answers.write(json.dumps({"error": str(error), "code": error.code}) + "\n")
        return error.code
    except Exception as error:
        if not any(word in str(error) for word in SHORT) and not isinstance(error, MemoryError):
            raise
        said = str(error).strip().partition("\n")[0]
        answers.write(
            json.dumps({"error": f"out of memory: {said}", "code": UserError.code}) + "\n"
        )
        return UserError.code


def limit_memory() -> None:
    """Keeps this process to the memory that is free now, and offers it first where the system must
    kill: what is too large is then an error of its own, no fall of the machine. Where the system
    knows no such limits there are none."""
    with contextlib.suppress(ImportError, OSError, ValueError, StopIteration):
        import resource

        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(z.split()[1]) for z in lines if z.startswith("MemAvailable:"))
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        known = [each for each in (soft, hard, free) if each != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(known), hard))
        Path("/proc/self/oom_score_adj").write_text("1000")


def pin(threads: int) -> None:
    """Keeps this process to so many processors (0: all); before anything starts threads."""
    chosen = choose_processors(threads)
    if chosen:
        os.sched_setaffinity(0, chosen)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def choose_processors(threads: int) -> list[int]:
    """Which processors that keeps it to; none for all. Raises `UserError` without so many."""
    if not threads:
        return []
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(f"--threads={threads}: this system cannot pin a process; leave it out")
    known = sorted(os.sched_getaffinity(0))
    if threads > len(known):
        raise UserError(f"--threads={threads}: this process may use {len(known)}")
    return known[:threads]


def prepare(asked: dict[str, Any], answers: Any) -> Callable[[], Any]:
    """Builds the subject, or the peer, says what it is, and returns its call, warm."""
    from attnlab.bench.peers import build_peer
    from attnlab.bench.subjects import build
    from attnlab.config import from_json

    said = hear_engines()
    config = from_json(json.dumps(asked["config"]), "the config")
    what = config, asked["mode"], asked["length"]
    subject = build_peer(asked["peer"], *what) if asked.get("peer") else build(*what)
    subject.call()
    import jax

    about = {
        "tokens": subject.tokens,
        "flops": subject.flops,
        "state": subject.state,
        "compiling": subject.compiling,
        "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "engines": said,
    }
    answers.write(json.dumps(about) + "\n")
    return subject.call


def hear_engines() -> list[str]:
    """Filled with what engines say on the log: which arithmetic serves them, and why."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    engines = logging.getLogger("attnlab.engines")
    engines.setLevel(logging.INFO)
    engines.addHandler(listener)
    return said


def peak_memory() -> int:
    """As `attnlab.progress.peak_memory`: of the accelerator, or of this process."""
    from attnlab.progress import peak_memory

    return peak_memory()


if __name__ == "__main__":
    sys.exit(main())
