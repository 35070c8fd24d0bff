"""lucidrains/linformer, outputs and gradients: `pip install -e '.[peers]' && pytest -m peers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import Keys, Queries, Rule
from attnlab.mechanisms.linformer import Linformer

B, N, H, D, LENGTH, RANK = 2, 21, 4, 8, 32, 5

pytestmark = pytest.mark.peers


def their_attention(q, k, v, params, weight):
    """Output and gradients of their layer, whose projections pick q, k and v out of its input."""
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("linformer")
    widths = [z[0, 0].size for z in (q, k, v)]
    layer = peer.LinformerSelfAttention(
        sum(widths), LENGTH, RANK, H, D, one_kv_head=k.shape[2] == 1
    )
    arrays = [torch.tensor(np.asarray(z), requires_grad=True) for z in (q, k, v)]
    picks = torch.eye(sum(widths)).split(widths)
    for projection, pick in zip((layer.to_q, layer.to_k, layer.to_v), picks):
        projection.weight.data = pick
    layer.proj_k.data, layer.proj_v.data = (
        torch.tensor(np.asarray(params[name])) for name in ("keys", "values")
    )
    layer.to_out = torch.nn.Identity()
    out = layer(torch.cat([z.flatten(2) for z in arrays], -1)).reshape(q.shape)
    (out * torch.tensor(np.asarray(weight))).sum().backward()
    grads = [z.grad for z in (*arrays, layer.proj_k, layer.proj_v)]
    return [z.detach().numpy() for z in (out, *grads)]


@pytest.mark.parametrize("kv_heads", [H, 1])
def test_outputs_and_gradients_equal_those_of_the_linformer_package(kv_heads):
    """On fewer tokens than it has rows for: both then use the first rows of E and F."""
    draw = iter(jax.random.split(jax.random.key(0), 6))
    shapes = [(B, N, heads, D) for heads in (H, kv_heads, kv_heads, H)]
    q, k, v, weight = (jax.random.normal(next(draw), shape) for shape in shapes)
    params = {
        name: jax.random.normal(next(draw), (LENGTH, RANK)) / 4 for name in ("keys", "values")
    }
    pos = jnp.broadcast_to(jnp.arange(N), (B, N))

    def loss(q, k, v, params):
        tokens = Queries(q, pos, pos * 0), Keys(k, v, pos, pos * 0)
        out = Linformer(RANK, LENGTH)(params, *tokens, Rule(causal=False)).out
        return jnp.sum(out * weight), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, params)
    ours = (out, *grads[:3], grads[3]["keys"], grads[3]["values"])
    for a, b in zip(ours, their_attention(q, k, v, params, weight)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
