"""One setting for all tests: eight virtual CPU devices, exact products, compilation quick, kept."""

import gc
import os
from pathlib import Path

import jax
import pytest

CACHE = Path(__file__).parents[1] / ".jax_cache"
FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    # A flag that XLA does not know ends the process; newer ones have lost this.
    *(("--xla_cpu_use_fusion_emitters=false",) if jax.__version_info__ < (0, 11) else ()),
)
"""Arithmetic is under test, not speed: so programs compile in less than half the time. Read at the
first use of a device, and by the processes that tests start."""

os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", "")))
jax.config.update("jax_num_cpu_devices", 8)  # must precede the first use of a device
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Tracing makes objects by the million and keeps nearly all: looking for garbage after every 700 of
# them takes a seventh of the time.
gc.set_threshold(100_000, 10, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """One worker takes a whole file, unless its tests say how they belong together. First,
    because xdist reads the marks in the same hook."""
    for item in items:
        if not any(item.iter_markers("xdist_group")):
            item.add_marker(pytest.mark.xdist_group(item.location[0]))


def pytest_runtest_teardown(item, nextitem):
    """Forget what was compiled when the next test belongs elsewhere: programs that nobody calls
    again fill the memory, and a process may map only so many of them."""
    if nextitem is not None and group_of(nextitem) != group_of(item):
        jax.clear_caches()


def group_of(item):
    return next(item.iter_markers("xdist_group")).args
