"""`blockwise` as Mosaic kernels, for a TPU: the last axis of the grid runs over tiles in reach.

It is as long as the longest list of them. A step beyond the end of its own list names the tile
before again, which is not fetched twice, and computes nothing. Running sums live in scratch memory
from the first step of a tile to the last. dk and dv: one tile of keys of one kv head, over all
query heads of its group.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnlab.core import Array, Rule
from attnlab.engines.kernels import Form, steps
from attnlab.engines.kernels.operands import (
    Operands,
    Side,
    Visits,
    row_spec,
    specs_of,
    tile_spec,
)

LANES = 128
LARGEST_TABLE = 2**17
"""Most pairs of tiles of a batch, int32 each: half of the memory for scalars."""
PRECISIONS = ("default", "fastest", "bfloat16", "highest", "float32")
"""Of products, as jax calls them: the compiler has no other."""
WIDEST = 1024
"""Bytes of the widest head."""


def tile_sizes(length: int, keys: int, size: int, dtype: Any, limit: int | None) -> tuple[int, int]:
    """Tokens per tile of queries and of keys: whole vectors of lanes, at most 512, and few of them
    empty, whatever the ``size`` and the type of heads."""

    def fit(tokens: int) -> int:
        most = max(LANES, min(512, (limit or 512) // LANES * LANES))
        return min(most, -(-tokens // LANES) * LANES)

    return fit(length), fit(keys)


def padded(size: int) -> int:
    """The width of a tile that holds heads of ``size``: whole vectors of lanes, as it would take in
    memory anyway."""
    return -(-size // LANES) * LANES


def forward(form: Form, rule: Rule, operands: Operands, visits: Visits) -> list[Array]:
    """``out`` [B H N E] in the dtype of v, and ``lse`` [B H 1 N] f32."""
    (B, H, N, _), E = operands.q.shape, operands.v.shape[-1]

    def forward_kernel(near, count, operands, out, lse, top, total, value):
        begins, meets, ends = _phases(count, 1)

        @pl.when(begins)
        def _():
            for ref, start in zip((top, total, value), steps.begin(form.n, E)):
                ref[...] = start

        @pl.when(meets)
        def _():
            before = steps.Running(top[...], total[...], value[...])
            asking = jax.tree.map(_column, operands.asking)
            after = steps.fold(rule, before, operands.q[...], asking, _answered(operands, _row))
            for ref, now in zip((top, total, value), after):
                ref[...] = now

        @pl.when(ends)
        def _():
            found = steps.end(steps.Running(top[...], total[...], value[...]))
            out[...] = found[0].astype(out.dtype)
            lse[...] = jnp.broadcast_to(found[1], (form.n, LANES)).T[:1]

    queries, keys = _per_query_tile(form, operands)
    column = pltpu.VMEM((form.n, 1), jnp.float32)
    return _run(
        form,
        forward_kernel,
        (B, H, N // form.n, _longest(visits)),
        (queries, keys),
        [tile_spec(queries, E), row_spec(queries)],
        [
            jax.ShapeDtypeStruct((B, H, N, E), operands.v.dtype),
            jax.ShapeDtypeStruct((B, H, 1, N), jnp.float32),
        ],
        [column, column, pltpu.VMEM((form.n, E), jnp.float32)],
        operands,
        visits,
    )


def backward_queries(form: Form, rule: Rule, operands: Operands, visits: Visits) -> Array:
    """dq [B H N D], in the dtype of q."""
    B, H, N, D = operands.q.shape

    def dq_kernel(near, count, operands, dq, total):
        def add():
            asked, keys = _asked(operands, _column), _answered(operands, _row)
            total[...] += steps.pull_queries(rule, asked, keys)

        _accumulate(_phases(count, 1), add, (total,), (dq,))

    queries, keys = _per_query_tile(form, operands)
    return _run(
        form,
        dq_kernel,
        (B, H, N // form.n, _longest(visits)),
        (queries, keys),
        [tile_spec(queries, D)],
        [jax.ShapeDtypeStruct((B, H, N, D), operands.q.dtype)],
        [pltpu.VMEM((form.n, D), jnp.float32)],
        operands,
        visits,
    )[0]


def backward_keys(form: Form, rule: Rule, operands: Operands, visits: Visits) -> list[Array]:
    """dk [B G M D] and dv [B G M E], in the dtypes of k and v; ``visits`` are those of keys."""
    (B, G, M, D), E = operands.k.shape, operands.v.shape[-1]
    shared = operands.q.shape[1] // G

    def dkv_kernel(near, count, operands, dk, dv, dk_total, dv_total):
        def add():
            more = steps.pull_keys(rule, _asked(operands, _row), _answered(operands, _column))
            dk_total[...] += more[0]
            dv_total[...] += more[1]

        _accumulate(_phases(count, shared), add, (dk_total, dv_total), (dk, dv))

    def met(b, g, i, s, near, count):
        row, step = b * (M // form.m) + i, lax.div(s, shared)
        return b, g * shared + lax.rem(s, shared), _other(row, step, near, count)

    queries = Side(None, form.n, met)
    keys = Side(None, form.m, lambda b, g, i, *_: (b, g, i))
    return _run(
        form,
        dkv_kernel,
        (B, G, M // form.m, _longest(visits) * shared),
        (queries, keys),
        [tile_spec(keys, D), tile_spec(keys, E)],
        [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in (operands.k, operands.v)],
        [pltpu.VMEM((form.m, size), jnp.float32) for size in (D, E)],
        operands,
        visits,
    )


def _per_query_tile(form: Form, operands: Operands) -> tuple[Side, Side]:
    """One tile of queries, and the tile of keys that it meets at a step."""
    shared, tiles = operands.q.shape[1] // operands.k.shape[1], operands.q.shape[2] // form.n

    def met(b, h, i, s, near, count):
        return b, lax.div(h, shared), _other(b * tiles + i, s, near, count)

    return Side(None, form.n, lambda b, h, i, *_: (b, h, i)), Side(None, form.m, met)


def _other(row, s, near, count):
    """The tile of the other side at step ``s`` of a row of `Visits`, the last beyond its end."""
    others = near.shape[0] // count.shape[0]
    return near[row * others + jnp.clip(s, 0, jnp.maximum(count[row] - 1, 0))]


def _longest(visits: Visits) -> Array:
    """Steps of the longest list: at least one, in which empty tiles are written."""
    return jnp.maximum(jnp.max(visits.count), 1)


def _phases(count: Any, heads: int) -> tuple[Array, Array, Array]:
    """Whether this step is the first of its tile, meets a tile, and is the last."""
    step = pl.program_id(3)
    row = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    return step == 0, step < count[row] * heads, step == pl.num_programs(3) - 1


def _accumulate(phases, add: Callable[[], None], totals: tuple, outs: tuple) -> None:
    """``outs`` are the sums of what ``add`` adds to ``totals``, from 0."""
    begins, meets, ends = phases

    @pl.when(begins)
    def _():
        for total in totals:
            total[...] = jnp.zeros(total.shape, total.dtype)

    pl.when(meets)(add)

    @pl.when(ends)
    def _():
        for out, total in zip(outs, totals):
            out[...] = total[...].astype(out.dtype)


def _row(ref: Any) -> Array:
    """[1 tokens], as it lies in memory."""
    return ref[...]


def _column(ref: Any) -> Array:
    """[tokens 1], by a transposition of whole vectors, which every generation has."""
    return jnp.broadcast_to(ref[...], (LANES, ref.shape[-1])).T[:, :1]


def _answered(operands: Operands, laid: Callable[[Any], Array]) -> steps.Answered:
    tokens = jax.tree.map(laid, operands.answering)
    return steps.Answered(operands.k[...], operands.v[...], tokens)


def _asked(operands: Operands, laid: Callable[[Any], Array]) -> steps.Asked:
    row = laid(operands.lse), laid(operands.delta)
    tokens = jax.tree.map(laid, operands.asking)
    return steps.Asked(operands.q[...], operands.d_out[...], *row, tokens)


def _run(form, kernel, grid, sides, specs, shapes, scratch, operands, visits) -> list[Array]:
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[specs_of(operands, *sides)],
            out_specs=specs,
            scratch_shapes=scratch,
        ),
        interpret=form.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
    )(visits.near, visits.count, operands)
