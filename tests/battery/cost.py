"""Declared growth is real growth: counted, and measured in a process of its own."""

import math
import os
import subprocess
import sys

import numpy as np

import attnlab
from attnlab.core import Mechanism
from battery.cases import BATCH, DIMS, Case, key_of

FAR = 2**17
"""A length at which the leading term decides."""


def check_declared_growth(case: Case) -> None:
    """`flops` is positive, never falls, and grows with the exponent ``cost.time``; a causal mask
    never costs more; a state of its own, and no more, is what ``cost.state`` < 1 promises."""
    mechanism, cost = case.mechanism, case.mechanism.cost
    counts = [mechanism.flops(DIMS, n) for n in range(1, 65)]
    assert counts[0] > 0
    assert counts == sorted(counts)
    for causal in (True, False):
        low, high = (mechanism.flops(DIMS, n, causal) for n in (FAR, 2 * FAR))
        assert abs(math.log2(high / low) - cost.time) < 0.15
    assert mechanism.flops(DIMS, FAR) <= mechanism.flops(DIMS, FAR, causal=False)
    compact = mechanism.initial_state(DIMS, BATCH) != () and not mechanism.recalls
    assert compact == (cost.state < 1)


def check_measured_memory(case: Case, lengths: tuple[int, ...] = (4096, 8192, 16384)) -> None:
    """Peak memory of a forward and backward pass grows no faster than ``cost.memory`` declares,
    read off the two longest of N, 2N, 4N; half a power is what allocators may blur."""
    used = np.asarray([memory_of_a_gradient(case, n) for n in lengths])
    exponent = math.log2(used[-1] / used[-2])
    assert exponent < case.mechanism.cost.memory + 0.5, f"{used / 2**20} MiB at {lengths}"


CHILD = """
import sys
from contextlib import suppress
import jax, jax.numpy as jnp
from attnlab.core import Dims, Keys, Queries, Rule, mechanisms, positions
from attnlab.progress import peak_memory
mechanism, place, causal, N = eval(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
position = positions.get(place)()
dims = Dims(64, 4, 2, 16, 16)
params, place = mechanism.init(jax.random.key(0), dims), position.init(jax.random.key(1), dims)
pos = jnp.arange(N, dtype=jnp.int32)[None]
rule = Rule(place, position, causal == "True")
def loss(q, k, v, x):
    keys = Keys(k, v, pos, pos * 0)
    key = jax.random.key(2)
    out = mechanism(params, Queries(q, pos, pos * 0), keys, rule, x=x, key=key).out
    return jnp.sum(out * out)
tokens = [jnp.ones((1, N, heads, 16)) for heads in (4, 2, 2)] + [jnp.ones((1, N, 64))]
step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*tokens).compile()
with suppress(OSError), open("/proc/self/clear_refs", "w") as marks:
    marks.write("5")  # forgets the peak, which compiling may have reached
before = peak_memory()
jax.block_until_ready(step(*tokens))
print(peak_memory() - before)
"""


def expression(mechanism: Mechanism) -> str:
    """What makes this mechanism where the registry is known."""
    fields = []
    for name, value in vars(mechanism).items():
        parts = isinstance(value, tuple) and value and isinstance(value[0], Mechanism)
        text = f"({' '.join(expression(part) + ',' for part in value)})" if parts else repr(value)
        fields.append(f"{name}={text}")
    return f"mechanisms.get({key_of(mechanism)!r})({', '.join(fields)})"


def memory_of_a_gradient(case: Case, length: int) -> int:
    """Bytes by which a fresh process grows, at most, while it takes one gradient, compiled."""
    arguments = expression(case.mechanism), case.place, str(case.causal), str(length)
    root = os.path.dirname(os.path.dirname(attnlab.__file__))
    # Compiled as users compile it, which decides what is ever in memory.
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)
