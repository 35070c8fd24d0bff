"""The blockwise engine: exact, in any tiles, over any order of tokens, without an [N, M] array."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core import MASK, Keys, Queries, Rule, positions
from attnlab.engines import blockwise, dense, tiling
from attnlab.engines.segments import Span
from attnlab.mechanisms.window import Near

FORWARD_AND_BACK = ("out", "lse", "dq", "dk", "dv")


def tokens(N=40, M=56, B=2, H=4, G=2, D=8, E=6, seed=0):
    """Queries that are the last N of M tokens in two documents per row."""
    normal = np.random.default_rng(seed).standard_normal
    pos = np.tile(np.arange(M, dtype=np.int32), (B, 1))
    seg = (pos > M // 3).astype(np.int32)
    queries = Queries(normal((B, N, H, D), np.float32), pos[:, M - N :], seg[:, M - N :])
    keys = Keys(normal((B, M, G, D), np.float32), normal((B, M, G, E), np.float32), pos, seg)
    return queries, keys


def both(attend, queries, keys, rule):
    """out, lse and the gradients of a function of the two."""

    def loss(q, k, v):
        out, lse, *_ = attend(queries._replace(q=q), keys._replace(k=k, v=v), rule)
        weight = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        seen = jnp.where(lse > MASK, jnp.cos(lse), 0)
        return jnp.sum(out * weight) + jnp.sum(seen), (out, lse)

    gradient, values = jax.grad(loss, (0, 1, 2), has_aux=True)(queries.q, keys.k, keys.v)
    return dict(zip(FORWARD_AND_BACK, (*values, *gradient)))


run = jax.jit(
    lambda queries, keys, rule, tile: both(
        partial(blockwise.attend, tile=tile), queries, keys, rule
    ),
    static_argnums=3,
)
oracle = jax.jit(partial(both, dense.attend))


def assert_same(got, wanted, tolerance=2e-5):
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], atol=tolerance, err_msg=name)


@pytest.mark.parametrize("tile", [1, 7, 16, 56, None])
@pytest.mark.parametrize("causal", [True, False])
def test_any_tile_size_gives_out_lse_and_their_gradients(tile, causal):
    queries, keys = tokens()
    rule = Rule(causal=causal, position=positions.get("alibi")())
    assert_same(run(queries, keys, rule, tile), oracle(queries, keys, rule))


@pytest.mark.slow
def test_tiles_of_the_usual_size_give_the_same_gradients():
    queries, keys = tokens(N=4096, M=4096, B=1, H=1, G=1)
    assert blockwise.tile_size(4096, 1) < 1024
    assert_same(run(queries, keys, Rule(), None), oracle(queries, keys, Rule()), 1e-4)


def test_scale_and_soft_cap_reach_the_gradients():
    queries, keys = tokens()
    rule = Rule(scale=1.5, soft_cap=2.0)
    assert_same(run(queries, keys, rule, 16), oracle(queries, keys, rule))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), window=st.sampled_from([3, 9]))
def test_the_order_of_tokens_does_not_matter(seed, window):
    """Permuting keys changes nothing; permuting queries permutes the outputs."""
    queries, keys = tokens()
    rule = Rule().restrict(Near(window, sinks=2))
    rng = np.random.default_rng(seed)
    mix, turn = rng.permutation(56), rng.permutation(40)
    wanted = run(queries, keys, rule, 16)
    shuffled = (
        jax.tree.map(lambda z: z[:, turn], queries),
        jax.tree.map(lambda z: z[:, mix], keys),
    )
    got = run(*shuffled, rule, 16)
    np.testing.assert_allclose(got["out"], wanted["out"][:, turn], atol=2e-5)
    np.testing.assert_allclose(got["lse"], wanted["lse"][..., turn], atol=2e-5)


def test_parts_over_disjoint_keys_merge_to_the_whole():
    queries, keys = tokens()
    whole = run(queries, keys, Rule(), 16)
    parts = []
    for half in (slice(None, 30), slice(30, None)):
        parts.append(run(queries, jax.tree.map(lambda z, s=half: z[:, s], keys), Rule(), 16))
    lse = np.logaddexp(parts[0]["lse"], parts[1]["lse"])
    share = [np.exp(part["lse"] - lse).swapaxes(1, 2)[..., None] for part in parts]
    out = sum(s * part["out"] for s, part in zip(share, parts))
    np.testing.assert_allclose(lse, whole["lse"], atol=1e-5)
    np.testing.assert_allclose(out, whole["out"], atol=1e-5)


def test_a_row_without_a_key_is_zero_with_the_lse_of_nothing():
    queries, keys = tokens()
    got = run(queries._replace(seg=queries.seg + 7), keys, Rule(), 16)
    np.testing.assert_array_equal(got["lse"], np.float32(MASK))
    for name in ("out", "dq", "dk", "dv"):
        np.testing.assert_array_equal(got[name], 0)


def test_bfloat16_inputs_are_accumulated_in_float32():
    """Over 4096 keys of one weight the mean is right to the rounding of the result; a bf16 sum
    stops growing at 256."""
    M, ones = 4096, jnp.ones
    pos = np.arange(M, dtype=np.int32)[None]
    keys = Keys(ones((1, M, 1, 8), jnp.bfloat16), ones((1, M, 1, 8), jnp.bfloat16), pos, pos * 0)
    queries = Queries(ones((1, 1, 1, 8), jnp.bfloat16), pos[:, -1:], pos[:, :1] * 0)
    out, lse = blockwise.attend(queries, keys, Rule(), 64)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.float32(out), 1.0, atol=2.0**-8)
    np.testing.assert_allclose(lse[0, 0, 0], 8 * 8**-0.5 + np.log(M), rtol=1e-6)


def avals(jaxpr):
    """All arrays of a computation, those of its loops and calls too."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda z: hasattr(z, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from avals(inner)


@pytest.mark.parametrize("tile", [16, 64])
def test_no_array_is_quadratic_in_the_length(tile):
    """Doubling N and M doubles the largest array at most, forward and backward."""

    def largest(N):
        queries, keys = tokens(N=N, M=N, B=1)
        attend = partial(blockwise.attend, tile=tile)
        jaxpr = jax.make_jaxpr(lambda *z: both(attend, *z, Rule()))(queries, keys)
        return max(np.prod(z.shape) for z in avals(jaxpr.jaxpr))

    N = 2**16
    assert largest(N) >= N * 4 * 6  # the walk does see into the loops
    assert largest(2 * N) <= 2 * largest(N)


def reached(rule, queries, keys, tile):
    tiles = [tiling.cut(z, tile, -1) for z in (queries.pos, queries.seg)]
    asking = tiling.spans(tiling.Tokens(*tiles))
    tiles = [tiling.cut(z, tile, -1) for z in (keys.pos, keys.seg)]
    return np.asarray(tiling.reach(rule, asking, tiling.spans(tiling.Tokens(*tiles))))


def visible_tiles(rule, queries, keys, tile):
    """Which pairs of tiles hold a visible pair of tokens, by looking at every one."""
    seen = np.any(rule.allowed(queries, keys), 0)
    n, m = (-(-size // tile) * tile for size in seen.shape)
    seen = np.pad(seen, [(0, n - seen.shape[0]), (0, m - seen.shape[1])])
    return seen.reshape(n // tile, tile, m // tile, tile).any((1, 3))


@pytest.mark.parametrize(
    "rule",
    [
        Rule(),
        Rule(causal=False).restrict(Near(9)),
        Rule().restrict(Near(9)),
        Rule().restrict(Near(3, sinks=2)),
    ],
    ids=["causal", "window both ways", "window", "sinks"],
)
def test_only_tiles_with_something_to_see_are_visited(rule):
    """For sorted tokens of whole documents the bounds are exact: no tile in vain, none missed."""
    queries, keys = tokens(N=64, M=64)
    tile = 8
    seg = np.repeat(np.arange(2, dtype=np.int32), 32)[None].repeat(2, 0)
    pos = np.tile(np.arange(32, dtype=np.int32), (2, 2))
    queries, keys = queries._replace(pos=pos, seg=seg), keys._replace(pos=pos, seg=seg)
    visited = reached(rule, queries, keys, tile)
    np.testing.assert_array_equal(visited, visible_tiles(rule, queries, keys, tile))
    assert visited.mean() < 0.5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), causal=st.booleans(), window=st.integers(1, 20))
def test_reach_never_misses_a_visible_pair(seed, causal, window):
    rng = np.random.default_rng(seed)
    queries, keys = tokens(N=24, M=24, B=1)
    where = {
        "pos": rng.integers(0, 40, (1, 24), np.int32),
        "seg": rng.integers(-1, 3, (1, 24), np.int32),
    }
    queries, keys = queries._replace(**where), keys._replace(**where)
    rule = Rule(causal=causal).restrict(Near(window))
    assert not np.any(visible_tiles(rule, queries, keys, 4) & ~reached(rule, queries, keys, 4))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 512, 513, 1000, 4096, 100_003])
@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("limit", [None, 2**20])
def test_tiles_are_bounded_and_waste_little(length, rows, limit):
    tile = blockwise.tile_size(length, rows, limit)
    assert 1 <= tile <= 512
    assert rows * tile**2 <= blockwise.LOGITS_IN_FLIGHT or tile <= 64
    padded = -(-length // tile) * tile
    assert padded - length < max(8 * (padded // tile), 1)


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_a_batch_in_turn_are_the_batch(rows, monkeypatch):
    queries, keys = tokens(B=4)
    rule = Rule(taps=(("heads", lambda z: z * jnp.arange(4.0)[:, None]),))

    def attend(queries, keys, rule):
        near, far = Span(8, 0, 8), Span(8, -16, 0)
        out, lse = blockwise.attend(queries, keys, rule)
        more, _ = blockwise.attend_sets(queries, rule, 16, (keys, near), (keys, far))
        return out + more, lse

    wanted = jax.jit(partial(both, attend))(queries, keys, rule)
    monkeypatch.setattr(blockwise, "LOGITS_IN_FLIGHT", rows * 4 * 16**2)
    monkeypatch.setattr(blockwise, "LARGEST", 16)
    assert blockwise.rows_at_once(4, 4, 40) == rows
    got = jax.jit(partial(both, attend))(queries, keys, rule)
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], atol=2e-5, err_msg=name)


def test_rows_divide_the_batch_and_devices_share_it(monkeypatch):
    assert [blockwise.rows_at_once(b, 4, 512) for b in (1, 6, 8)] == [1, 1, 1]
    assert [blockwise.rows_at_once(b, 1, 512) for b in (1, 6, 8)] == [1, 3, 4]
    assert blockwise.rows_at_once(8, 4, 1) == 8
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    with jax.set_mesh(mesh):
        assert blockwise.rows_at_once(8, 4, 512) == (8 if len(jax.devices()) > 1 else 1)
