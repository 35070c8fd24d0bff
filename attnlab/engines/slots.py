"""Tokens in another order, with all they carry."""

from typing import TypeVar

import jax

from attnlab.core import Array

Tree = TypeVar("Tree")


def permuted(tree: Tree, order: Array) -> Tree:
    """Every array [B N ...] of ``tree`` with the slots of row b in the order ``order`` [B N], which
    holds each slot once: the gradient then needs no adding up."""

    def take(z: Array, slots: Array) -> Array:
        return z.at[slots].get(unique_indices=True, mode="promise_in_bounds")

    return jax.tree.map(lambda z: jax.vmap(take)(z, order), tree)
