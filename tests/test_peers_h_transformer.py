"""lucidrains/h-transformer-1d, whose weights do not sum to 1: `pytest -m peers`."""

import numpy as np
import pytest

from attnlab.core import Keys, Queries, Rule
from attnlab.mechanisms.hierarchical import Hierarchical

B, N, H, D, BLOCK = 2, 128, 2, 8, 8

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("causal", [True, False])
def test_values_of_1_give_1_here_and_more_there(causal):
    """It sums the values of a coarse key and counts its weight once, and takes a maximum of its own
    from every level; so it is no oracle."""
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("h_transformer_1d.h_transformer_1d")
    draw = np.random.default_rng(0)
    q, k = (draw.standard_normal((B, N, H, D)).astype(np.float32) for _ in range(2))
    v = np.ones_like(k)
    pos = np.tile(np.arange(N, dtype=np.int32), (B, 1))
    tokens = Queries(q, pos, pos * 0), Keys(k, v, pos, pos * 0)
    out = Hierarchical(BLOCK)({}, *tokens, Rule(causal=causal)).out
    np.testing.assert_allclose(out, v, rtol=1e-5)

    kind = peer.CausalHAttention1D if causal else peer.HAttention1D
    layer = kind(3 * H * D, heads=H, dim_head=D, block_size=BLOCK, max_seq_len=N)
    layer.to_qkv = layer.to_out = torch.nn.Identity()
    theirs = layer(torch.tensor(np.concatenate([z.reshape(B, N, -1) for z in (q, k, v)], -1)))
    theirs = theirs.numpy()
    assert theirs.min() > 0.99
    assert theirs.max() > 1.9
    assert theirs.mean() > 1.2
