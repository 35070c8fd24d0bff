"""lucidrains/local-attention, whose windows are counted in other ways: `pytest -m peers`."""

import numpy as np
import pytest

from attnlab.core import Keys, Queries, Rule
from attnlab.mechanisms.block import Block
from attnlab.mechanisms.window import Window

pytestmark = pytest.mark.peers
B, N, H, D, SIZE = 2, 48, 4, 16, 8


def arrays():
    normal = np.random.default_rng(0).standard_normal
    return [normal((B, N, H, D), np.float32) for _ in range(3)]


def theirs(q, k, v, **options):
    """Output of the peer without its rotary embedding."""
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("local_attention")
    module = peer.LocalAttention(
        window_size=SIZE, causal=True, use_rotary_pos_emb=False, dim=D, **options
    )
    heads_first = (torch.tensor(z).transpose(1, 2) for z in (q, k, v))
    return module(*heads_first).transpose(1, 2).numpy()


def ours(mechanism, q, k, v):
    pos = np.tile(np.arange(N, dtype=np.int32), (B, 1))
    return mechanism({}, Queries(q, pos, pos * 0), Keys(k, v, pos, pos * 0), Rule()).out


@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        (Block(SIZE), {"look_backward": 0}),
        (Window(SIZE + 1), {"look_backward": 1, "exact_windowsize": True}),
        (Window(2 * SIZE + 1), {"look_backward": 2, "exact_windowsize": True}),
    ],
    ids=str,
)
def test_outputs_equal_the_peer_s(mechanism, options):
    """Its exact window of w counts the keys behind the query, ours the query too: w + 1."""
    z = arrays()
    np.testing.assert_allclose(ours(mechanism, *z), theirs(*z, **options), atol=2e-5)


def test_its_default_window_depends_on_the_place_in_the_block():
    """Between w + 1 and 2 w keys: the last of a block sees as many as a window of 2 w, every other
    query fewer than that and more than a window of w."""
    z = arrays()
    default = theirs(*z, look_backward=1)
    last = np.arange(N) % SIZE == SIZE - 1
    equal = {
        width: np.all(np.abs(ours(Window(width), *z) - default) < 2e-5, (0, 2, 3))
        for width in (SIZE, SIZE + 1, 2 * SIZE)
    }
    later = np.arange(N) >= 2 * SIZE
    np.testing.assert_array_equal(equal[2 * SIZE][later], last[later])
    np.testing.assert_array_equal(equal[SIZE + 1][later], (np.arange(N) % SIZE == 0)[later])
    assert not np.any(equal[SIZE][later])
