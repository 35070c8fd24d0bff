"""Attention as Mosaic kernels, for a TPU: the last axis of the grid runs over pairs of tiles.

A step is a pair that meets, row by row of `Visits`. Running sums live in scratch memory from the
first step of a row to its last. dk and dv: one tile of keys of one kv head, over all query heads of
its group.
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
    row_spec,
    specs_of,
    tile_spec,
)
from attnlab.engines.kernels.visits import Visits

LANES = 128
LARGEST_TABLE = 2**17
"""Most pairs of tiles of a batch, int32 each: half of the memory for scalars."""
EACH_ALONE = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
"""For programs that leave nothing to each other."""
LARGEST_STATE = 2**18
"""Most numbers of the state of a recurrence."""
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


def chunk_size(length: int) -> int:
    """Tokens per chunk of a recurrence."""
    return LANES


def padded(size: int) -> int:
    """The width of a tile that holds heads of ``size``: whole vectors of lanes, as it would take in
    memory anyway."""
    return -(-size // LANES) * LANES


def forward(form: Form, rule: Rule, operands: Operands, visits: Visits) -> list[Array]:
    """``out`` [B H N E] in the dtype of v, and ``lse`` [B H 1 N] f32."""
    (B, H, N, _), (_, _, M, E) = operands.q.shape, operands.v.shape

    def forward_kernel(pair, operands, out, lse, top, total, value):
        begins, ends = _phases(pair, M // form.m, 1)

        @pl.when(begins)
        def _():
            for ref, start in zip((top, total, value), steps.begin(form.n, E)):
                ref[...] = start

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
        H,
        1,
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
    (B, H, N, D), M = operands.q.shape, operands.k.shape[2]

    def dq_kernel(pair, operands, dq, total):
        def add():
            asked, keys = _asked(operands, _column), _answered(operands, _row)
            total[...] += steps.pull_queries(rule, asked, keys)

        _accumulate(_phases(pair, M // form.m, 1), add, (total,), (dq,))

    queries, keys = _per_query_tile(form, operands)
    return _run(
        form,
        dq_kernel,
        H,
        1,
        (queries, keys),
        [tile_spec(queries, D)],
        [jax.ShapeDtypeStruct((B, H, N, D), operands.q.dtype)],
        [pltpu.VMEM((form.n, D), jnp.float32)],
        operands,
        visits,
    )[0]


def backward_keys(form: Form, rule: Rule, operands: Operands, visits: Visits) -> list[Array]:
    """dk [B G M D] and dv [B G M E], in the dtypes of k and v; ``visits`` are those of keys."""
    (_, G, M, D), E = operands.k.shape, operands.v.shape[-1]
    N, shared = operands.q.shape[2], operands.q.shape[1] // G

    def dkv_kernel(pair, operands, dk, dv, dk_total, dv_total):
        def add():
            more = steps.pull_keys(rule, _asked(operands, _row), _answered(operands, _column))
            dk_total[...] += more[0]
            dv_total[...] += more[1]

        phases = _phases(pair, N // form.n, shared)
        _accumulate(phases, add, (dk_total, dv_total), (dk, dv))

    def own(g, s, pair):
        b, j, _ = _place(pair[lax.div(s, shared)], M // form.m, N // form.n)
        return b, g, j

    def met(g, s, pair):
        b, _, i = _place(pair[lax.div(s, shared)], M // form.m, N // form.n)
        return b, g * shared + lax.rem(s, shared), i

    queries, keys = Side(None, form.n, met), Side(None, form.m, own)
    return _run(
        form,
        dkv_kernel,
        G,
        shared,
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
    others = operands.k.shape[2] // form.m

    def own(h, s, pair):
        b, i, _ = _place(pair[s], tiles, others)
        return b, h, i

    def met(h, s, pair):
        b, _, j = _place(pair[s], tiles, others)
        return b, lax.div(h, shared), j

    return Side(None, form.n, own), Side(None, form.m, met)


def _place(pair, tiles: int, others: int):
    """Row of the batch, tile, and tile of the other side."""
    row = lax.div(pair, others)
    return lax.div(row, tiles), lax.rem(row, tiles), lax.rem(pair, others)


def _phases(pair: Any, others: int, heads: int) -> tuple[Array, Array]:
    """Whether this step is the first of its row, and the last."""
    step, last = pl.program_id(1), pl.num_programs(1) - 1

    def row(s):
        return lax.div(pair[lax.div(s, heads)], others)

    own = row(step)
    begins = (step == 0) | (row(jnp.maximum(step - 1, 0)) != own)
    return begins, (step == last) | (row(jnp.minimum(step + 1, last)) != own)


def _accumulate(phases, add: Callable[[], None], totals: tuple, outs: tuple) -> None:
    """``outs`` are the sums of what ``add`` adds to ``totals``, from 0."""
    begins, ends = phases

    @pl.when(begins)
    def _():
        for total in totals:
            total[...] = jnp.zeros(total.shape, total.dtype)

    add()

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


def _run(form, kernel, heads, each, sides, specs, shapes, scratch, operands, visits) -> list[Array]:
    """Every pair of ``visits`` in turn, ``each`` times, for every one of ``heads``."""
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads, visits.start[-1] * each),
            in_specs=[specs_of(operands, *sides)],
            out_specs=specs,
            scratch_shapes=scratch,
        ),
        interpret=form.interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )(visits.pair, operands)
