"""Memory in large pages on Linux, which the C library must be told before a program begins.

What XLA computes with on a CPU is taken from the system and given back at every call: hundreds of
MB, which in pages of 4 KiB cost about a tenth of the time of a training step. Where the kernel
gives large pages to who asks, glibc 2.35 or later asks if its variable says so, and it reads that
when a process starts.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def variables(environ: Mapping[str, str], kernel: str, libc: str) -> dict[str, str]:
    """What must be set in ``environ``: nothing where large pages come anyway or not at all, or
    where the tunable has been chosen already.

    ``kernel`` are the choices of the kernel, the chosen one in brackets; ``libc`` its name and
    version.
    """
    name, _, version = libc.partition(" ")
    recent = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    known = environ.get("GLIBC_TUNABLES", "")
    if "[madvise]" not in kernel or not recent or TUNABLE in known:
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, [known, f"{TUNABLE}=1"]))}


def use() -> None:
    """Starts this program anew with large pages if it has to, in the same process: to be called
    before it has done anything."""
    try:
        kernel, libc = KERNEL.read_text(), os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError, AttributeError):
        return
    wanted = variables(os.environ, kernel, libc)
    if wanted:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})
