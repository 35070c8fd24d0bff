"""Memory that is kept, in large pages, on Linux, which the C library must be told before a program
begins.

What XLA computes with on a CPU is taken from the system and given back at every call: GBs, which
in pages of 4 KiB cost a fifth of the time of a training step. So the library is told to keep what
it was given back, up to the most that was ever in use, and, where the kernel gives large pages to
who asks, to ask. It reads that when a process starts.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

KEPT = {"glibc.malloc.mmap_threshold": 2**34, "glibc.malloc.trim_threshold": 2**34}
LARGE = {"glibc.malloc.hugetlb": 1}
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def variables(environ: Mapping[str, str], kernel: str, libc: str) -> dict[str, str]:
    """What must be set in ``environ``: nothing where the library does not know it, or where it has
    been chosen already.

    ``kernel`` are the choices of the kernel, the chosen one in brackets; ``libc`` its name and
    version.
    """
    name, _, version = libc.partition(" ")
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return {}
    known = environ.get("GLIBC_TUNABLES", "")
    wanted = KEPT | (LARGE if "[madvise]" in kernel else {})
    added = [f"{key}={value}" for key, value in wanted.items() if key not in known]
    return {"GLIBC_TUNABLES": ":".join(filter(None, [known, *added]))} if added else {}


def use() -> None:
    """Starts this program anew with those variables if it has to, in the same process: to be called
    before it has done anything."""
    try:
        kernel, libc = KERNEL.read_text(), os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError, AttributeError):
        return
    wanted = variables(os.environ, kernel, libc)
    if wanted:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})
