"""LSH attention: a softmax over what hashes alike, and hashes that keep directions together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, quick_outputs
from battery.cases import DIMS, Case, documents, draw
from battery.continuation import extend

from attnlab.core import Rule
from attnlab.errors import UserError
from attnlab.mechanisms.lsh import Lsh, factors, hash_directions
from attnlab.positions.none import NoPosition


def tied(inputs):
    """q and k of one head-sized vector per token and query head, in NumPy and f64."""
    u = (inputs.q.astype(np.float64) + np.repeat(inputs.k, 2, 2)) / np.sqrt(2)
    k = u / np.sqrt(np.mean(u * u, -1, keepdims=True) + 1e-6)
    return u, k, np.repeat(inputs.v, 2, 2)


def softmax_over(seen, inputs):
    """Row by row in f64; ``seen(b, h, i)`` lists the keys of a query other than itself."""
    u, k, v = tied(inputs)
    out = np.zeros_like(v, np.float64)
    for b, i, h in np.ndindex(*u.shape[:3]):
        keys = seen(b, h, i) or [i]
        z = k[b, keys, h] @ u[b, i, h] / np.sqrt(u.shape[-1])
        p = np.exp(z - z.max())
        out[b, i, h] = p @ v[b, keys, h] / p.sum()
    return out


def test_one_bucket_is_softmax_with_a_shared_query_and_key():
    case = Case(Lsh(rounds=1, buckets=1, length=40), NoPosition())
    inputs = draw(case, length=40)
    wanted = softmax_over(lambda b, h, i: list(range(i)), inputs)
    assert_close(quick_outputs(case, inputs), wanted)


def test_three_rounds_are_one_softmax_over_the_union_of_their_newest_keys():
    case = Case(Lsh(rounds=3, buckets=6, length=5), NoPosition())
    inputs = draw(case, length=80)
    u = jnp.asarray(tied(inputs)[0], jnp.float32)
    buckets = np.asarray(hash_directions(u, 3, 6, jax.random.key(7)))

    def seen(b, h, i):
        rounds = ([j for j in range(i) if code[b, h, j] == code[b, h, i]][-5:] for code in buckets)
        return sorted({j for found in rounds for j in found})

    assert_close(quick_outputs(case, inputs), softmax_over(seen, inputs))


@pytest.mark.parametrize("pieces", [(1,) * 24, (7, 1, 16)])
def test_decoding_from_rings_equals_training_in_packed_documents(pieces):
    case = Case(Lsh(rounds=2, buckets=2, length=3), NoPosition())
    inputs = documents(draw(case), (9, 15), (24,)).tokens(lambda z: z[:, :24])
    state = case.mechanism.initial_state(DIMS, 2)
    assert state.pos.shape == (2, DIMS.heads, 2, 2, 3)
    whole = np.asarray(quick_outputs(case, inputs))
    padded = inputs.tokens(lambda z: np.pad(z, [(0, 0), (0, 8)] + [(0, 0)] * (z.ndim - 2)))
    padded.seg[:, 24:] = -1
    assert_close(extend(case, padded, (*pieces, 8))[:, :24], whole)


@pytest.mark.parametrize("buckets", [8, 64])
def test_the_chance_of_a_collision_falls_with_the_angle(buckets):
    """1 at 0 degrees, 0 at 180, and less at every step between."""
    rng, D = np.random.default_rng(0), 16
    a = rng.standard_normal((1, 4000, 1, D))
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    b = rng.standard_normal(a.shape)
    b -= np.sum(a * b, -1, keepdims=True) * a
    b /= np.linalg.norm(b, axis=-1, keepdims=True)

    @jax.jit
    def find(u):
        return hash_directions(u, 2, buckets, jax.random.key(3))

    home, shares = find(jnp.asarray(3 * a, jnp.float32)), []
    for angle in np.deg2rad([0, 20, 45, 75, 110, 180]):
        u = np.cos(angle) * a + np.sin(angle) * b
        shares.append(float(np.mean(home == find(jnp.asarray(u, jnp.float32)))))
    assert shares[0] > 0.999
    assert shares[-1] == 0
    assert np.all(np.diff(shares) < 0), shares


def test_all_buckets_are_used_and_none_is_beyond_the_last():
    u = jax.random.normal(jax.random.key(0), (1, 4000, 1, 16))
    for buckets in (1, 2, 30, 96):
        found = np.unique(hash_directions(u, 1, buckets, jax.random.key(1)))
        np.testing.assert_array_equal(found, np.arange(buckets))
        assert np.prod(factors(buckets), dtype=int) == buckets


def test_a_key_draws_other_directions_and_none_draws_those_of_the_seed():
    case = Case(Lsh(rounds=1, buckets=4, length=4), NoPosition())
    inputs = draw(case)

    def call(key, seed=0):
        mechanism = Lsh(1, 4, 4, seed)
        return mechanism({}, inputs.queries(), inputs.keys(), Rule(), key=key).out

    call = jax.jit(call, static_argnums=1)
    np.testing.assert_array_equal(call(None), call(None))
    np.testing.assert_array_equal(call(None), call(jax.random.key(0)))
    assert np.any(call(None) != call(jax.random.key(1)))
    assert np.any(call(None) != call(None, 1))


@pytest.mark.parametrize(
    "fields", [{"rounds": 0}, {"buckets": 0}, {"length": 0}, {"buckets": 7}, {"buckets": 66}]
)
def test_sizes_without_meaning_are_refused(fields):
    with pytest.raises(UserError, match=r"lsh: .*buckets=1, an even number"):
        Lsh(**fields)
