"""Positions: each against its own equation, stated again without the code under test."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core import Dims, positions
from attnlab.errors import UserError
from attnlab.positions.absolute import Absolute
from attnlab.positions.alibi import Alibi, slopes
from attnlab.positions.rope import Rope


def geometric(heads):
    """Slopes for a power of two start at 2^(-8/H) and that is their ratio; other numbers of heads
    take the powers of two below and every second slope of twice as many."""
    if math.log2(heads).is_integer():
        start = 2 ** -(2 ** -(math.log2(heads) - 3))
        return [start ** (i + 1) for i in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return geometric(below) + geometric(2 * below)[0::2][: heads - below]


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 10, 12, 16, 20])
def test_alibi_slopes_are_the_authors_sequence(heads):
    np.testing.assert_allclose(slopes(heads), geometric(heads), rtol=1e-6)
    assert len(set(slopes(heads).tolist())) == heads


def test_alibi_is_minus_slope_times_distance():
    pos = np.asarray([[3, 4, 9]], np.int32)
    q = np.zeros((1, 8, 3, 4), np.float32)
    bias = Alibi().bias({}, q, pos, pos[:, :2])
    assert bias.shape == (1, 8, 3, 2)
    np.testing.assert_array_equal(bias[0, 0], -0.5 * np.asarray([[0, 1], [1, 0], [6, 5]]))
    np.testing.assert_array_equal(bias[0, 7], bias[0, 0] / 128)


def vectors(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


rotate = jax.jit(lambda z, pos: Rope().rotate({}, z, pos, "query"))


def turned(z, pos, base=10_000.0):
    """The rotation as a product of complex numbers, in f64."""
    half = z.shape[-1] // 2
    phase = pos[..., None, None] * base ** (-np.arange(half, dtype=np.float64) / half)
    pairs = (z[..., :half] + 1j * z[..., half:].astype(np.float64)) * np.exp(1j * phase)
    return np.concatenate([pairs.real, pairs.imag], -1)


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 2000), shift=st.integers(0, 2000))
def test_rope_keeps_norms_and_depends_on_distance_only(start, shift):
    q, k = vectors((1, 6, 2, 8)), vectors((1, 6, 2, 8), 1)
    pos = start + np.arange(6, dtype=np.int32)[None]
    np.testing.assert_allclose(
        np.linalg.norm(rotate(q, pos), axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5
    )
    here = np.einsum("bnhd,bmhd->bhnm", rotate(q, pos), rotate(k, pos))
    there = np.einsum("bnhd,bmhd->bhnm", rotate(q, pos + shift), rotate(k, pos + shift))
    np.testing.assert_allclose(here, there, atol=1e-2)


@pytest.mark.parametrize(("far", "tolerance"), [(0, 1e-6), (1000, 3e-4), (100_000, 3e-2)])
def test_rope_phases_keep_float32_precision_far_away(far, tolerance):
    """A phase of P radians is known to P 2^-23: at 100,000 to 0.012, where bf16 knows nothing."""
    z, pos = vectors((1, 16, 2, 64)), far + np.arange(16, dtype=np.int32)[None]
    np.testing.assert_allclose(rotate(z, pos), turned(z, pos), atol=tolerance)
    rounded = jnp.asarray(z, jnp.bfloat16)
    wanted = turned(np.asarray(rounded, np.float32), pos)
    got = np.asarray(rotate(rounded, pos), np.float32)
    np.testing.assert_allclose(got, wanted, atol=tolerance + 4 * 2.0**-8)


def test_rope_base_is_the_wavelength_scale():
    z, pos = vectors((1, 5, 1, 8)), np.arange(5, dtype=np.int32)[None]
    got = Rope(base=100.0).rotate({}, z, pos, "key")
    np.testing.assert_allclose(got, turned(z, pos, 100.0), atol=1e-5)


def test_absolute_adds_sines_and_cosines_of_every_wavelength():
    x, pos = vectors((2, 5, 12)), np.arange(10, dtype=np.int32).reshape(2, 5)
    added = np.asarray(Absolute().embed({}, x, pos)) - x
    for t in range(6):
        phase = pos / 10_000 ** (2 * t / 12)
        np.testing.assert_allclose(added[..., t], np.sin(phase), atol=1e-5)
        np.testing.assert_allclose(added[..., 6 + t], np.cos(phase), atol=1e-5)


@pytest.mark.parametrize("place", positions.names())
def test_what_a_position_does_not_use_it_leaves_alone(place):
    """A bias exists where it is declared; dtypes and shapes survive."""
    position, dims = positions.get(place)(), Dims(16, 4, 2, 8, 8)
    params = position.init(jax.random.key(0), dims)
    pos = np.arange(5, dtype=np.int32)[None]
    z = jnp.ones((1, 5, 4, 8), jnp.bfloat16)
    for side in ("query", "key"):
        turned = position.rotate(params, z, pos, side)
        assert (turned.shape, turned.dtype) == (z.shape, z.dtype)
    x = jnp.ones((1, 5, 16), jnp.bfloat16)
    embedded = position.embed(params if position.shared else {}, x, pos)
    assert (embedded.shape, embedded.dtype) == (x.shape, x.dtype)
    bias = position.bias(params, jnp.ones((1, 4, 5, 8)), pos, pos[:, :3])
    assert (bias is not None) == position.biased
    if bias is not None:
        assert bias.dtype == jnp.float32
        assert jnp.broadcast_shapes(bias.shape, (1, 4, 5, 3)) == (1, 4, 5, 3)
    position.validate(dims)


@pytest.mark.parametrize(
    ("position", "dims", "message"),
    [
        (Rope(), Dims(16, 2, 2, 7, 7), "rope: head size 7 is odd; use 6 or 8"),
        (Absolute(), Dims(15, 3, 3, 5, 5), "absolute: width 15 is odd; use 16"),
    ],
)
def test_sizes_without_meaning_are_refused_by_name(position, dims, message):
    with pytest.raises(UserError, match=message):
        position.validate(dims)
