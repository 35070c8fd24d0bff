"""The command line asks for memory as XLA needs it, once, and keeps what was asked before."""

import os
import subprocess
import sys

import pytest

from attnlab import large_pages

ASKS = "always [madvise] never"
CHOSEN = "GLIBC_TUNABLES"


KEPT = "glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184"


@pytest.mark.parametrize(
    ("known", "kernel", "libc", "wanted"),
    [
        ("", ASKS, "glibc 2.36", f"{KEPT}:glibc.malloc.hugetlb=1"),
        ("a.b=1", ASKS, "glibc 2.36", f"a.b=1:{KEPT}:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", ASKS, "glibc 2.36", f"glibc.malloc.hugetlb=0:{KEPT}"),
        (f"{KEPT}:glibc.malloc.hugetlb=1", ASKS, "glibc 2.36", None),
        ("", "[always] madvise never", "glibc 2.36", KEPT),
        ("", "always madvise [never]", "glibc 2.36", KEPT),
        ("", ASKS, "glibc 2.34", None),
        ("", ASKS, "", None),
    ],
)
def test_asked_for_where_it_helps(known, kernel, libc, wanted):
    found = large_pages.variables({CHOSEN: known} if known else {}, kernel, libc)
    assert found.get(CHOSEN) == wanted


def test_a_program_starts_anew_once_with_its_arguments():
    code = "import os, sys; from attnlab import large_pages; large_pages.use(); "
    code += "print(os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES'))"
    environ = {k: v for k, v in os.environ.items() if k != CHOSEN}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "a b", "--c=ü"],
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
    )
    said, _ = process.communicate()
    try:
        kernel, libc = large_pages.KERNEL.read_text(), os.confstr("CS_GNU_LIBC_VERSION") or ""
        wanted = large_pages.variables(environ, kernel, libc).get(CHOSEN)
    except (OSError, ValueError, AttributeError):
        wanted = None
    assert said.strip() == f"{process.pid} {['a b', '--c=ü']} {wanted}"
