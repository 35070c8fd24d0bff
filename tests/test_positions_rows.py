"""Positions that look at whole rows: shaw and cope, against loops over single tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import Dims, Keys, Queries, Rule
from attnlab.errors import UserError
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.window import Window
from attnlab.positions.cope import Cope
from attnlab.positions.shaw import Shaw
from attnlab.refusals import refuse_bias

B, N, H, G, D = 1, 11, 2, 1, 4
DIMS = Dims(8, H, G, D, D)


def vectors(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def tokens():
    """Two packed documents, stored backwards: a row is in order of position, not of slot."""
    q, k, v = vectors(B, N, H, D), vectors(B, N, G, D, seed=1), vectors(B, N, G, D, seed=2)
    pos = np.r_[np.arange(6), np.arange(5)][None, ::-1].astype(np.int32)
    seg = np.r_[np.zeros(6), np.ones(5)][None, ::-1].astype(np.int32)
    return Queries(q, pos, seg), Keys(k, v, pos, seg)


def attend(position, params, mechanism=None, causal=True):
    call = jax.jit(lambda q, k, rule: (mechanism or Softmax())({}, q, k, rule).out)
    return np.asarray(call(*tokens(), Rule(params, position, causal)))


def literally(logits_of, values_of, causal, window=N):
    """Softmax over the visible keys of each query, with logits and values given token by token."""
    queries, keys = tokens()
    out = np.zeros((B, N, H, D))
    for n in range(N):
        far = queries.pos[0, n] - keys.pos[0]
        seen = (keys.seg[0] == queries.seg[0, n]) & (np.abs(far) < window)
        seen &= (far >= 0) | (not causal)
        rows = sorted(np.flatnonzero(seen), key=lambda m: keys.pos[0, m])
        for h in range(H):
            z = logits_of(queries.q[0, n, h].astype(np.float64), n, rows, keys)
            p = np.exp(z - z.max())
            out[0, n, h] = (p / p.sum()) @ values_of(n, rows, keys)
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [N, 3])
def test_shaw_adds_vectors_of_the_clipped_distance_to_keys_and_values(causal, window):
    a, b = vectors(5, D, seed=4), vectors(5, D, seed=5)

    def places(n, rows, keys):
        return np.clip(keys.pos[0, rows] - keys.pos[0, n], -2, 2) + 2

    def logits(q, n, rows, keys):
        return (keys.k[0, rows, 0] + a[places(n, rows, keys)]) @ q / D**0.5

    def values(n, rows, keys):
        return keys.v[0, rows, 0] + b[places(n, rows, keys)]

    mechanism = Window(window=window)
    got = attend(Shaw(reach=2), {"a": a, "b": b}, mechanism, causal)
    np.testing.assert_allclose(got, literally(logits, values, causal, window), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [N, 3])
def test_cope_counts_the_gates_between_key_and_query(causal, window):
    e = vectors(3, D, seed=4)

    def logits(q, n, rows, keys):
        z = keys.k[0, rows, 0] @ q / D**0.5
        gates, far = 1 / (1 + np.exp(-z)), keys.pos[0, rows] - keys.pos[0, n]
        for place, away in enumerate(far):
            between = (far >= away) & (far <= 0) if away <= 0 else (far <= away) & (far >= 0)
            count = min(gates[between].sum(), 2.0)
            low = min(int(count), 1)
            z[place] += ((low + 1 - count) * e[low] + (count - low) * e[low + 1]) @ q / D**0.5
        return z

    def values(n, rows, keys):
        return keys.v[0, rows, 0]

    got = attend(Cope(positions=3), {"e": e}, Window(window=window), causal)
    np.testing.assert_allclose(got, literally(logits, values, causal, window), atol=1e-5)


def test_cope_with_open_gates_counts_tokens():
    """Every gate at 1: an embedding of the distance, the key itself being the first counted."""
    pos, q = np.arange(9, dtype=np.int32)[None], vectors(1, 2, 9, D)
    seen, e = np.tri(9, dtype=bool)[None, None], vectors(6, D, seed=4)
    open_gates = np.full((1, 2, 9, 9), 100.0, np.float32)
    got = np.asarray(Cope(positions=6).row_bias({"e": e}, open_gates, seen, q, pos, pos))
    i, j = np.tril_indices(9)
    wanted = np.einsum("bhnd,nd->bhn", q[:, :, i], e[np.minimum(i - j + 1, 5)]) / D**0.5
    np.testing.assert_allclose(got[..., i, j], wanted, atol=1e-5)


def test_cope_gradient_reaches_the_gates_until_the_count_is_full():
    pos, q = np.arange(4, dtype=np.int32)[None], np.ones((1, 1, 4, D), np.float32)
    seen, e = np.tri(4, dtype=bool)[None, None], vectors(3, D, seed=4)

    def last(z):
        return Cope(positions=3).row_bias({"e": e}, z, seen, q, pos, pos)[0, 0, 3, 0]

    slow, full = (jnp.full((1, 1, 4, 4), level) for level in (-1.0, 6.0))
    assert np.all(np.asarray(jax.grad(last)(slow))[0, 0, 3] != 0)
    assert not np.any(np.asarray(jax.grad(last)(full)))


@pytest.mark.parametrize("position", [Shaw(reach=3), Cope(positions=4)])
def test_a_shift_of_all_positions_changes_nothing(position):
    queries, keys = tokens()
    params = position.init(jax.random.key(0), DIMS)
    params = jax.tree.map(lambda z: jax.random.normal(jax.random.key(1), z.shape), params)

    @jax.jit
    def call(far):
        moved = queries._replace(pos=queries.pos + far), keys._replace(pos=keys.pos + far)
        return Softmax()({}, *moved, Rule(params, position, True)).out

    np.testing.assert_array_equal(call(1000), call(0))
    plain = Softmax()({}, queries, keys, Rule()).out
    assert np.any(np.abs(call(0) - plain) > 0.01), "the position module takes part"


@pytest.mark.parametrize("position", [Shaw(), Cope()])
def test_mechanisms_without_logits_refuse_it(position):
    with pytest.raises(UserError, match="attention linear forms no logits, so position"):
        refuse_bias("linear", Rule({}, position))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shaw(reach=0), "shaw: reach=0 must be at least 1"),
        (lambda: Cope(positions=1), "cope: positions=1 must be at least 2"),
    ],
)
def test_options_without_meaning_are_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()
