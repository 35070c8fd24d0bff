"""Declared growth is real growth: counted, and measured in a process of its own. Declared FLOPs are
those that programs execute."""

import itertools
import math
import os
import subprocess
import sys
from unittest import mock

import jax
import numpy as np

import attnlab
from attnlab.core import Dims, Mechanism
from attnlab.engines import blockwise
from attnlab.model import initial_memory
from battery import counting
from battery.calls import attend, cotangent_of, evaluate
from battery.cases import BATCH, DIMS, Case, Inputs, draw, key_of
from battery.network import network_of

FAR = 2**17
"""A length at which the leading term decides."""

LENGTHS = (512, 1024, 2048)
"""Where FLOPs are counted."""

FINE = 4
"""Tokens of a tile that hardly reaches beyond what the mask leaves."""


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


def check_declared_state(case: Case) -> None:
    """What decoding remembers grows with the exponent ``cost.state``, between three lengths."""
    architecture = network_of(case).architecture

    def bytes_of(length: int) -> int:
        arrays = jax.eval_shape(
            lambda: initial_memory(architecture, (case.mechanism,), BATCH, length)
        )
        return sum(z.size * z.dtype.itemsize for z in jax.tree.leaves(arrays))

    used = [bytes_of(n) for n in (FAR, 2 * FAR, 4 * FAR)]
    exponents = [math.log2(b / a) for a, b in itertools.pairwise(used)]
    assert np.allclose(exponents, case.mechanism.cost.state, atol=0.05)


def check_counted_flops(case: Case, length: int = 1024, kv_heads: int = 1) -> None:
    """`flops` is what a forward pass executes: no less, and no more than a fifth more, which is for
    the borders of fine tiles."""
    inputs, promised = counted(case, length, kv_heads)
    with mock.patch.object(blockwise, "tile_size", return_value=FINE):
        done = counting.count(lambda z: attend(case, z).out, inputs)
    assert 0.95 < done / promised < 1.2, f"executes {done:.4g}, promises {promised:.4g}"


def check_counted_gradient(case: Case, length: int = 1024, kv_heads: int = 1) -> None:
    """Forward and backward pass execute some three times the forward pass: two products for each
    one of it, less where nothing flows back; at most one more where it is done again, and half of
    one where the engine then makes its logits once more by itself. Where nothing is asked, only
    values flow back: one product for each."""
    inputs, _ = counted(case, length, kv_heads)
    cotangent = jax.numpy.asarray(cotangent_of(inputs))
    with mock.patch.object(blockwise, "tile_size", return_value=FINE):
        done = counting.count(lambda z: evaluate(case, z, cotangent, own_loss=False), inputs)
        forward = counting.count(lambda z: attend(case, z).out, inputs)
    asked = case.mechanism.source(inputs.x, inputs.x, inputs.pos) is not None
    assert (2.5 if asked else 1.9) < done / forward < 4.5, (
        f"executes {done:.4g}, {forward:.4g} forward"
    )


def counted(case: Case, length: int, kv_heads: int) -> tuple[Inputs, float]:
    """One sequence of an unmarked text, and its `flops`."""
    dims = Dims(width=256, heads=4, kv_heads=kv_heads, key_dim=64, value_dim=64)
    inputs = draw(case, 1, length, dims)
    if case.mechanism.marked:
        inputs = inputs._replace(unit=np.zeros_like(inputs.pos))
    return inputs, case.mechanism.flops(dims, length, case.causal)


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
