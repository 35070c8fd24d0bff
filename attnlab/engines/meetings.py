"""Who meets whom in the `bucketed` engine: plans, and the labels of tokens in their slots."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Rule


class Plan(NamedTuple):
    """Who meets whom in R rounds.

    ``token`` [R B H T C]: the token in each slot, −1 in an empty one; ``slot`` [R B H N]: the slot
    of each token; ``code`` [R B H N]: two tokens of a document meet iff their codes differ by at
    most ``Reach.codes``. int32 all. The plan of one head has no H.
    """

    token: Array
    slot: Array
    code: Array

    def by_head(self) -> "Plan":
        """The plans of the heads, [H R B ...]."""
        return Plan(*(jnp.moveaxis(z, 2, 0) for z in self))


class Reach(NamedTuple):
    """How far a token sees: difference of codes, tiles of keys before and after its own tile, and
    whether a pair that meets in several rounds counts once (``united``) or as often."""

    codes: int
    before: int
    after: int
    united: bool = True

    @property
    def tiles(self) -> int:
        """How many tiles of keys a tile of queries meets."""
        return self.before + 1 + self.after


class Labels(NamedTuple):
    """Of the tokens in slots, int32 all: their ``row`` among the tokens of all batch rows (anyone's
    in an empty slot), position, segment (−1 in an empty slot), code, and codes in all rounds that
    are united."""

    row: Array
    pos: Array
    seg: Array
    code: Array
    codes: tuple[Array, ...]


class Meetings(NamedTuple):
    """Labels of the tokens that ask [B T C] and of those around each tile [B T w]."""

    asks: Labels
    answers: Labels

    def group(self, i: Array, size: int) -> "Meetings":
        """Group ``i`` of ``size`` tiles, of all rows: [(B size) ...]."""

        def cut(z: Array) -> Array:
            return lax.dynamic_slice_in_dim(z, i * size, size, 1).reshape(-1, z.shape[-1])

        return jax.tree.map(cut, self)


def label(
    reach: Reach, tokens: tuple[Array, Array], plan: Plan, r: Array, multiple: int
) -> Meetings:
    """Round ``r`` of the plan of one head, T filled up with empty tiles to a ``multiple``;
    ``tokens`` are positions and segments [B N].

    For the whole round, ahead of its tiles: XLA would look up every label for every pair.
    """
    token, code = plan.token[r], plan.code[r]
    B, T, C = token.shape
    T += -T % multiple
    ends = (reach.before, T - token.shape[1] + reach.after)
    token = jnp.pad(token, [(0, 0), ends, (0, 0)], constant_values=-1)
    at, batch = jnp.maximum(token, 0), jnp.arange(B)[:, None, None]

    def placed(z: Array) -> Array:
        return jnp.asarray(z).at[batch, at].get(mode="promise_in_bounds")

    pos, seg, code = map(placed, (*tokens, code))
    united = plan.code if reach.united and len(plan.code) > 1 else ()
    seg, row = jnp.where(token >= 0, seg, -1), batch * plan.slot.shape[-1] + at
    labels = Labels(row, pos, seg, code, tuple(map(placed, united)))
    near = jnp.arange(T)[:, None] + jnp.arange(reach.tiles)
    answers = jax.tree.map(lambda z: z[:, near].reshape(B, T, reach.tiles * C), labels)
    asks = jax.tree.map(lambda z: z[:, reach.before : reach.before + T], labels)
    return Meetings(*lax.optimization_barrier((asks, answers)))


def visible(reach: Reach, rule: Rule, group: Meetings, r: Array) -> Array:
    """Who is seen in round ``r`` by the tokens of a `Meetings.group`: bool [(B T) C w]. Where
    rounds are united, a pair is seen in the first in which it meets."""
    asks, answers = group
    C, w = asks.pos.shape[-1], answers.pos.shape[-1]

    def meets(ask: Array, answer: Array, within: Array | int) -> Array:
        return jnp.abs(ask[:, :, None] - answer[:, None]) <= within

    itself = jnp.arange(w) == jnp.arange(C)[:, None] + reach.before * C
    seen = rule.visible(asks.pos, asks.seg, answers.pos, answers.seg) & ~itself
    seen &= meets(asks.code, answers.code, reach.codes)
    for i, codes in enumerate(zip(asks.codes[:-1], answers.codes)):
        seen &= ~meets(*codes, jnp.where(i < r, reach.codes, -1))
    return seen
