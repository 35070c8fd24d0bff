"""Whole rows, a tile of queries at a time: the same function as the dense form, in less memory."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close

from attnlab.core import Keys, Position, Queries, Rule
from attnlab.engines import blockwise, dense, rowwise
from attnlab.normalisers.sparsemax import Sparsemax


@dataclass(frozen=True)
class Counting(Position):
    """A position module that looks at whole rows: counts, back from the query, the keys that it
    likes, and adds something to the output by the position of what it attended to."""

    biased = True
    whole = True

    def row_bias(self, params, z, seen, q, q_pos, k_pos):
        likes = jnp.where(seen, jax.nn.sigmoid(z), 0.0)
        return params["slope"] * jnp.flip(jnp.cumsum(jnp.flip(likes, -1), -1), -1)

    def row_values(self, params, probs, q_pos, k_pos):
        distance = jnp.sin((q_pos[:, :, None] - k_pos[:, None, :]).astype(jnp.float32))
        return jnp.einsum("bhnm,bnm->bnh", probs, distance)[..., None]


def tokens(N: int, M: int, B: int = 2, H: int = 4, G: int = 2):
    """Queries the last N of M tokens in two documents, with one slot empty."""
    draw = np.random.default_rng(N * 100 + M)
    q = draw.standard_normal((B, N, H, 8)).astype(np.float32)
    k, v = (draw.standard_normal((B, M, G, size)).astype(np.float32) for size in (8, 5))
    pos = np.tile(np.arange(M, dtype=np.int32), (B, 1))
    seg = np.where(pos < M // 3, 0, 1)
    pos = np.where(seg == 1, pos - M // 3, pos)
    seg[0, 0] = -1
    return Queries(q, pos[:, M - N :], seg[:, M - N :]), Keys(k, v, pos, seg)


TILED = partial(rowwise.attend, tile=2)

RULES = {
    "both directions": Rule({"slope": jnp.float32(-0.3)}, Counting(), causal=False),
    "sparse": Rule(normaliser=Sparsemax()),
    "both": Rule({"slope": jnp.float32(-0.3)}, Counting(), normaliser=Sparsemax()),
}


@partial(jax.jit, static_argnums=0)
def outputs_and_gradients(engine, queries, keys, rule):
    def loss(q, k, v, params):
        given = Rule(params, rule.position, rule.causal, normaliser=rule.normaliser)
        out, lse = engine(queries._replace(q=q), keys._replace(k=k, v=v), given)[:2]
        return jnp.sum(out * jnp.cos(out)) + jnp.sum(jnp.where(lse > -1e29, lse, 0)), (out, lse)

    return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(queries.q, keys.k, keys.v, rule.params)


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
@pytest.mark.parametrize(("N", "M", "engine"), [(5, 17, TILED), (13, 13, blockwise.attend)])
def test_it_is_the_dense_form(rule, N, M, engine):
    queries, keys = tokens(N, M)
    wanted = outputs_and_gradients(dense.attend, queries, keys, rule)
    assert_close(outputs_and_gradients(engine, queries, keys, rule), wanted)


@pytest.mark.parametrize("engine", [rowwise.attend, dense.attend])
def test_keys_may_come_in_any_order(engine):
    queries, keys = tokens(13, 13)
    order = np.random.default_rng(1).permutation(13)
    shuffled = jax.tree.map(lambda z: z[:, order], keys)
    attend = jax.jit(engine)
    result, moved = (attend(queries, z, RULES["both"]) for z in (keys, shuffled))
    assert_close(moved[0], result[0])
    if engine is dense.attend:
        assert_close(moved[2], result[2][..., order])


def test_no_array_of_all_pairs_exists_forward_or_backward():
    N = 256
    queries, keys = tokens(N, N, B=1)

    def loss(q, k, v):
        given = queries._replace(q=q), keys._replace(k=k, v=v)
        return jnp.sum(rowwise.attend(*given, RULES["both"], tile=8)[0])

    traced = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(queries.q, keys.k, keys.v)
    assert max(sizes(traced.jaxpr)) <= 4 * 8 * N


def sizes(jaxpr):
    """Entries of every array that a program makes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from sizes(getattr(inner, "jaxpr", inner))


def is_program(thing) -> bool:
    return hasattr(thing, "eqns")


def test_a_tap_rewrites_what_the_heads_give():
    queries, keys = tokens(5, 5)
    rule = Rule(normaliser=Sparsemax(), taps=(("heads", lambda z: z * 2),))
    attend = jax.jit(rowwise.attend)
    assert_close(attend(queries, keys, rule)[0], 2 * attend(queries, keys, RULES["sparse"])[0])
