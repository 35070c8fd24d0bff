"""lucidrains/routing-transformer, whose members may leak: `pytest -m peers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import Keys, Queries, Rule
from attnlab.mechanisms.routing import Routing, average, select_members

B, N, H, D, K = 2, 48, 3, 8, 4

pytestmark = pytest.mark.peers


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def peer(torch):
    return pytest.importorskip("routing_transformer.routing_transformer")


def balanced_tokens():
    """Unit centroids [H K D], and tokens [B N H D] of which each has N / K near it."""
    draw = np.random.default_rng(0)
    signs = np.array([[1, -1], [1, 1]])
    rows = np.kron(np.kron(signs, signs), signs)  # orthogonal; row 7 is the constant one
    centroids = np.stack([draw.permutation(np.delete(rows, 7, 0))[:K] for _ in range(H)]) / D**0.5
    own = draw.permuted(np.tile(np.arange(N) % K, (B, H, 1)), axis=2)
    near = np.moveaxis(centroids[np.arange(H)[:, None], own], 1, 2)
    tokens = near + 0.1 * draw.standard_normal((B, N, H, D))
    return centroids.astype(np.float32), tokens.astype(np.float32)


def test_the_published_selection_is_theirs(torch, peer):
    affinity = np.random.default_rng(0).standard_normal((B, H, N, K)).astype(np.float32)
    chosen = peer.distribution(torch.tensor(affinity), N // K).reshape(B, H, K, -1)
    member = torch.zeros(B, H, K, N).scatter_(3, chosen, 1.0).numpy()
    meet = np.einsum("bhkn,bhkm->bhnm", member, member) > 0
    np.testing.assert_array_equal(select_members(jnp.asarray(affinity), N // K), meet)


def test_centroids_move_where_theirs_do(torch, peer):
    """Theirs are the directions of the means of the members; ours are the means."""
    centroids, tokens = balanced_tokens()
    wanted = peer.kmeans_iter(torch.tensor(tokens).transpose(1, 2), torch.tensor(centroids))
    cluster = np.argmax(np.einsum("bnhd,hkd->bhnk", tokens, centroids), -1)
    before = {"centroids": jnp.asarray(centroids), "mass": jnp.zeros((H, K))}
    after = average(before, jnp.asarray(tokens), jax.nn.one_hot(cluster, K), 0.999)["centroids"]
    directions = after / jnp.linalg.norm(after, axis=-1, keepdims=True)
    np.testing.assert_allclose(directions, wanted.numpy(), atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_inside_even_clusters_is_theirs(torch, peer, causal):
    """Where every cluster has its share of tokens, their nearest tokens of a centroid are its
    members, once each. Keys are unit vectors there, hence the temperature. In f64: in f32 their
    −5e4 for a token's own logit costs a lone token three digits."""
    centroids, tokens = balanced_tokens()
    v, weight = np.random.default_rng(1).standard_normal((2, B, N, H, D))
    layer = peer.KmeansAttention(K, N // K, H, D, causal=causal, shared_qk=True, commitment=1.0)
    layer.eval().kmeans.means.copy_(torch.tensor(centroids))
    layer.kmeans.initted.fill_(True)
    x, values = (torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in (tokens, v))
    u = torch.nn.functional.layer_norm(x, (D,), eps=1e-6).transpose(1, 2)
    wanted, commitment = layer(u, u, values.transpose(1, 2))
    wanted = wanted.transpose(1, 2)
    (wanted * torch.tensor(weight)).sum().backward()

    pos = jnp.broadcast_to(jnp.arange(N), (B, N))
    statistics = {"centroids": jnp.asarray(centroids) * D**0.5, "mass": jnp.ones((H, K))}
    params = {"temperature": jnp.full(H, -jnp.log(D) / 2), "statistics": statistics}

    def loss(x, v):
        tokens = Queries(x, pos, pos * 0), Keys(x, v, pos, pos * 0)
        result = Routing(K, N // K, commitment=1.0)(params, *tokens, Rule(causal=causal))
        return jnp.sum(result.out * weight), (result.out, result.aux["loss"])

    inputs = jnp.asarray(tokens), jnp.asarray(v, jnp.float32)
    grads, (out, cost) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*inputs)
    for a, b in zip((out, *grads), (wanted, x.grad, values.grad)):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(cost, D * commitment.item(), rtol=1e-4)
