"""`blockwise` as Triton kernels, for a GPU: a program loops over the tiles that it can reach.

Forward and dq: one program per head and tile of queries; keys stay where they are, and heads that
share them read the same ones. dk and dv: one program per kv head and tile of keys, over all query
heads of its group, so that no two programs add to one sum.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

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
from attnlab.engines.tiling import Tokens

ROW, COLUMN = (None, slice(None)), (slice(None), None)
"""Of numbers one a token, as they broadcast against a tile of logits."""
LARGEST_TABLE = 2**24
"""Most pairs of tiles of a batch, int32 each."""
EACH_ALONE = pltriton.CompilerParams(num_warps=8, num_stages=1)
"""For programs that loop over nothing."""
LARGEST_STATE = 2**13
"""Most numbers of the state of a recurrence."""
PRECISIONS = ("default", "fastest", "bfloat16", "high", "tensorfloat32", "highest", "float32")
"""Of products, as jax calls them."""
WIDEST = 512
"""Bytes of the widest head: beyond, the shared memory of smaller devices holds no tile."""


def tile_sizes(length: int, keys: int, size: int, dtype: Any, limit: int | None) -> tuple[int, int]:
    """Tokens per tile of queries and of keys, for heads of ``size``: as compiled for an A100 and an
    H100, what keeps sums in registers, and powers of two, few of them empty. A ``limit`` is that of
    larger tiles than these."""
    if jnp.dtype(dtype).itemsize > 2 or size > 128:
        most = 32, 32
    else:
        most = (128, 64) if size <= 64 else (64, 64)
    return min(most[0], padded(length)), min(most[1], padded(keys))


def chunk_size(length: int) -> int:
    """Tokens per chunk of a recurrence."""
    return min(32, padded(length))


def padded(size: int) -> int:
    """The width of a tile that holds heads of ``size``: a power of two that a product takes. So for
    tokens."""
    return max(16, pl.next_power_of_2(size))


def forward(form: Form, rule: Rule, operands: Operands, visits: Visits) -> list[Array]:
    """``out`` [B H N E] in the dtype of v, and ``lse`` [B H 1 N] f32."""
    (B, H, N, _), (_, _, M, E) = operands.q.shape, operands.v.shape

    def forward_kernel(operands, visits, out, lse):
        q, asking = operands.q[...], _tokens(operands.asking, COLUMN)

        def meet(which, running, _):
            keys = _keys_at(operands, pl.ds(which * form.m, form.m))
            return steps.fold(rule, running, q, asking, keys)

        start = steps.begin(form.n, E)
        value, total = steps.end(_visit(visits, M // form.m, 1, meet, start))
        out[...] = value.astype(out.dtype)
        lse[0] = total.reshape(form.n)

    queries, keys = _per_query_tile(form, operands)
    shapes = [jax.ShapeDtypeStruct((B, H, N, E), operands.v.dtype), _row_shape(B, H, N)]
    specs = [tile_spec(queries, E), row_spec(queries)]
    grid = (N // form.n, H, B)
    return _run(form, forward_kernel, grid, (queries, keys), specs, shapes, operands, visits)


def backward_queries(form: Form, rule: Rule, operands: Operands, visits: Visits) -> Array:
    """dq [B H N D], in the dtype of q."""
    (B, H, N, D), M = operands.q.shape, operands.k.shape[2]

    def dq_kernel(operands, visits, dq):
        asked = steps.Asked(
            operands.q[...],
            operands.d_out[...],
            operands.lse[0][COLUMN],
            operands.delta[0][COLUMN],
            _tokens(operands.asking, COLUMN),
        )

        def meet(which, total, _):
            keys = _keys_at(operands, pl.ds(which * form.m, form.m))
            return total + steps.pull_queries(rule, asked, keys)

        start = jnp.zeros((form.n, D), jnp.float32)
        dq[...] = _visit(visits, M // form.m, 1, meet, start).astype(dq.dtype)

    queries, keys = _per_query_tile(form, operands)
    shapes, specs = [jax.ShapeDtypeStruct((B, H, N, D), operands.q.dtype)], [tile_spec(queries, D)]
    grid = (N // form.n, H, B)
    return _run(form, dq_kernel, grid, (queries, keys), specs, shapes, operands, visits)[0]


def backward_keys(form: Form, rule: Rule, operands: Operands, visits: Visits) -> list[Array]:
    """dk [B G M D] and dv [B G M E], in the dtypes of k and v; ``visits`` are those of keys."""
    (B, G, M, D), E = operands.k.shape, operands.v.shape[-1]
    N, shared = operands.q.shape[2], operands.q.shape[1] // G

    def dkv_kernel(operands, visits, dk, dv):
        tokens = _tokens(operands.answering, COLUMN)
        keys = steps.Answered(operands.k[...], operands.v[...], tokens)

        def meet(which, sums, head):
            at = pl.ds(which * form.n, form.n)
            asked = steps.Asked(
                operands.q[head, at],
                operands.d_out[head, at],
                operands.lse[head, 0, at][ROW],
                operands.delta[head, 0, at][ROW],
                _tokens(operands.asking, ROW, at),
            )
            return jax.tree.map(jnp.add, sums, steps.pull_keys(rule, asked, keys))

        start = tuple(jnp.zeros((form.m, size), jnp.float32) for size in (D, E))
        sums = _visit(visits, N // form.n, shared, meet, start)
        for ref, total in zip((dk, dv), sums):
            ref[...] = total.astype(ref.dtype)

    queries = Side(shared, N, lambda i, g, b: (b, g, 0))
    keys = Side(None, form.m, lambda i, g, b: (b, g, i))
    shapes = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in (operands.k, operands.v)]
    specs = [tile_spec(keys, D), tile_spec(keys, E)]
    grid = (M // form.m, G, B)
    return _run(form, dkv_kernel, grid, (queries, keys), specs, shapes, operands, visits)


def _per_query_tile(form: Form, operands: Operands) -> tuple[Side, Side]:
    """One tile of queries, and all keys of its head."""
    shared = operands.q.shape[1] // operands.k.shape[1]
    keys = Side(None, operands.k.shape[2], lambda i, h, b: (b, lax.div(h, shared), 0))
    return Side(None, form.n, lambda i, h, b: (b, h, i)), keys


def _visit(visits: Visits, others: int, heads: int, meet: Callable, start: Any) -> Any:
    """``start`` after ``meet`` with every tile that this program's meets, once per head."""
    row = pl.program_id(2) * pl.num_programs(0) + pl.program_id(0)
    first = visits.start[row]

    def step(s, value):
        tile = visits.pair[first + lax.div(s, heads)] - row * others
        return meet(tile, value, lax.rem(s, heads))

    return lax.fori_loop(0, (visits.start[row + 1] - first) * heads, step, start)


def _tokens(tokens: Tokens, shape: tuple, at: Any = slice(None)) -> Tokens:
    return jax.tree.map(lambda ref: ref[0, at][shape], tokens)


def _keys_at(operands: Operands, at: Any) -> steps.Answered:
    return steps.Answered(operands.k[at], operands.v[at], _tokens(operands.answering, ROW, at))


def _row_shape(B: int, H: int, N: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((B, H, 1, N), jnp.float32)


def _run(form, kernel, grid, sides, specs, shapes, operands, visits) -> list[Array]:
    whole = jax.tree.map(lambda z: pl.BlockSpec(z.shape, lambda *at: (0,)), visits)
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=grid,
        in_specs=[specs_of(operands, *sides), whole],
        out_specs=specs,
        interpret=form.interpret,
        compiler_params=pltriton.CompilerParams(num_warps=8, num_stages=2),
    )(operands, visits)
