"""`blocksparse` by the kernels of `attention`: lists of tiles of keys, read off a table.

A list is one head's. Heads that share keys are therefore laid one behind the other, as one head of
a row of its own, which moves nothing: [B H n T D] is [B G, 1, H/G n T, D].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from attnlab.core import Array, Rule
from attnlab.engines.kernels import Form
from attnlab.engines.kernels.attention import attend_tiles, bare
from attnlab.engines.kernels.operands import Operands
from attnlab.engines.kernels.visits import NONE, Listed
from attnlab.engines.tiling import Tokens

if TYPE_CHECKING:
    from attnlab.engines.blocksparse import Blocks, Tiled


def visit(
    form: Form, queries: Tiled, blocks: Blocks, rule: Rule, table: Array
) -> tuple[Array, Array]:
    """f32 ``out`` [B H n T E] and ``lse`` [B H n T], as `blocksparse.visit`; ``table`` [B H n L]
    names each block once and in order, what is behind the last block is none.

    Tiles of T queries and blocks of C keys are cut into those of the kernels, or filled up. Cost:
    as there, and int32 of the entries of the lists.
    """
    B, H, n, T, D = queries.q.shape
    G, m, C, E = blocks.v.shape[1:]
    dtype = jnp.result_type(queries.q, blocks.k, blocks.v)
    whole_t, whole_c = (-(-z // tile) * tile for z, tile in ((T, form.n), (C, form.m)))

    def in_row(z: Array, size: int, tile: int, fill: int = 0) -> Array:
        """[... tiles T] -> [B G, 1, tokens], an empty tile behind."""
        z = _filled(z, size, -1, fill).reshape(B * G, 1, -1)
        return _filled(z, z.shape[-1] + tile, -1, fill)

    def heads(z: Array, size: int, tile: int) -> Array:
        """[... tiles T X] -> [B G, 1, tokens, X], an empty tile behind."""
        z = _filled(_filled(z.astype(dtype), size, -2), form.kernels.padded(z.shape[-1]), -1)
        z = z.reshape(B * G, 1, -1, z.shape[-1])
        return _filled(z, z.shape[2] + tile, 2)

    def for_all(z: Array) -> Array:
        return jnp.broadcast_to(z[:, None], (B, G, m, C))

    operands = Operands(
        heads(queries.q, whole_t, form.n),
        heads(blocks.k, whole_c, form.m),
        heads(blocks.v, whole_c, form.m),
        Tokens(in_row(queries.pos, whole_t, form.n), in_row(queries.seg, whole_t, form.n, fill=-1)),
        Tokens(
            in_row(for_all(blocks.pos), whole_c, form.m),
            in_row(for_all(blocks.seg), whole_c, form.m, fill=-1),
        ),
    )
    met = Listed(_named(table, m, whole_t // form.n, whole_c // form.m, B * G))
    out, lse = attend_tiles(form, bare(rule, D), operands, met)
    out = out[:, 0, : -form.n].reshape(B, H, n, whole_t, -1)[..., :T, :E]
    lse = lse[:, 0, 0, : -form.n].reshape(B, H, n, whole_t)[..., :T]
    return out.astype(jnp.float32), lse


def _filled(z: Array, size: int, axis: int, fill: int = 0) -> Array:
    """``axis`` made ``size`` long."""
    widths = [(0, 0)] * z.ndim
    widths[axis] = (0, size - z.shape[axis])
    return jnp.pad(z, widths, constant_values=fill)


def _named(table: Array, blocks: int, each: int, parts: int, rows: int) -> Array:
    """The tiles of keys that each tile of queries meets, [rows n_q L'], the last of them none:
    ``each`` tiles have the same list, and a block is ``parts`` tiles."""
    table = table[..., None]
    named = jnp.where(table < blocks, table * parts + jnp.arange(parts, dtype=jnp.int32), NONE)
    named = jnp.repeat(named.reshape(rows, -1, named.shape[-2] * parts), each, 1)
    return _filled(named, named.shape[1] + 1, 1, NONE)
