"""What every kernel is handed, how it lies in memory, and which of it a program sees.

N and M are padded to whole tiles, D and E to what a product takes; what is added is 0, in empty
slots. The unit axis of what is one number a token makes it a row, which a TPU wants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl

from attnlab.engines.tiling import Tokens


class Operands(NamedTuple):
    """``q`` [B H N D], ``k`` [B G M D], ``v`` [B G M E], tokens [B 1 N] and [B 1 M]; for the
    backward pass ``d_out`` [B H N E], ``lse`` and ``delta`` [B H 1 N] f32. To a kernel, the part
    of each that a program sees."""

    q: Any
    k: Any
    v: Any
    asking: Tokens
    answering: Tokens
    d_out: Any = None
    lse: Any = None
    delta: Any = None


class Side(NamedTuple):
    """The block of queries, or of keys, that a program sees: ``heads`` (None: one, its axis
    dropped), ``rows`` tokens, and the place (batch, head, tile) of it in the grid."""

    heads: int | None
    rows: int
    place: Callable[..., tuple[Any, Any, Any]]


def tile_spec(side: Side, width: int) -> pl.BlockSpec:
    """Of [B heads tokens width]."""
    return pl.BlockSpec((None, side.heads, side.rows, width), lambda *at: (*side.place(*at), 0))


def row_spec(side: Side) -> pl.BlockSpec:
    """Of [B heads 1 tokens]."""

    def place(*at):
        b, h, i = side.place(*at)
        return b, h, 0, i

    return pl.BlockSpec((None, side.heads, 1, side.rows), place)


def specs_of(operands: Operands, queries: Side, keys: Side) -> Operands:
    """The block of every array, as `Operands`."""

    def tokens(side: Side, held: Tokens) -> Tokens:
        def place(*at):
            b, _, i = side.place(*at)
            return b, 0, i

        return jax.tree.map(lambda _: pl.BlockSpec((None, 1, side.rows), place), held)

    forward = Operands(
        tile_spec(queries, operands.q.shape[-1]),
        tile_spec(keys, operands.k.shape[-1]),
        tile_spec(keys, operands.v.shape[-1]),
        tokens(queries, operands.asking),
        tokens(keys, operands.answering),
    )
    if operands.d_out is None:
        return forward
    row = row_spec(queries)
    return forward._replace(d_out=tile_spec(queries, operands.d_out.shape[-1]), lse=row, delta=row)
