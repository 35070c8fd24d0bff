"""`blockwise` by kernels: arrays laid out for them, and their gradients joined."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines.kernels import Form
from attnlab.engines.kernels.operands import Operands
from attnlab.engines.kernels.visits import Listed, Near
from attnlab.engines.tiling import Tokens, cut, reach_by_row, spans


def attend(form: Form, queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
    """``out`` [B N H E] in the dtype of the queries and ``lse`` [B H N] f32, as `blockwise.attend`
    before the share of a normaliser; queries and keys are cleared and rotated.

    Cost: as there, and int32 of the pairs of tiles.
    """
    (B, N, _, D), E = queries.q.shape, keys.v.shape[-1]
    dtype = jnp.result_type(queries.q, keys.k, keys.v)
    count = keys.log_count
    count = None if count is None else cut(count, form.m, 0)
    asking = Tokens(cut(queries.pos, form.n, 0), cut(queries.seg, form.n, -1))
    answering = Tokens(cut(keys.pos, form.m, 0), cut(keys.seg, form.m, -1), count)
    near = jnp.moveaxis(reach_by_row(rule, spans(asking), spans(answering)), -1, 0)

    def heads_first(z: Array, tile: int) -> Array:
        size = z.shape[3]
        more = (0, 0), (0, -z.shape[1] % tile), (0, 0), (0, form.kernels.padded(size) - size)
        return jnp.pad(z.astype(dtype), more).swapaxes(1, 2)

    def as_rows(tokens: Tokens) -> Tokens:
        return jax.tree.map(lambda z: z.swapaxes(0, 1).reshape(B, 1, -1), tokens)

    operands = Operands(
        heads_first(queries.q, form.n),
        heads_first(keys.k, form.m),
        heads_first(keys.v, form.m),
        as_rows(asking),
        as_rows(answering),
    )
    out, lse = attend_tiles(form, bare(rule, D), operands, Near(near))
    return out.swapaxes(1, 2)[:, :N, :, :E].astype(queries.q.dtype), lse[:, :, 0, :N]


def bare(rule: Rule, size: int) -> Rule:
    """What a kernel needs of a rule, for heads of ``size`` that may be padded."""
    return Rule(
        causal=rule.causal,
        scale=size**-0.5 if rule.scale is None else rule.scale,
        soft_cap=rule.soft_cap,
        patterns=rule.patterns,
    )


def attend_tiles(form: Form, rule: Rule, operands: Operands, met: Near | Listed) -> Any:
    """``out`` [B H N E] and ``lse`` [B H 1 N], padded; ``met`` says which tiles of keys each tile
    of queries meets."""
    return _attend(form, rule, operands, met)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form, rule, operands, met):
    return _forward(form, rule, operands, met)[0]


def _tiles(form: Form, operands: Operands) -> tuple[int, int]:
    """Tiles of queries and of keys."""
    return operands.q.shape[2] // form.n, operands.k.shape[2] // form.m


def _forward(form, rule, operands, met):
    visits = met.of_queries(*_tiles(form, operands))
    out, lse = form.kernels.forward(form, rule, operands, visits)
    return (out, lse), (rule, operands, met, out, lse)


def _backward(form, residuals, cotangents):
    rule, operands, met, out, lse = residuals
    d_out, d_lse = cotangents
    weighed = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    known = operands._replace(
        d_out=d_out.astype(operands.v.dtype),
        lse=jnp.where(lse > MASK, lse, 0.0),  # of rows that see nothing: what is masked stays at 0
        delta=jnp.sum(weighed, -1)[:, :, None] - d_lse,
    )
    tiles = _tiles(form, operands)
    dq = form.kernels.backward_queries(form, rule, known, met.of_queries(*tiles))
    dk, dv = form.kernels.backward_keys(form, rule, known, met.of_keys(*tiles))
    return rule, operands._replace(q=dq, k=dk, v=dv, asking=None, answering=None), None


_attend.defvjp(_forward, _backward)
