"""The dense oracle against JAX's own attention, an independent statement of the same equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import MASK, Dims, Keys, Queries, Rule, count_pairs, positions
from attnlab.engines import dense
from attnlab.mechanisms.softmax import Softmax


def tokens(N=24, B=2, H=4, G=2, D=8, seed=0):
    normal = np.random.default_rng(seed).standard_normal
    pos = np.tile(np.arange(N, dtype=np.int32), (B, 1))
    q, k, v = (normal((B, N, heads, D), np.float32) for heads in (H, G, G))
    return Queries(q, pos, pos * 0), Keys(k, v, pos, pos * 0)


attend = jax.jit(dense.attend)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_agrees_with_jax_nn(causal, kv_heads):
    queries, keys = tokens(G=kv_heads)
    out, *_ = attend(queries, keys, Rule(causal=causal))
    wanted = jax.nn.dot_product_attention(queries.q, keys.k, keys.v, is_causal=causal)
    np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_gradients_agree_with_jax_nn():
    queries, keys = tokens()

    def ours(q, k, v):
        return jnp.sum(
            jnp.sin(dense.attend(queries._replace(q=q), Keys(k, v, *keys[2:]), Rule())[0])
        )

    def theirs(q, k, v):
        return jnp.sum(jnp.sin(jax.nn.dot_product_attention(q, k, v, is_causal=True)))

    got, wanted = (
        jax.jit(jax.grad(f, (0, 1, 2)))(queries.q, keys.k, keys.v) for f in (ours, theirs)
    )
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_segments_agree_with_a_mask_given_to_jax_nn():
    queries, keys = tokens()
    seg = (queries.pos > 9).astype(np.int32)
    out, *_ = attend(queries._replace(seg=seg), keys._replace(seg=seg), Rule())
    mask = seg[:, None, :, None] == seg[:, None, None, :]
    wanted = jax.nn.dot_product_attention(queries.q, keys.k, keys.v, mask=mask, is_causal=True)
    np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_soft_cap_and_scale_are_what_the_rule_says():
    queries, keys = tokens(G=4)
    _, lse, _ = attend(queries, keys, Rule(scale=0.7, soft_cap=3.0, causal=False))
    z = 3.0 * np.tanh(0.7 * np.einsum("bnhd,bmhd->bhnm", queries.q, keys.k) / 3.0)
    np.testing.assert_allclose(lse, np.log(np.exp(z).sum(-1)), atol=1e-5)


def test_probabilities_sum_to_one_or_to_nothing():
    queries, keys = tokens()
    seg = np.where(queries.pos < 20, 0, -1)
    out, lse, probs = attend(queries._replace(seg=seg), keys, Rule())
    np.testing.assert_allclose(probs[:, :, :20].sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(probs[:, :, 20:], 0)
    np.testing.assert_array_equal(out[:, 20:], 0)
    np.testing.assert_array_equal(lse[:, :, 20:], np.float32(MASK))


def test_taps_see_and_rewrite_what_is_computed_by_hand():
    """Logits + 1 on one key and probabilities x 2, against four lines of NumPy."""
    queries, keys = tokens(G=4)
    rule = Rule(
        causal=False,
        taps=(("logits", lambda z: z.at[..., 3].add(1.0)), ("probs", lambda p: 2.0 * p)),
    )
    result = Softmax()({}, queries, keys, rule)
    z = np.einsum("bnhd,bmhd->bhnm", queries.q, keys.k) * 8**-0.5
    z[..., 3] += 1.0
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    wanted = 2.0 * np.einsum("bhnm,bmhe->bnhe", p, keys.v)
    np.testing.assert_allclose(result.out, wanted, atol=1e-5)


def test_masked_logits_cannot_be_tapped_back_into_sight():
    queries, keys = tokens()
    seen = Rule(taps=(("logits", lambda z: z + 100.0),))
    np.testing.assert_allclose(
        attend(queries, keys, seen)[0], attend(queries, keys, Rule())[0], atol=1e-4
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 7, 24])
def test_flops_of_softmax_count_every_visible_pair(length, causal):
    queries, keys = tokens(N=length, B=1)
    pairs = int(np.sum(Rule(causal=causal).allowed(queries, keys)))
    assert count_pairs(length, None, causal) == pairs
    dims = Dims(16, 4, 2, 8, 6)
    assert Softmax().flops(dims, length, causal) == 4 * pairs * 2 * (8 + 6)


def test_gradients_are_finite_however_it_is_compiled():
    """Without compiler optimisation the logits are rounded twice, differently: a gradient that
    asks where the maximum was does not find it."""
    queries, keys = tokens()
    rule = Rule(position=positions.get("alibi")())

    def loss(q, k, v):
        out, lse, _ = dense.attend(queries._replace(q=q), keys._replace(k=k, v=v), rule)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    for z in grad(queries.q, keys.k, keys.v):
        assert np.all(np.isfinite(z))
