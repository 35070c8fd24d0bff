"""Position modules of lucidrains/x-transformers: `pip install -e '.[peers]' && pytest -m peers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.positions.alibi import Alibi
from attnlab.positions.cope import Cope
from attnlab.positions.interpolated import Interpolated
from attnlab.positions.ntk import Ntk
from attnlab.positions.rope import Rope
from attnlab.positions.t5 import T5

B, N, H, D = 2, 40, 4, 16

pytestmark = pytest.mark.peers


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def peer(torch):
    return pytest.importorskip("x_transformers.x_transformers")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (16, 256)])
def test_t5_biases_are_theirs(torch, peer, buckets, far, causal):
    """They count the buckets of both sides together, and multiply by a scale of their own."""
    length, draw = 300, np.random.default_rng(0)
    table = draw.standard_normal((H, 2 * buckets)).astype(np.float32)
    used = buckets if causal else 2 * buckets
    layer = peer.RelativePositionBias(1.0, causal, used, far, H)
    layer.relative_attention_bias.weight.data = torch.tensor(table.T[:used].copy())
    pos = np.arange(length, dtype=np.int32)[None]
    q = np.zeros((1, H, length, D), np.float32)
    out = T5(buckets, far).bias({"table": table}, q, pos, pos)
    seen = np.tri(length, dtype=bool) | (not causal)
    wanted = layer(length, length).detach().numpy()
    np.testing.assert_array_equal(np.where(seen, out[0], 0), np.where(seen, wanted, 0))


@pytest.mark.parametrize("heads", [4, 6, 12, 20])
def test_alibi_biases_are_theirs(peer, heads):
    pos = np.arange(N, dtype=np.int32)[None]
    out = Alibi().bias({}, np.zeros((1, heads, N, D), np.float32), pos, pos)
    wanted = peer.AlibiPositionalBias(heads)(N, N).numpy()
    np.testing.assert_allclose(out[0], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("ours", "options"),
    [
        (Rope(), {}),
        (Rope(500.0), {"base": 500.0}),
        (Interpolated(4.0), {"interpolation_factor": 4.0}),
        (Ntk(4.0), {"base_rescale_factor": 4.0}),
    ],
    ids=str,
)
def test_rotations_are_theirs_with_halves_interleaved(torch, peer, ours, options):
    z = np.random.default_rng(0).standard_normal((B, N, H, D)).astype(np.float32)
    pos = np.tile(np.arange(N, dtype=np.int32), (B, 1))
    phases, _ = peer.RotaryEmbedding(D, **options)(torch.arange(N))
    interleaved = np.arange(D).reshape(2, -1).T.ravel()
    given = torch.tensor(z[..., interleaved]).transpose(1, 2)
    wanted = peer.apply_rotary_pos_emb(given, phases).transpose(1, 2).numpy()
    out = np.asarray(ours.rotate({}, z, pos, "query"))
    np.testing.assert_allclose(out[..., interleaved], wanted, atol=1e-5)


@pytest.mark.parametrize("positions", [7, 64])
def test_cope_and_its_gradients_are_theirs_of_causal_rows(torch, peer, positions):
    """Theirs counts from the end of the row, so only where later keys are masked; it does not
    scale the queries, so ours come scaled."""
    draw = iter(jax.random.split(jax.random.key(0), 4))
    z, weight = (jax.random.normal(next(draw), (B, H, N, N)) for _ in range(2))
    q, e = (jax.random.normal(next(draw), shape) for shape in ((B, H, N, D), (positions, D)))
    seen = np.tri(N, dtype=bool)
    pos = jnp.broadcast_to(jnp.arange(N), (B, N))

    def loss(z, q, e):
        bias = Cope(positions).row_bias({"e": e}, z, jnp.asarray(seen)[None, None], q, pos, pos)
        bias = jnp.where(seen, bias, 0)
        return jnp.sum(bias * weight), bias

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(z, q, e)

    layer = peer.CoPE(D, H, positions)
    layer.pos_emb.data = torch.tensor(np.asarray(e))
    z, q = (torch.tensor(np.asarray(a), requires_grad=True) for a in (z, q))
    masked = z.masked_fill(torch.tensor(~seen), -torch.finfo(z.dtype).max)
    wanted = layer(q * D**-0.5, masked) * torch.tensor(seen)
    (wanted * torch.tensor(np.asarray(weight))).sum().backward()
    for a, b in zip((out, *grads), (wanted, z.grad, q.grad, layer.pos_emb.grad)):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-3, atol=1e-4)
