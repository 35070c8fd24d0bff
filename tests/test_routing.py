"""Routing: k-means that follows the data, clusters that do not leak, and a selection that does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, quick_outputs
from battery.cases import Case, documents, draw
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnlab.core import Rule
from attnlab.engines import bucketed, union
from attnlab.errors import UserError
from attnlab.mechanisms.routing import Routing, affinities, average, normalise, select_members
from attnlab.positions.none import NoPosition


def case_of(**fields):
    return Case(Routing(**fields), NoPosition())


@pytest.fixture(scope="module")
def statistics_of():
    """``aux["statistics"]`` and the other measurements of one call, compiled."""

    def call(case, inputs):
        params, place = inputs.params
        return case.mechanism(params, inputs.queries(), inputs.keys(), case.rule(place)).aux

    return jax.jit(call, static_argnums=0)


def test_one_cluster_is_softmax_over_normalised_shared_queries_and_keys():
    case = case_of(clusters=1, length=40)
    inputs = draw(case, length=40)
    u = (inputs.q.astype(np.float64) + np.repeat(inputs.k, 2, 2)) / np.sqrt(2)
    u = (u - u.mean(-1, keepdims=True)) / u.std(-1, keepdims=True)
    z = np.einsum("bihd,bjhd->bhij", u, u) / np.sqrt(8)
    z *= np.exp(inputs.params[0]["temperature"])[:, None, None]
    past = np.tri(40, k=-1, dtype=bool)
    past[0, 0] = True  # the first token has only itself
    p = np.where(past, np.exp(z), 0)
    wanted = np.einsum("bhij,bjhe->bihe", p / p.sum(-1, keepdims=True), np.repeat(inputs.v, 2, 2))
    assert_close(quick_outputs(case, inputs), wanted, 5e-5)


@pytest.mark.slow
def test_the_order_of_the_clusters_does_not_matter():
    case = case_of(clusters=4, length=5)
    inputs = draw(case)
    params, place = inputs.params
    turned = jax.tree.map(lambda z: z[:, ::-1], params["statistics"])
    other = inputs._replace(params=({**params, "statistics": turned}, place))
    assert_close(quick_outputs(case, other), quick_outputs(case, inputs))


def test_centroids_become_the_means_of_their_clusters():
    """Three directions, fed again and again: one centroid goes to each, the fourth stays."""
    rng = np.random.default_rng(0)
    means = normalise(rng.standard_normal((3, 16)))
    u = np.repeat(means, 20, 0) + 0.02 * rng.standard_normal((60, 16))
    u = jnp.asarray(u[None, :, None], jnp.float32)
    centroids = np.concatenate([means + 0.5 * rng.standard_normal((3, 16)), -means[:1]])
    start = {"centroids": jnp.asarray(centroids[None], jnp.float32), "mass": jnp.ones((1, 4))}

    @jax.jit
    def follow(statistics):
        cluster = jnp.argmax(affinities(u, statistics["centroids"]), -1)
        return average(statistics, u, jax.nn.one_hot(cluster, 4), 0.8)

    now = start
    for _ in range(60):
        now = follow(now)
    wanted = np.asarray(u).reshape(3, 20, 16).mean(1)
    assert_close(now["centroids"][0, :3], wanted, 1e-4)
    np.testing.assert_array_equal(now["centroids"][0, 3], start["centroids"][0, 3])
    assert_close(now["mass"][0], np.array([20, 20, 20, 0]), 1e-4)


def test_the_first_batch_takes_the_centroids_to_its_means():
    u = jax.random.normal(jax.random.key(0), (1, 6, 1, 4))
    start = {"centroids": jnp.ones((1, 2, 4)), "mass": jnp.zeros((1, 2))}
    after = average(start, u, jax.nn.one_hot(jnp.array([[[0, 0, 0, 1, 1, 1]]]), 2), 0.999)
    assert_close(after["centroids"][0], u[0, :, 0].reshape(2, 3, 4).mean(1), 1e-4)


def test_empty_slots_are_not_measured(statistics_of):
    case = case_of(clusters=4, length=5)
    short = draw(case, length=20)
    long = documents(draw(case, length=20), (20,), (20,)).tokens(
        lambda z: np.concatenate([z, z[:, :12]], 1)
    )
    long.seg[:, 20:] = -1
    a, b = statistics_of(case, short), statistics_of(case, long)
    for name in ("statistics", "loss", "stats"):
        assert_close(a[name], b[name])


def test_two_devices_measure_what_one_does(statistics_of):
    case = case_of(clusters=4, length=5)
    inputs = draw(case, batch=4)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spread = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(inputs.params, NamedSharding(mesh, PartitionSpec()))
    sharded = inputs.tokens(lambda z: jax.device_put(z, spread))._replace(params=params)
    got, wanted = statistics_of(case, sharded), statistics_of(case, inputs)
    assert_close(jax.tree.map(np.asarray, got), wanted)


def test_the_published_selection_leaks_through_no_gradient():
    """A later token that is closer to a centroid takes an earlier one's place in the cluster."""
    case, N, t = case_of(clusters=4), 48, 30
    inputs, noise = draw(case, length=N), draw(case, length=N, seed=1)
    centroids = inputs.params[0]["statistics"]["centroids"]

    @jax.jit
    def published(q):
        z = inputs._replace(q=q)
        u = normalise(bucketed.tie(z.queries(), z.keys()))
        met = select_members(affinities(u, centroids), N // 4)
        queries, keys = z.queries()._replace(q=u), z.keys()._replace(k=u)
        return union.attend(queries, keys, Rule(), met)[0]

    late = (np.arange(N) >= t)[:, None, None]
    moved = np.abs(published(np.where(late, noise.q, inputs.q)) - published(inputs.q))
    assert np.max(moved[:, :t]) > 1e-2
    gradient = jax.jit(jax.grad(lambda q: published(q)[:, :t].sum()))(inputs.q)
    assert np.any(gradient[:, :t])
    assert not np.any(gradient[:, t:])


def test_a_decay_of_1_keeps_every_centroid():
    draw = np.random.default_rng(0)
    before = {"centroids": draw.standard_normal((2, 4, 8)), "mass": np.zeros((2, 4))}
    members = jax.nn.one_hot(draw.integers(4, size=(1, 2, 16)), 4)
    after = average(before, jnp.asarray(draw.standard_normal((1, 16, 2, 8))), members, 1.0)
    for name, z in before.items():
        np.testing.assert_array_equal(after[name], np.asarray(z, np.float32))


@pytest.mark.parametrize(
    "fields", [{"clusters": 0}, {"length": 0}, {"decay": 1.5}, {"commitment": -1.0}]
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(UserError, match="routing: clusters="):
        Routing(**fields)
