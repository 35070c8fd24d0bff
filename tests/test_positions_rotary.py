"""Rotary positions read for longer texts: interpolated, ntk, yarn."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import Dims, positions
from attnlab.errors import UserError
from attnlab.positions.interpolated import Interpolated
from attnlab.positions.ntk import Ntk
from attnlab.positions.rope import Rope
from attnlab.positions.yarn import Yarn

SCALED = ("interpolated", "ntk", "yarn")
POS = np.arange(40, dtype=np.int32)[None]


def vectors(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def turned(position, z, pos=POS):
    return np.asarray(position.rotate({}, z, pos, "query"))


@pytest.mark.parametrize("name", SCALED)
def test_at_factor_one_it_is_rope(name):
    z = vectors(1, 40, 2, 16)
    np.testing.assert_array_equal(
        turned(positions.get(name)(factor=1.0), z), turned(Rope(), z), strict=True
    )


def test_interleaved_order_is_a_fixed_permutation_of_the_halves():
    z, even_then_odd = vectors(1, 40, 2, 16), np.r_[0:16:2, 1:16:2]
    pairs = z.reshape(1, 40, 2, 8, 2).astype(np.float64)
    phase = POS[0, :, None, None] * 10_000.0 ** (-np.arange(8) / 8)
    wanted = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * phase)
    got = turned(Rope(), z[..., even_then_odd])
    np.testing.assert_allclose(got, np.concatenate([wanted.real, wanted.imag], -1), atol=2e-5)


def test_interpolated_positions_are_those_of_rope_divided():
    z = vectors(1, 10, 2, 16)
    far = turned(Interpolated(factor=4.0), z, 4 * POS[:, :10])
    np.testing.assert_allclose(far, turned(Rope(), z, POS[:, :10]), atol=1e-5)


def phases(position, size=16, at=1):
    """φ_t at one position, from the turned unit vectors of the first half."""
    z = np.zeros((1, 1, 1, size), np.float32)
    z[..., : size // 2] = 1
    out = turned(position, z, np.full((1, 1), at, np.int32))[0, 0, 0]
    return np.arctan2(out[size // 2 :], out[: size // 2])


def test_ntk_keeps_the_fastest_phase_and_stretches_the_slowest_by_the_factor():
    plain, scaled = phases(Rope()), phases(Ntk(factor=8.0))
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-4)
    assert np.all(np.diff(plain / scaled) > 0)


def test_yarn_band_and_magnitude_are_the_published_ones():
    yarn = Yarn(factor=16.0, original=4096)
    assert yarn.band(128) == (20, 46)
    z = vectors(1, 40, 2, 128)
    ratio = np.linalg.norm(turned(yarn, z), axis=-1) / np.linalg.norm(z, axis=-1)
    np.testing.assert_allclose(ratio, 1.2773, atol=1e-4)


def test_yarn_keeps_fast_phases_and_interpolates_slow_ones():
    yarn = Yarn(factor=16.0, original=4096)
    t = np.arange(64)
    plain = 10_000.0 ** (-t / 64)
    ramp = np.clip((t - 20) / (46 - 20), 0, 1)
    wanted = plain * (1 - ramp) + plain / 16 * ramp
    np.testing.assert_allclose(yarn.frequencies(128), wanted, rtol=1e-5)
    turns = 4096 * plain / (2 * math.pi)
    assert np.all(turns[:20] > 32)
    assert np.all(turns[47:] < 1)


def test_yarn_has_a_band_for_any_size():
    for size in (2, 8, 64):
        for original in (1, 16, 100_000):
            theta = np.asarray(Yarn(original=original).frequencies(size))
            assert theta.shape == (size // 2,)
            assert np.all(np.isfinite(theta) & (theta > 0))


@pytest.mark.parametrize("name", SCALED)
def test_bfloat16_rounds_the_result_and_not_the_phase(name):
    position = positions.get(name)()
    z = jnp.asarray(vectors(1, 40, 2, 16), jnp.bfloat16)
    far = POS + 10_000
    exact = turned(position, z.astype(jnp.float32), far)
    np.testing.assert_allclose(turned(position, z, far).astype(np.float32), exact, atol=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interpolated(factor=0.5), "interpolated: factor=0.5 must be at least 1"),
        (lambda: Ntk(factor=math.nan), "ntk: factor=nan must be at least 1"),
        (lambda: Yarn(original=0), "yarn: original=0"),
        (lambda: Yarn(fast=1.0, slow=2.0), "yarn: .*use original >= 1 and fast >= slow > 0"),
        (lambda: Ntk().validate(Dims(4, 2, 2, 2, 2)), "ntk: head size 2 has a single phase"),
        (lambda: Yarn().validate(Dims(14, 2, 2, 7, 7)), "yarn: head size 7 is odd; use 6 or 8"),
    ],
)
def test_options_without_meaning_are_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()
