"""The bucketed engine is the softmax over the union of its rounds, and its rings continue it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close

from attnlab.core import Dims, Keys, Queries, Rule
from attnlab.engines import bucketed, rings, sorting, union
from attnlab.positions.alibi import Alibi
from attnlab.positions.rope import Rope

B, H, G, D, E = 2, 4, 2, 8, 6


def draw(N, rounds, buckets, seed=0, documents=True):
    """Random tokens with two packed documents and empty slots, and buckets drawn apart."""
    rng = np.random.default_rng(seed)
    pos = np.tile(np.arange(N, dtype=np.int32), (B, 1))
    seg = np.zeros_like(pos)
    if documents:
        middle = N // 3
        pos[0, middle:] -= middle
        seg[0, middle:] = 1
        seg[1, N - N // 4 :] = -1
    q = rng.standard_normal((B, N, H, D)).astype(np.float32)
    k = rng.standard_normal((B, N, G, D)).astype(np.float32)
    v = rng.standard_normal((B, N, G, E)).astype(np.float32)
    code = rng.integers(0, buckets, (rounds, B, H, N)).astype(np.int32)
    return Queries(q, pos, seg), Keys(k, v, pos, seg), code


def compiled(form):
    """A form of (queries, keys, rule, code, buckets, length), compiled once per shape."""
    return jax.jit(form, static_argnums=(4, 5))


def fast(queries, keys, rule, code, buckets, length):
    plan, reach = sorting.plan_runs(code, buckets, length, queries, rule.causal)
    return bucketed.attend(queries, keys, rule, plan, reach)


def literal(queries, keys, rule, code, buckets, length):
    met = jnp.stack([union.meet(z, length, queries) for z in code]).any(0)
    return union.attend(queries, keys, rule, met)[:2]


def gradients(form, queries, keys, rule, *rest):
    """(out, lse) and gradients of a random functional of both, in q, k and v."""
    weight = jax.random.normal(jax.random.key(0), (B, queries.q.shape[1], H, E))

    def loss(q, k, v):
        out, lse = form(queries._replace(q=q), keys._replace(k=k, v=v), rule, *rest)
        seen = jnp.where(lse > -1e29, lse, 0.0)
        return jnp.sum(out * weight) + jnp.sum(jnp.sin(seen)), (out, lse)

    grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    return grad(queries.q, keys.k, keys.v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("N", "rounds", "buckets", "length"), [(41, 3, 5, 4), (70, 2, 2, 37), (3, 1, 9, 1)]
)
def test_outputs_lse_and_gradients_are_those_of_the_dense_union(N, rounds, buckets, length, causal):
    tokens = draw(N, rounds, buckets)
    rule = Rule({}, Alibi(), causal)
    args = (*tokens[:2], rule, tokens[2], buckets, length)
    assert_close(gradients(fast, *args), gradients(literal, *args))


def test_a_soft_cap_and_rotations_are_the_rules_own():
    queries, keys, code = draw(30, 2, 3)
    rule = Rule({}, Rope(), True, scale=0.7, soft_cap=2.0)
    args = (queries, keys, rule, code, 3, 6)
    assert_close(gradients(fast, *args), gradients(literal, *args))


def test_the_same_round_twice_is_the_round_once():
    queries, keys, code = draw(50, 1, 4)
    once = compiled(fast)(queries, keys, Rule(), code, 4, 5)
    thrice = compiled(fast)(queries, keys, Rule(), np.repeat(code, 3, 0), 4, 5)
    assert_close(thrice, once)


def test_without_the_union_a_pair_weighs_as_often_as_it_meets():
    queries, keys, code = draw(40, 3, 2)

    def counted(queries, keys, rule, code, buckets, length):
        plan, reach = sorting.plan_runs(code, buckets, length, queries, rule.causal)
        return bucketed.attend(queries, keys, rule, plan, reach._replace(united=False))

    def counted_literally(queries, keys, rule, code, buckets, length):
        times = sum(union.meet(z, length, queries).astype(jnp.int32) for z in code)
        return union.attend(queries, keys, rule, times)[:2]

    args = queries, keys, Rule(), code, 2, 9
    got = compiled(counted)(*args)
    assert_close(got, compiled(counted_literally)(*args))
    assert np.max(np.abs(compiled(fast)(*args)[0] - got[0])) > 0.01


def test_a_full_bucket_drops_the_oldest_and_stays_finite():
    queries, keys, _ = draw(37, 1, 1, documents=False)
    code = np.full((1, B, H, 37), 2, np.int32)

    def late(v):
        return fast(queries, keys._replace(v=v), Rule(), code, 4, 5)[0][:, 30].sum()

    moved = jax.jit(jax.grad(late))(keys.v)
    assert np.all(np.isfinite(moved))
    reached = np.flatnonzero(np.any(np.asarray(moved) != 0, (0, 2, 3)))
    assert reached.tolist() == [25, 26, 27, 28, 29]


def test_a_token_that_meets_nothing_yields_its_own_value():
    queries, keys, _ = draw(9, 1, 9, documents=False)
    code = np.broadcast_to(np.arange(9, dtype=np.int32), (1, B, H, 9))
    out, lse = compiled(fast)(queries, keys, Rule(), code, 9, 4)
    np.testing.assert_array_equal(out, np.repeat(keys.v, H // G, 2))
    assert np.all(lse == np.float32(-1e30))


@pytest.mark.parametrize(("rounds", "buckets", "length"), [(3, 4, 3), (1, 1, 5)])
def test_rings_continue_what_the_engine_computes_after_many_turns(rounds, buckets, length):
    N = 44
    queries, keys, code = draw(N, rounds, buckets)
    rule = Rule({}, Alibi())
    whole, _ = compiled(fast)(queries, keys, rule, code, buckets, length)
    state = rings.empty(Dims(0, H, G, D, E), B, rounds, buckets, length)
    step, outs = jax.jit(rings.attend), []
    for a, b in ((0, 17), (17, 18), (18, 35), (35, N)):
        part = jax.tree.map(lambda z, a=a, b=b: z[:, a:b], (queries, keys))
        out, state = step(state, *part, rule, code[..., a:b])
        outs.append(out)
    assert_close(jnp.concatenate(outs, 1), whole)


@pytest.mark.parametrize(("rounds", "buckets", "length"), [(2, 4, 3), (1, 2, 64)])
def test_a_prompt_read_at_once_leaves_the_rings_that_single_tokens_leave(rounds, buckets, length):
    N = 41
    queries, keys, code = draw(N, rounds, buckets)
    empty = rings.empty(Dims(0, H, G, D, E), B, rounds, buckets, length)
    step = jax.jit(rings.attend)
    out, filled = step(empty, queries, keys, Rule(), code)
    state, outs = empty, []
    for t in range(N):
        part = jax.tree.map(lambda z, t=t: z[:, t : t + 1], (queries, keys))
        one, state = step(state, *part, Rule(), code[..., t : t + 1])
        outs.append(one)
    jax.tree.map(np.testing.assert_array_equal, filled, state)
    assert_close(jnp.concatenate(outs, 1), out)


def test_later_buckets_do_not_move_a_bit_of_earlier_outputs():
    """Where a token stands in its tile, and so how its sums are rounded, is fixed by its past."""
    queries, keys, code = draw(64, 2, 4, documents=False)
    form = jax.jit(fast, static_argnums=(4, 5))
    before = form(queries, keys, Rule(), code, 4, 9)[0]
    for t in (1, 20, 63):
        other = np.where(np.arange(64) >= t, (code * 3 + 1) % 4, code).astype(np.int32)
        after = form(queries, keys, Rule(), other, 4, 9)[0]
        np.testing.assert_array_equal(before[:, :t], after[:, :t])


def test_other_tokens_as_keys_are_refused():
    queries, keys, _ = draw(8, 1, 1)
    with pytest.raises(ValueError, match="not the same tokens"):
        bucketed.tie(queries, jax.tree.map(lambda z: z[:, :5], keys))
