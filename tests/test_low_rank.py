"""Linformer, Nyströmformer and the literal U Vᵀ: what each is, and what it cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import outputs
from battery.cases import DIMS, Case, draw

from attnlab.core import Dims, Keys, Queries, Rule, positions
from attnlab.errors import UserError
from attnlab.mechanisms.linformer import Linformer
from attnlab.mechanisms.low_rank import LowRank
from attnlab.mechanisms.nystrom import Nystrom, convolve, pseudo_inverse
from attnlab.mechanisms.softmax import Softmax

NOWHERE = positions.get("none")()


def tokens(length, heads=2, dim=8, size=1.0, seed=0):
    """(queries, keys) of one document in one row."""
    normal = np.random.default_rng(seed).standard_normal
    q, k, v = (size * normal((1, length, heads, dim), np.float32) for _ in range(3))
    pos = np.arange(length, dtype=np.int32)[None]
    return Queries(q, pos, pos * 0), Keys(k, v, pos, pos * 0)


def softmax(queries, keys):
    return Softmax().reference({}, queries, keys, Rule({}, NOWHERE, False)).out


def relative_error(mechanism, params, queries, keys):
    out = jax.jit(lambda q, k: mechanism(params, q, k, Rule({}, NOWHERE, False)).out)(queries, keys)
    wanted = softmax(queries, keys)
    return float(jnp.linalg.norm(out - wanted) / jnp.linalg.norm(wanted))


def test_linformer_with_identity_projections_is_softmax():
    queries, keys = tokens(24)
    eye = jnp.eye(24)
    params = {"keys": eye, "values": eye}
    assert relative_error(Linformer(rank=24, max_length=24), params, queries, keys) < 1e-5


def test_linformer_refuses_more_tokens_than_it_has_projections_for():
    mechanism = Linformer(rank=2, max_length=16)
    params = mechanism.init(jax.random.key(0), DIMS)
    with pytest.raises(UserError, match="max_length=16"):
        mechanism(params, *tokens(17), Rule({}, NOWHERE, False))


def test_nystrom_with_a_landmark_per_token_is_softmax_once_the_inverse_converged():
    queries, keys = tokens(48, dim=16)
    errors = [
        relative_error(Nystrom(landmarks=48, steps=steps, kernel=0), {}, queries, keys)
        for steps in (6, 12, 20)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


@pytest.mark.slow
def test_nystrom_does_not_gain_from_the_exact_inverse_with_few_landmarks():
    queries, keys = tokens(128, dim=16, seed=2)
    few, many = (
        relative_error(Nystrom(landmarks=32, steps=steps, kernel=0), {}, queries, keys)
        for steps in (6, 30)
    )
    assert few < many


def test_the_iteration_converges_to_the_pseudo_inverse():
    z = np.random.default_rng(1).standard_normal((3, 6, 6), np.float32)
    a = np.asarray(jax.nn.softmax(4 * jnp.eye(6) + z, -1))
    np.testing.assert_allclose(pseudo_inverse(a, 20), np.linalg.pinv(a), atol=1e-4)


@pytest.mark.parametrize("taps", [1, 5, 67, 129])
def test_the_convolution_and_its_gradients_are_those_of_each_head(taps):
    draw = np.random.default_rng(taps).standard_normal
    shapes = (2, 3, 70, 4), (3, taps), (2, 3, 70, 4)
    v, kernel, d_out = (jnp.asarray(draw(shape, np.float32)) for shape in shapes)

    def plain(v, kernel):
        def lane(z, weights):
            return jnp.convolve(z, weights[::-1])[taps // 2 :][:70]

        heads = jax.vmap(lane, (0, 0))
        return jax.vmap(jax.vmap(heads, (0, None)), (3, None), 3)(v, kernel)

    (out, pull), (wanted, wanted_pull) = (jax.vjp(f, v, kernel) for f in (convolve, plain))
    for a, b in zip((out, *pull(d_out)), (wanted, *wanted_pull(d_out))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_nystrom_averages_constant_values_to_themselves():
    queries, keys = tokens(40)
    ones = keys._replace(v=np.ones_like(keys.v))
    out = Nystrom(landmarks=40, steps=20, kernel=0)({}, queries, ones, Rule({}, NOWHERE, False)).out
    np.testing.assert_allclose(out, 1, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_low_rank_rows_are_distributions_over_the_visible_keys(causal):
    mechanism = LowRank(rank=3, chunk=8)
    params = mechanism.init(jax.random.key(0), Dims(16, 2, 2, 8, 8))
    queries, keys = tokens(21)
    seen = keys._replace(v=np.tile(np.eye(21, dtype=np.float32)[None, :, None], (1, 1, 2, 1)))
    rule = Rule({}, NOWHERE, causal)
    weights = np.asarray(mechanism(params, queries, seen, rule).out)[0]  # [N H M]
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert weights.min() >= 0
    if causal:
        assert not np.any(weights * (np.arange(21) > np.arange(21)[:, None])[:, None])
    else:
        assert np.linalg.matrix_rank(weights[:, 0], tol=1e-5) == 3


@pytest.mark.parametrize("mechanism", [Linformer(rank=2, max_length=64), Nystrom(landmarks=2)])
def test_what_cannot_be_causal_says_so_and_names_what_can(mechanism):
    with pytest.raises(UserError, match=r"cannot be causal.*long_short, slots"):
        outputs(Case(mechanism, NOWHERE), draw(Case(mechanism, NOWHERE)))
