"""Positions that add to the logits: t5, kerple, fire, transformer_xl, and looking up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import Dims, positions
from attnlab.errors import UserError
from attnlab.positions import lookup
from attnlab.positions.fire import Fire
from attnlab.positions.kerple import Kerple
from attnlab.positions.lookup import collect, look_up
from attnlab.positions.t5 import T5, bucket_table
from attnlab.positions.transformer_xl import TransformerXl

DIMS = Dims(16, 4, 2, 8, 8)
BIASED = [name for name in positions.names() if positions.get(name).biased]


def vectors(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def shaken(position):
    """Parameters off their initial value."""
    start = position.init(jax.random.key(0), DIMS)
    return jax.tree.map(lambda z: np.asarray(z) + 0.1 * vectors(*z.shape), start)


def bias_of(position, params, q, q_pos, k_pos):
    return np.asarray(jax.jit(position.bias)(params, q, q_pos, k_pos))


@pytest.mark.parametrize("name", BIASED)
def test_tiles_are_parts_of_the_whole(name):
    """Any part of the tokens, in any order, across packed documents and far from the start."""
    position = positions.get(name)()
    params, q = shaken(position), vectors(2, 4, 24, 8)
    pos = np.stack([np.r_[np.arange(10), np.arange(14)], 3000 + np.arange(24)]).astype(np.int32)
    full = np.broadcast_to(bias_of(position, params, q, pos, pos), (2, 4, 24, 24))
    some, others = np.r_[7, 3, 12:20], np.r_[23, 0, 5:16]
    part = bias_of(position, params, q[:, :, some], pos[:, some], pos[:, others])
    wanted = full[:, :, some][..., others]
    np.testing.assert_allclose(np.broadcast_to(part, wanted.shape), wanted, atol=2e-5)


@pytest.mark.parametrize("name", BIASED)
def test_a_shift_changes_nothing_where_that_is_promised(name):
    position = positions.get(name)()
    params, q = shaken(position), vectors(1, 4, 12, 8)
    pos = np.arange(12, dtype=np.int32)[None]
    here, there = (bias_of(position, params, q, pos + far, pos + far) for far in (0, 100_000))
    assert np.array_equal(here, there) == position.relative


# Buckets


def test_buckets_begin_where_those_of_t5_begin():
    def starts(buckets):
        table = bucket_table(buckets, 128)
        return [int(np.flatnonzero(table == b)[0]) for b in range(buckets)]

    causal = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert starts(32) == [*range(16), *causal]
    assert starts(16) == [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    assert bucket_table(32, 128).max() == 31


def test_t5_bias_is_the_entry_of_the_bucket_on_its_side():
    table = vectors(4, 64)
    q_pos = np.array([[0, 5, 400]], np.int32)
    k_pos = np.array([[0, 7, 20, 10_000]], np.int32)
    got = bias_of(T5(), {"table": table}, np.zeros((1, 4, 3, 8)), q_pos, k_pos)[0]
    later = 32 + np.array([0, 7, 16 + 1, 31])  # 20 lies in the bucket that begins at 19
    np.testing.assert_array_equal(got[:, 0, 1:], table[:, later[1:]])
    np.testing.assert_array_equal(got[:, 0, 0], table[:, 0])
    np.testing.assert_array_equal(got[:, 1, :2], table[:, [5, 32 + 2]])
    np.testing.assert_array_equal(got[:, 2], table[:, [31, 31, 31, 63]])


def test_t5_gradient_counts_the_logits_of_every_bucket():
    pos, weight = np.arange(300, dtype=np.int32)[None], vectors(1, 4, 300, 300)
    q = np.zeros((1, 4, 300, 8), np.float32)

    def loss(table):
        return jnp.sum(T5().bias({"table": table}, q, pos, pos) * weight)

    got = jax.jit(jax.grad(loss))(np.zeros((4, 64), np.float32))
    delta = pos[0][:, None] - pos[0][None]
    bucket = bucket_table(32, 128)[np.minimum(np.abs(delta), 128)] + 32 * (delta < 0)
    for head in range(4):
        wanted = np.bincount(bucket.ravel(), weight[0, head].ravel().astype(np.float64), 64)
        np.testing.assert_allclose(got[head], wanted, atol=1e-3)


# Looking up


@pytest.mark.parametrize("ones", [1, 2**22])
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 3, 1, 5)])
def test_look_up_and_its_gradient_are_those_of_indexing(shape, ones, monkeypatch):
    monkeypatch.setattr(lookup, "ONES_IN_FLIGHT", ones)
    rows, index = vectors(*shape), np.random.default_rng(1).integers(0, 5, (2, 7, 6), np.int32)
    weight = vectors(2, 3, 7, 6, seed=2)

    def indexed(rows):
        full = jnp.broadcast_to(rows, (2, 3, 7, 5))
        return jnp.stack([full[b, :, n][:, index[b, n]] for b in range(2) for n in range(7)])

    got, pull = jax.vjp(lambda rows: look_up(rows, index), rows)
    wanted, wanted_pull = jax.vjp(indexed, rows)
    wanted = wanted.reshape(2, 7, 3, 6).swapaxes(1, 2)
    np.testing.assert_array_equal(got, wanted)
    cotangent = weight.swapaxes(1, 2).reshape(14, 3, 6)
    np.testing.assert_allclose(pull(weight)[0], wanted_pull(cotangent)[0], atol=1e-5)


def test_collect_is_the_transpose_of_look_up_in_both_directions():
    index = np.random.default_rng(1).integers(0, 5, (2, 7, 6), np.int32)
    z, bins = vectors(2, 3, 7, 6), vectors(2, 3, 7, 5, seed=3)
    got, pull = jax.vjp(lambda z: collect(z, index, 5), z)
    assert got.shape == (2, 3, 7, 5)
    np.testing.assert_allclose(np.vdot(got, bins), np.vdot(z, look_up(bins, index)), rtol=1e-4)
    np.testing.assert_array_equal(pull(bins)[0], look_up(bins, index))


# Functions of the distance


def test_kerple_is_minus_p_log_of_one_plus_a_distance():
    raw = {"p": np.array([-1.0, 0.5], np.float32), "a": np.array([2.0, -3.0], np.float32)}
    q_pos, k_pos = np.array([[0, 9]], np.int32), np.array([[0, 4, 5000]], np.int32)
    got = bias_of(Kerple(), raw, np.zeros((1, 2, 2, 8)), q_pos, k_pos)[0]
    delta = np.array([[0, 4, 5000], [9, 5, 4991]])
    for head in range(2):
        p, a = (np.log1p(np.exp(np.float64(raw[name][head]))) for name in "pa")
        np.testing.assert_allclose(got[head], -p * np.log1p(a * delta), rtol=1e-5, atol=1e-6)


def test_kerple_begins_with_p_in_0_2_and_a_in_0_1():
    params = Kerple().init(jax.random.key(0), Dims(16, 4096, 1, 8, 8))
    p, a = (np.asarray(jax.nn.softplus(params[name])) for name in "pa")
    for z, high in ((p, 2.0), (a, 1.0)):
        assert 0.009 <= z.min() < 0.05 * high
        assert 0.97 * high < z.max() <= 1.0001 * high
        np.testing.assert_allclose(z.mean(), high / 2, rtol=0.05)


def literal_fire(params, original, i, j):
    """The equation with its hidden layer, token by token pair, in f64; under a causal mask."""
    params = {name: np.asarray(z, np.float64) for name, z in params.items()}

    def psi(x):
        return np.log(1 + abs(params["c"]) * x)

    x = psi(i - j) / psi(np.maximum(abs(params["m"]) * original, i))
    hidden = np.maximum(x[..., None] * params["slope"] + params["offset"], 0)
    return np.moveaxis(hidden @ params["out"], -1, 0)


def test_fire_is_its_equation_and_so_is_its_gradient():
    position, q_pos = Fire(original=10), np.arange(40, dtype=np.int32)[None]
    params = shaken(position)
    params["slope"][:2], params["offset"][1] = 0.0, -1.0  # a ReLU without a kink, on and off
    got = bias_of(position, params, np.zeros((1, 4, 40, 8)), q_pos, q_pos)[0]
    i, j = np.tril_indices(40)
    np.testing.assert_allclose(got[:, i, j], literal_fire(params, 10, i, j), atol=1e-5)

    weight = np.where(np.tri(40) > 0, vectors(1, 4, 40, 40, seed=3), 0)

    def loss(params):
        return jnp.sum(weight * position.bias(params, np.zeros((1, 4, 40, 8)), q_pos, q_pos))

    gradient = jax.jit(jax.grad(loss))(params)
    for name, place in (("c", ()), ("m", ()), ("slope", 5), ("offset", 5), ("out", (5, 1))):
        sides = []
        for step in (1e-6, -1e-6):
            moved = {key: np.array(z, np.float64) for key, z in params.items()}
            moved[name][place] += step
            sides.append(np.sum(literal_fire(moved, 10, i, j) * weight[0][:, i, j]))
        slope = (sides[0] - sides[1]) / 2e-6
        got_slope = np.asarray(gradient[name])[place]
        np.testing.assert_allclose(got_slope, slope, rtol=2e-3, atol=2e-3, err_msg=name)


def test_fire_stays_within_the_arguments_that_were_trained():
    """Twice the length: no new argument of f, so no bias beyond those between its ends."""
    position, params = Fire(original=16), shaken(Fire())
    x = np.linspace(0, 1, 5000, dtype=np.float32)[None, None]
    curve = np.asarray(position.curve(params, x))[0, :, 0]
    far = bias_of(
        position, params, np.zeros((1, 4, 1, 8)), np.array([[9000]]), np.arange(9001)[None]
    )
    assert np.all(far[0].max((1, 2)) <= curve.max(1) + 1e-3)
    assert np.all(far[0].min((1, 2)) >= curve.min(1) - 1e-3)


# Transformer-XL


def test_transformer_xl_is_its_equation_on_both_sides():
    position, params = TransformerXl(), shaken(TransformerXl())
    q, pos = vectors(1, 6, 4, 8), np.array([[0, 1, 2, 3, 50, 51]], np.int32)
    turned = position.rotate(params, q, pos, "query")
    np.testing.assert_allclose(turned, q + params["u"], atol=1e-6)
    np.testing.assert_array_equal(position.rotate(params, q, pos, "key"), q)
    got = bias_of(position, params, np.swapaxes(turned, 1, 2), pos, pos)
    delta = (pos[0][:, None] - pos[0][None]).astype(np.float64)
    phase = delta[..., None] * 10_000.0 ** (-np.arange(8) / 8)
    waves = np.concatenate([np.sin(phase), np.cos(phase)], -1)
    keys = np.einsum("ijw,whd->ijhd", waves, params["w"])
    wanted = np.einsum("bihd,ijhd->bhij", q + params["v"], keys) / 8**0.5
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_transformer_xl_is_the_shifted_matrix_of_products_where_that_is_defined():
    """Products with the distances M−1 .. 0 as columns; one column of zeros at the left, reshape,
    first row off: entry (i, j) then belongs to distance i − j."""
    position, params = TransformerXl(), shaken(TransformerXl())
    N, q = 7, vectors(1, 7, 4, 8)
    pos = np.arange(N, dtype=np.int32)[None]
    turned = np.swapaxes(position.rotate(params, q, pos, "query"), 1, 2)
    columns = bias_of(position, params, turned, pos * 0, -np.arange(N)[None, ::-1])
    padded = np.pad(columns, ((0, 0), (0, 0), (0, 0), (1, 0)))
    shifted = padded.reshape(1, 4, N + 1, N)[:, :, 1:].reshape(1, 4, N, N)
    got = bias_of(position, params, turned, pos, pos)
    i, j = np.tril_indices(N)
    np.testing.assert_allclose(got[..., i, j], shifted[..., i, j], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T5(buckets=7), "t5: buckets=7, max_distance=128; use an even number"),
        (lambda: T5(max_distance=16), "t5: .*max_distance > buckets / 2"),
        (lambda: Fire(hidden=0), "fire: hidden=0, original=512; both must be at least 1"),
        (
            lambda: TransformerXl().validate(Dims(15, 3, 3, 5, 5)),
            "transformer_xl: width 15 is odd; use 16",
        ),
    ],
)
def test_options_without_meaning_are_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()
