"""lucidrains/nystrom-attention, whose rows share a norm: `pytest -m peers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import Keys, Queries, Rule
from attnlab.mechanisms.nystrom import Nystrom

B, N, H, D, LANDMARKS, KERNEL = 2, 24, 2, 8, 6, 3

pytestmark = pytest.mark.peers


def arrays():
    draw = jax.random.split(jax.random.key(0), 5)
    q, k, v, weight = (jax.random.normal(key, (B, N, H, D)) for key in draw[:4])
    return 2 * q, 2 * k, v, jax.random.normal(draw[4], (H, KERNEL)), weight


def theirs(q, k, v, kernel, steps):
    """Output of their layer on torch tensors; it pads in front, hence N divides by LANDMARKS."""
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("nystrom_attention")
    heads = q.shape[2]
    layer = peer.NystromAttention(
        3 * heads * D,
        dim_head=D,
        heads=heads,
        num_landmarks=LANDMARKS,
        pinv_iterations=steps,
        residual_conv_kernel=KERNEL,
    )
    layer.to_qkv = layer.to_out = torch.nn.Identity()
    x = torch.cat([z.flatten(2) for z in (q, k, v)], -1)
    weights = {"res_conv.weight": kernel[:, None, :, None]}
    return torch.func.functional_call(layer, weights, (x,)).reshape(q.shape)


def ours(q, k, v, kernel, steps):
    pos = jnp.broadcast_to(jnp.arange(N), q.shape[:2])
    tokens = Queries(q, pos, pos * 0), Keys(k, v, pos, pos * 0)
    mechanism = Nystrom(LANDMARKS, steps, KERNEL)
    return mechanism({"convolution": kernel}, *tokens, Rule(causal=False)).out


@pytest.mark.parametrize("steps", [1, 6])
def test_outputs_and_gradients_equal_theirs_of_each_row_and_head_alone(steps):
    torch = pytest.importorskip("torch")
    *z, weight = arrays()
    q, k, v, kernel = (torch.tensor(np.asarray(a), requires_grad=True) for a in z)

    def alone(b, h):
        return theirs(*(a[b : b + 1, :, h : h + 1] for a in (q, k, v)), kernel[h : h + 1], steps)

    rows = [torch.cat([alone(b, h) for h in range(H)], 2) for b in range(B)]
    wanted = torch.cat(rows)
    (wanted * torch.tensor(np.asarray(weight))).sum().backward()

    def loss(*z):
        out = ours(*z, steps)
        return jnp.sum(out * weight), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*z)
    for a, b in zip((out, *grads), (wanted, q.grad, k.grad, v.grad, kernel.grad)):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_a_neighbour_in_the_batch_changes_their_output_and_not_ours():
    """They start the inverse from the largest norm of the whole batch: keys of a neighbour that
    all ask one landmark make that norm the number of landmarks."""
    torch = pytest.importorskip("torch")
    q, k, v, kernel, _ = arrays()
    same = [q.at[1].set(q[0]), k.at[1].set(k[0]), v, kernel]
    other = [q.at[1].set(9.0), k.at[1].set(9.0 * (jnp.arange(N) >= 20)[:, None, None]), v, kernel]
    first = [np.asarray(jax.jit(ours, static_argnums=4)(*z, 6)[0]) for z in (same, other)]
    np.testing.assert_array_equal(*first)
    tensors = [[torch.tensor(np.asarray(a)) for a in z] for z in (same, other)]
    first = [theirs(*z, 6)[0].detach().numpy() for z in tensors]
    assert np.max(np.abs(first[0] - first[1])) > 0.01
