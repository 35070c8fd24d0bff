"""lucidrains/performer-pytorch, whose keys are scaled by later keys: `pytest -m peers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import Keys, Queries, Rule
from attnlab.mechanisms.favor import Favor, draw_projection

B, N, H, D, FEATURES = 2, 45, 2, 8, 20

pytestmark = pytest.mark.peers


def arrays():
    *draw, last = jax.random.split(jax.random.key(0), 5)
    z = [jax.random.normal(key, (B, N, H, D)) for key in draw]
    return (*z, draw_projection(last, FEATURES, D))


def ours(q, k, v, projection, causal):
    pos = jnp.broadcast_to(jnp.arange(N), (B, N))
    params = {"statistics": {"projection": projection, "age": jnp.zeros(())}}
    tokens = Queries(q, pos, pos * 0), Keys(k, v, pos, pos * 0)
    return Favor(FEATURES, chunk=8)(params, *tokens, Rule(causal=causal)).out


@pytest.mark.parametrize("causal", [False, True])
def test_outputs_and_gradients_equal_theirs_without_the_epsilon(causal):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("performer_pytorch.performer_pytorch")
    *z, weight, projection = arrays()
    q, k, v = leaves = [torch.tensor(np.asarray(a), requires_grad=True) for a in z]
    drawn = torch.tensor(np.asarray(projection))

    def features(z, is_query):
        heads_first = z.transpose(1, 2)
        return peer.softmax_kernel(heads_first, projection_matrix=drawn, is_query=is_query, eps=0.0)

    mapped = features(q, True), features(k, False), v.transpose(1, 2)
    if causal:
        wanted = peer.causal_linear_attention_noncuda(*mapped, chunk_size=4, eps=0.0)
    else:
        wanted = peer.linear_attention(*mapped)
    wanted = wanted.transpose(1, 2)
    (wanted * torch.tensor(np.asarray(weight))).sum().backward()

    def loss(*z):
        out = ours(*z, projection, causal)
        return jnp.sum(out * weight), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*z)
    for a, b in zip((out, *grads), (wanted, *(z.grad for z in leaves))):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_a_later_key_changes_their_earlier_outputs_and_not_ours():
    """They scale every key by the largest feature of all, which cancels but for the epsilon added
    after it: one loud key at the end, and earlier outputs are plain means of the values, less what
    a second epsilon, in the denominator, takes."""
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("performer_pytorch")
    q, k, v, _, projection = arrays()
    loud = k.at[:, -1].multiply(100)
    before, after = (jax.jit(ours, static_argnums=4)(q, z, v, projection, True) for z in (k, loud))
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])

    layer = peer.FastAttention(D, FEATURES, causal=True)
    layer.projection_matrix.copy_(torch.tensor(np.asarray(projection)))

    def theirs(*z):
        heads_first = [torch.tensor(np.asarray(a)).transpose(1, 2) for a in z]
        return layer(*heads_first).transpose(1, 2).numpy()

    count = np.arange(1, N + 1)[:, None, None]
    means = np.cumsum(v, 1) / (count + 1e-6 / (1e-4 * FEATURES**-0.5))
    changed = theirs(q, loud, v)[:, :-1]
    np.testing.assert_allclose(changed, means[:, :-1], atol=1e-4)
    assert np.max(np.abs(theirs(q, k, v)[:, :-1] - changed)) > 0.1
