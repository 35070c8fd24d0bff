"""lucidrains' Reformer, outputs and gradients: `pip install -e '.[peers]' && pytest -m peers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import Keys, Queries, Rule
from attnlab.engines import bucketed
from attnlab.mechanisms.lsh import hash_directions, shared_pair
from attnlab.mechanisms.reformer import plan_chunks

B, N, D, CHUNK, ROUNDS = 2, 64, 8, 8, 3

pytestmark = pytest.mark.peers


def their_attention(u, v, weight, buckets, once):
    """Output and gradients of their layer, given our buckets; it looks one chunk back. In f64: in
    f32 their −5e4 for a token's own logit costs a lone token three digits."""
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    layer = peer.LSHAttention(
        bucket_size=CHUNK,
        n_hashes=ROUNDS,
        causal=True,
        allow_duplicate_attention=not once,
        attend_across_buckets=False,
    )
    offset = np.arange(ROUNDS)[:, None, None] * (N // CHUNK)
    codes = torch.tensor(np.moveaxis(buckets + offset, 0, 1).reshape(B, -1).astype(np.int64))
    layer.hash_vectors = lambda *_, **__: codes
    u, v = (torch.tensor(np.asarray(z, np.float64), requires_grad=True) for z in (u, v))
    out = layer(u, v)[0]
    (out * torch.tensor(np.asarray(weight, np.float64))).sum().backward()
    return [z.detach().numpy() for z in (out, u.grad, v.grad)]


@pytest.mark.parametrize("once", [True, False])
def test_the_published_chunk_rule_is_that_of_reformer_pytorch(once):
    """Their logits are q·k / |k| / √D where ours are q·k / |k|, hence the scale."""
    keys = jax.random.split(jax.random.key(0), 3)
    u, v, weight = (jax.random.normal(key, (B, N, D)) for key in keys)
    buckets = hash_directions(u[:, :, None], ROUNDS, N // CHUNK, jax.random.key(1))
    pos = jnp.broadcast_to(jnp.arange(N), (B, N))

    def loss(u, v):
        z = u[:, :, None] * 2**-0.5  # q + k over √2 is u again
        tokens = Queries(z, pos, pos * 0), Keys(z, v[:, :, None], pos, pos * 0)
        queries, answers, _ = shared_pair(*tokens)
        plan, reach = plan_chunks(buckets, CHUNK, queries, causal=True)
        reach = reach._replace(united=once)
        out, _ = bucketed.attend(queries, answers, Rule(scale=1 / D), plan, reach)
        return jnp.sum(out[:, :, 0] * weight), out[:, :, 0]

    grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(u, v)
    theirs = their_attention(u, v, weight, np.asarray(buckets)[:, :, 0], once)
    for ours, wanted in zip((out, *grads), theirs):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=2e-5)
