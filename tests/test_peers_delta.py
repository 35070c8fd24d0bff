"""flash-linear-attention's delta rules in plain torch, with gates that vary from token to token:
`pip install -e '.[peers]' && pytest -m peers`."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.engines import delta

B, N, H, D, E = 2, 192, 3, 16, 24

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # of the package
]


def theirs(gated, tokens, weight):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = pytest.importorskip("fla.ops.delta_rule.naive")
        gating = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    q, k, v, beta, decay = tokens = [
        torch.tensor(np.asarray(z), requires_grad=True) for z in tokens
    ]
    q, k = (torch.nn.functional.normalize(z, dim=-1) for z in (q, k))
    if gated:
        out, state = gating.naive_chunk_gated_delta_rule(
            q, k, v, decay, beta, scale=1.0, output_final_state=True
        )
    else:
        turned = (z.transpose(1, 2) for z in (q * D**0.5, k, v, beta))
        out, state = plain.delta_rule_chunkwise(*turned)
        out = out.transpose(1, 2)
    (out * torch.tensor(np.asarray(weight))).sum().backward()
    grads = [z.grad for z in tokens if z.grad is not None]
    return [z.detach().numpy() for z in (out, state, *grads)]


@pytest.mark.parametrize("gated", [False, True])
def test_outputs_states_and_gradients_are_theirs(gated):
    a, b, c, d, e, f = jax.random.split(jax.random.key(0), 6)
    q, k = jax.random.normal(a, (2, B, N, H, D))
    v, weight = jax.random.normal(b, (B, N, H, E)), jax.random.normal(c, (B, N, H, E))
    beta = 2 * jax.random.uniform(d, (B, N, H))
    decay = -jax.random.exponential(e, (B, N, H)) * jax.random.uniform(f, (B, N, H)) ** 3
    tokens = q, k, v, beta, decay if gated else 0 * decay

    def loss(*tokens):
        out, state = delta.attend(*tokens, jnp.zeros((B, N), jnp.int32))
        return jnp.sum(out * weight), (out, state.memory)

    grads, results = jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True)(*tokens)
    wanted = theirs(gated, tokens, weight)
    ours = [*results, *grads]
    assert len(wanted) == (7 if gated else 6)
    for found, known in zip(ours, wanted):
        np.testing.assert_allclose(found, known, rtol=1e-3, atol=1e-4)
