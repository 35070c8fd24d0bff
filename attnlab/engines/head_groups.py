"""Some of the heads, with the part of everything that belongs to them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core import Array, Dims, Keys, Normaliser, Position, Queries, Rule


class Group(NamedTuple):
    """``size`` query heads from ``first`` on, of ``heads`` in all; ``kv`` the kv heads of the
    group, one for each of equally many of its query heads."""

    first: int
    size: int
    heads: int
    kv: tuple[int, ...]

    @property
    def span(self) -> slice:
        """The query heads."""
        return slice(self.first, self.first + self.size)

    def dims(self, dims: Dims) -> Dims:
        """The sizes that a mechanism of these heads is told."""
        return dims._replace(heads=self.size, kv_heads=len(self.kv))

    def queries(self, queries: Queries) -> Queries:
        """Those of the group: [B N size D]."""
        return queries._replace(q=queries.q[:, :, self.span])

    def keys(self, keys: Keys) -> Keys:
        """Those of the group: [B M kv D]. A copy per query head is made only where the group ends
        within a kv head."""
        return keys._replace(k=self._taken(keys.k), v=self._taken(keys.v))

    def _taken(self, z: Array) -> Array:
        low, high = self.kv[0], self.kv[-1] + 1
        if self.kv == tuple(range(low, high)):
            return z[:, :, low:high]
        return jnp.stack([z[:, :, g] for g in self.kv], 2)

    def rule(self, rule: Rule) -> Rule:
        """The same rule for calls with the heads of the group alone, which are tapped when all
        heads are there."""
        taps = tuple(tap for tap in rule.taps if tap[0] != "heads")
        position, normaliser = rule.position, rule.normaliser
        if self.size < self.heads:
            place = Place(self.first, self.size, self.heads)
            if position.biased or position.whole or jax.tree.leaves(rule.params):
                position = PositionOfHeads(position, place)
            if jax.tree.leaves(rule.normaliser_params):
                normaliser = NormaliserOfHeads(normaliser, place)
        return dataclasses.replace(rule, taps=taps, position=position, normaliser=normaliser)


def cut(sizes: tuple[int, ...], kv_heads: int) -> tuple[Group, ...]:
    """Groups of ``sizes`` query heads, in order, which ``kv_heads`` serve."""
    heads, first, groups = sum(sizes), 0, []
    for size in sizes:
        of = [h * kv_heads // heads for h in range(first, first + size)]
        kv = tuple(dict.fromkeys(of))
        even = len({of.count(g) for g in kv}) == 1
        groups.append(Group(first, size, heads, kv if even else tuple(of)))
        first += size
    return tuple(groups)


@dataclass(frozen=True)
class Place:
    """Where a group stands among all ``heads``."""

    first: int
    size: int
    heads: int

    def among(self, z: Array, axis: int) -> Array:
        """``z`` with zeros for the heads that are not of the group."""
        pad = [(0, 0)] * z.ndim
        pad[axis] = (self.first, self.heads - self.first - self.size)
        return jnp.pad(z, pad)

    def own(self, z: Array, axis: int) -> Array:
        """What belongs to the group, where ``z`` tells the heads apart."""
        if z.shape[axis] == 1:
            return z
        return jax.lax.slice_in_dim(z, self.first, self.first + self.size, axis=axis)


@dataclass(frozen=True)
class PositionOfHeads(Position):
    """A position module as some heads see it: its parameters and slopes are those of all heads.

    Keys are handed on as they come: modules turn the keys of all heads alike. ``origin`` is whom
    refusals name.
    """

    origin: Position
    place: Place

    @property
    def biased(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.origin.biased

    @property
    def whole(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.origin.whole

    @property
    def relative(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.origin.relative

    def rotate(self, params, z, pos, side):
        if side == "key":
            return self.origin.rotate(params, z, pos, side)
        place = self.place
        return place.own(self.origin.rotate(params, place.among(z, 2), pos, side), 2)

    def bias(self, params, q, q_pos, k_pos):
        place = self.place
        bias = self.origin.bias(params, place.among(q, 1), q_pos, k_pos)
        return None if bias is None else place.own(bias, 1)

    def row_bias(self, params, z, seen, q, q_pos, k_pos):
        place = self.place
        z, q = place.among(z, 1), place.among(q, 1)
        bias = self.origin.row_bias(params, z, seen, q, q_pos, k_pos)
        return None if bias is None else place.own(bias, 1)

    def row_values(self, params, probs, q_pos, k_pos):
        place = self.place
        values = self.origin.row_values(params, place.among(probs, 1), q_pos, k_pos)
        return None if values is None else place.own(values, 2)


@dataclass(frozen=True)
class NormaliserOfHeads(Normaliser):
    """A normaliser as some heads see it: its parameters are those of all heads."""

    origin: Normaliser
    place: Place

    @property
    def separable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.origin.separable

    @property
    def whole(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.origin.whole

    @property
    def relative(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.origin.relative

    def scale(self, params: Any, pos: Array, causal: bool) -> Array | None:
        factor = self.origin.scale(params, pos, causal)
        return None if factor is None else self.place.own(factor, 2)

    def share(self, lse):
        return self.origin.share(lse)

    def weights(self, params, z, seen):
        place = self.place
        return place.own(self.origin.weights(params, place.among(z, 1), seen), 1)
