"""Every normaliser against its closed forms and an independent solution, values and gradients."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attnlab.config import base, model_of
from attnlab.core import MASK, Dims, Keys, Queries, Rule, normalisers
from attnlab.engines import dense
from attnlab.errors import UserError
from attnlab.limits import validate
from attnlab.normalisers.entmax import Entmax
from attnlab.normalisers.log_n import LogN
from attnlab.normalisers.sigmoid import Sigmoid
from attnlab.normalisers.softmax import Softmax
from attnlab.normalisers.softmax_plus_one import SoftmaxPlusOne
from attnlab.normalisers.sparsemax import Sparsemax
from attnlab.normalisers.ssmax import Ssmax
from attnlab.normalisers.top_k import TopK
from attnlab.optimizer import is_matrix
from attnlab.positions.rope import Rope
from attnlab.refusals import refuse_every_normaliser, refuse_normaliser

DIMS = Dims(8, 2, 2, 4, 4)
NAMES = normalisers.names()
CLOSED = (Softmax(), TopK(4), Entmax(), Entmax(1.25), Sparsemax())
"""Those that depend on nothing but the row, and whose weights sum to one."""

draw = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def anew():
    """What a test draws does not depend on the tests before it."""
    draw.bit_generator.state = np.random.default_rng(0).bit_generator.state


def weigh(normaliser, z, seen=None) -> np.ndarray:
    """The weights of logits [n M] as one head sees them, all keys visible unless told."""
    seen = np.ones(z.shape, bool) if seen is None else seen
    return np.asarray(_weights(normaliser, np.asarray(z, np.float32), seen))


@partial(jax.jit, static_argnums=0)
def _weights(normaliser, z, seen):
    return normaliser.weights({}, jnp.where(seen, z, MASK)[None, None], seen[None, None])[0, 0]


def needle(margin: float, n: int) -> np.ndarray:
    """One logit of ``margin`` and n − 1 of 0: [1 n]."""
    return np.eye(1, n) * margin


def simplex_projection(z: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex, in f64, by sorting."""
    ranked = np.sort(z)[::-1]
    excess = np.cumsum(ranked) - 1
    support = np.nonzero(ranked > excess / np.arange(1, len(z) + 1))[0][-1]
    return np.maximum(z - excess[support] / (support + 1), 0)


def attend(normaliser, q, k, v, params=None, causal=True):
    """One document of dense attention, [1 N heads D] each."""
    pos = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    params = normaliser.init(jax.random.key(0), DIMS) if params is None else params
    rule = Rule(causal=causal, normaliser=normaliser, normaliser_params=params)
    return dense.attend(Queries(q, pos, pos * 0), Keys(k, v, pos, pos * 0), rule)


@pytest.mark.parametrize("normaliser", CLOSED, ids=repr)
@pytest.mark.parametrize("n", [1, 7, 4096])
def test_equal_logits_share_alike(normaliser, n):
    np.testing.assert_allclose(weigh(normaliser, np.full((1, n), 3.0)), 1 / n, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 7, 4096])
def test_equal_logits_of_zero_where_nothing_need_be_attended(n):
    np.testing.assert_allclose(weigh(Sigmoid(), np.zeros((1, n))), 1 / (n + 1), rtol=1e-5)
    np.testing.assert_allclose(weigh(SoftmaxPlusOne(), np.zeros((1, n))), 1 / (n + 1), rtol=1e-5)


@pytest.mark.parametrize("n", [2, 256, 2**20])
@pytest.mark.parametrize("margin", [0.5, 0.9, 1.5, 4.0, 8.0])
def test_the_needle_keeps_its_closed_form(n, margin):
    z, e = needle(margin, n), math.exp(margin)
    expected = {
        Softmax(): e / (e + n - 1),
        SoftmaxPlusOne(): e / (e + n),
        Sigmoid(): e / (e + n),
        TopK(1): 1.0,
        Sparsemax(): 1.0 if margin >= 1 else margin + (1 - margin) / n,
        Entmax(1.5): entmax15_needle(margin, n),
    }
    for normaliser, wanted in expected.items():
        got = weigh(normaliser, z)[0, 0]
        np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=1e-5, err_msg=repr(normaliser))


def entmax15_needle(margin: float, n: int) -> float:
    """(m/2 + t)² + (n − 1) t² = 1 with t >= 0 the root of the others' weight."""
    half = margin / 2
    if half >= 1:
        return 1.0
    t = (-half + math.sqrt(half**2 - n * (half**2 - 1))) / n
    return (half + t) ** 2


def test_sparse_weights_do_not_dilute():
    far = needle(0.9, 2**20)
    assert weigh(Softmax(), far)[0, 0] < 1e-5
    np.testing.assert_allclose(weigh(Sparsemax(), far)[0, 0], 0.9, atol=1e-5)
    np.testing.assert_allclose(weigh(Entmax(), far)[0, 0], 0.9**2 / 4, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 5, 5000])
def test_sparsemax_is_the_nearest_point_of_the_simplex(seed, size):
    z = np.random.default_rng(seed).standard_normal((3, size)) * 2
    wanted = np.stack([simplex_projection(row) for row in z])
    for same in (Sparsemax(), Entmax(2.0)):
        np.testing.assert_allclose(weigh(same, z), wanted, atol=2e-6)


@pytest.mark.parametrize("alpha", [1.01, 1.1, 1.25, 1.5, 1.9, 2.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_entmax_solves_its_equation(alpha, spread):
    z = draw.standard_normal((8, 300)) * spread
    p = weigh(Entmax(alpha), z).astype(np.float64)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-4)
    # On the support z − p^(α − 1) / (α − 1) is one number, and no key outside lies above it but
    # where its weight is about the least number of f32.
    lost = 1e-35 ** (alpha - 1) / (alpha - 1)
    for row, weights in zip(z, p):
        inside = weights > 1e-4
        level = row[inside] - weights[inside] ** (alpha - 1) / (alpha - 1)
        assert np.ptp(level) < 1e-3 * max(1, spread)
        assert np.all(row[weights == 0] <= level.min() + lost + 1e-3 * max(1, spread))


def test_entmax_near_one_is_softmax():
    z = draw.standard_normal((4, 50))
    np.testing.assert_allclose(weigh(Entmax(1.0001), z), weigh(Softmax(), z), atol=2e-4)


@pytest.mark.parametrize("normaliser", CLOSED, ids=repr)
def test_a_shift_of_all_logits_changes_nothing(normaliser):
    z = draw.standard_normal((4, 30)).astype(np.float32)
    np.testing.assert_allclose(weigh(normaliser, z + 100), weigh(normaliser, z), atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_keys_means_nothing_even_where_they_tie(name):
    z = np.round(draw.standard_normal((4, 40)) * 2) / 2
    order = draw.permutation(40)
    normaliser = normalisers.get(name)()
    np.testing.assert_allclose(
        weigh(normaliser, z[:, order]), weigh(normaliser, z)[:, order], atol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_keys_unseen_weigh_nothing_and_do_not_count(name):
    normaliser = normalisers.get(name)()
    z, seen = draw.standard_normal((5, 12)), draw.random((5, 12)) < 0.6
    seen[0], seen[1] = False, np.arange(12) == 3
    p = weigh(normaliser, z, seen)
    assert not p[~seen].any()
    for row, visible, got in zip(z, seen, p):
        if visible.any():
            np.testing.assert_allclose(got[visible], weigh(normaliser, row[None, visible])[0], 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_at_ties_zeros_and_empty_rows(name):
    normaliser = normalisers.get(name)()
    seen = np.ones((1, 1, 6, 20), bool)
    seen[..., 5, :] = False
    z = np.zeros((1, 1, 6, 20), np.float32)
    z[..., 1, 0] = 50.0  # one key takes all
    z[..., 2, :2] = 1.0  # two tie for all
    z[..., 3, :] = draw.standard_normal(20)
    z[..., 4, :] = -1e6
    cotangent = draw.standard_normal(z.shape).astype(np.float32)

    def loss(z):
        return jnp.sum(normaliser.weights({}, jnp.where(seen, z, MASK), seen) * cotangent)

    value, gradient = jax.value_and_grad(loss)(z)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[..., 5, :])


@pytest.mark.parametrize("normaliser", [*CLOSED, Sigmoid(), SoftmaxPlusOne()], ids=repr)
def test_gradients_are_those_of_finite_differences(normaliser):
    z = jnp.asarray(draw.standard_normal((1, 1, 2, 9)), jnp.float32)
    seen = jnp.arange(9) < 8

    def weights(z):
        return normaliser.weights({}, jnp.where(seen, z, MASK), seen[None, None, None])

    check_grads(weights, (z,), order=1, modes=("fwd", "rev"), eps=1e-3, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("normaliser", [Ssmax(length=9), LogN(length=9)], ids=repr)
def test_a_scaled_softmax_is_softmax_at_its_length(normaliser):
    q, k, v = (jnp.asarray(draw.standard_normal((1, 20, 2, 4)), jnp.float32) for _ in range(3))
    got, plain = attend(normaliser, q, k, v)[0], attend(Softmax(), q, k, v)[0]
    np.testing.assert_allclose(got[:, 8], plain[:, 8], atol=1e-6)
    assert np.max(np.abs(got[:, 2] - plain[:, 2])) > 1e-3
    assert np.max(np.abs(got[:, 19] - plain[:, 19])) > 1e-3


@pytest.mark.parametrize(("margin", "rises"), [(4.0, False), (8.0, True)])
def test_with_length_softmax_dilutes_and_ssmax_focuses_above_its_margin(margin, rises):
    ssmax, weights = Ssmax(length=256), {Softmax(): [], Ssmax(length=256): []}
    scale = ssmax.init(jax.random.key(0), DIMS)["scale"][0]
    lengths = (16, 256, 4096, 65536)
    for n in lengths:
        pos = jnp.full((1, 1), n - 1)
        factor = ssmax.scale({"scale": scale[None]}, pos, True)[0, 0, 0]
        weights[Softmax()].append(weigh(Softmax(), needle(margin, n))[0, 0])
        weights[ssmax].append(weigh(Softmax(), needle(float(margin * factor), n))[0, 0])
        power = n ** (float(scale) * margin)
        np.testing.assert_allclose(weights[ssmax][-1], power / (power + n - 1), rtol=1e-4)
    assert (margin > 1 / scale) == rises
    assert np.all(np.diff(weights[Softmax()]) < 0)
    assert np.all(np.diff(weights[ssmax]) > 0 if rises else np.diff(weights[ssmax]) < 0)


def test_heads_of_ssmax_have_temperatures_of_their_own():
    q, k, v = (jnp.asarray(draw.standard_normal((1, 9, 2, 4)), jnp.float32) for _ in range(3))
    probs = attend(Ssmax(), q, k, v, {"scale": jnp.array([0.0, 100.0])})[2]
    np.testing.assert_allclose(probs[0, 0, 8], 1 / 9, rtol=1e-5)
    assert np.max(probs[0, 1, 8]) > 0.99


def test_the_first_token_keeps_its_logits():
    """ln 1 = 0 would erase the query, and with it what a mechanism reads off it."""
    assert LogN().scale({}, jnp.zeros((1, 1), jnp.int32), True)[0, 0, 0] > 0


@pytest.mark.parametrize("name", ["ssmax", "log_n"])
def test_counting_needs_an_order_of_time(name):
    q = jnp.ones((1, 3, 2, 4))
    with pytest.raises(UserError, match=rf"normaliser {name} .* cannot be bidirectional"):
        attend(normalisers.get(name)(), q, q, q, causal=False)
    config = base(normaliser=name)
    validate(config)
    config.model.causal = False
    with pytest.raises(UserError, match=rf"normaliser {name} .* cannot be bidirectional"):
        validate(config)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ssmax", {"length": 1}),
        ("log_n", {"length": 0}),
        ("top_k", {"k": 0}),
        ("entmax", {"alpha": 1.0}),
        ("entmax", {"alpha": 2.5}),
    ],
)
def test_options_without_meaning_are_refused_by_name(name, options):
    (option,) = options
    with pytest.raises(UserError, match=f"normaliser {name}: {option}="):
        normalisers.get(name)(**options)


@pytest.mark.parametrize("name", NAMES)
def test_who_merges_parts_refuses_what_needs_the_row(name):
    rule = Rule(normaliser=normalisers.get(name)())
    if name in ("softmax", "ssmax", "log_n"):
        refuse_normaliser("mine", rule)
    else:
        with pytest.raises(UserError, match=rf"attention mine .* normaliser {name} "):
            refuse_normaliser("mine", rule)
    if name == "softmax":
        refuse_every_normaliser("mine", rule)
    else:
        with pytest.raises(UserError, match=rf"attention mine .* normaliser {name} "):
            refuse_every_normaliser("mine", rule)


def test_who_merges_parts_refuses_positions_that_look_at_rows():
    class Looking(Rope):
        whole = True

    with pytest.raises(UserError, match=r"attention mine .* position test_normalisers"):
        refuse_normaliser("mine", Rule(position=Looking()))


def test_the_learned_scales_are_in_every_layer_and_do_not_decay():
    config = base(normaliser="ssmax")
    config.model.update({"width": 16, "layers": 2, "heads": 2, "kv_heads": 2})
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(model_of(config, 17).init, jax.random.key(0), tokens, tokens, tokens)
    for i in range(2):
        layer = params["params"]["backbone"][f"layer_{i}"]["attention"]
        assert layer["normaliser"]["scale"].shape == (2,)
        assert not is_matrix(layer)["normaliser"]["scale"]
