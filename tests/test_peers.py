"""PyTorch's attention, outputs and gradients: `pip install -e '.[peers]' && pytest -m peers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import Keys, Queries, Rule, mechanisms

B, N, H, G, D = 2, 45, 4, 2, 16

pytestmark = pytest.mark.peers


def torch_attention(arrays, weight, visible):
    """Output and gradients of scaled_dot_product_attention under a bool mask [N N]."""
    import torch

    q, k, v = (torch.tensor(np.asarray(z), requires_grad=True) for z in arrays)
    out = torch.nn.functional.scaled_dot_product_attention(
        *(z.transpose(1, 2) for z in (q, k, v)), torch.tensor(visible), enable_gqa=True
    ).transpose(1, 2)
    (out * torch.tensor(np.asarray(weight))).sum().backward()
    return [z.detach().numpy() for z in (out, q.grad, k.grad, v.grad)]


def our_attention(mechanism, arrays, weight, causal):
    pos = jnp.broadcast_to(jnp.arange(N), (B, N))
    seg = jnp.zeros_like(pos)

    def loss(q, k, v):
        out = mechanism({}, Queries(q, pos, seg), Keys(k, v, pos, seg), Rule(causal=causal)).out
        return jnp.sum(out * weight), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return [out, *grads]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("name", "fields"), [("softmax", {}), ("window", {"window": 7})])
def test_outputs_and_gradients_equal_those_of_pytorch(name, fields, causal):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, N, H, D), (B, N, G, D), (B, N, G, D), (B, N, H, D)]
    *arrays, weight = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes))
    i, j = np.indices((N, N))
    visible = (j <= i) | (not causal)
    visible &= np.abs(i - j) < fields.get("window", N)
    theirs = torch_attention(arrays, weight, visible)
    ours = our_attention(mechanisms.get(name)(**fields), arrays, weight, causal)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
