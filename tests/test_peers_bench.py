"""What `attnlab bench --peers` measures computes what ours does: `pytest -m peers`."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.bench import peers
from attnlab.bench.sizes import Sizes
from attnlab.core import Dims, Keys, Queries, Rule, mechanisms
from attnlab.errors import UserError

B, N, H, D = 2, 128, 3, 16
OPTIONS = {
    "window": {"window": 16},
    "block": {"block": 32},
    "fixed": {"block": 32, "columns": 4},
    "delta": {"rate": 2.0},
    "gated_delta": {"rate": 1.0},
    "lsh": {"rounds": 2, "buckets": 8, "length": 16},
}
FLA = [f"flash-linear-attention, naive{rule}" for rule in ("", " delta", " gated delta")]
CAUSAL = {"torch sdpa, windows", *FLA}
EXACT = [
    *("torch sdpa", "jax.nn", "tokamax", "tokamax, chunked"),
    *("torch sdpa, windows", "torch sdpa, blocks", "torch sdpa, blocks and columns"),
    *("pytorch-fast-transformers", *FLA, "attnax"),
]

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # of the packages
]


@pytest.fixture(autouse=True)
def _no_flags(monkeypatch):
    """tokamax reads the command line for flags of its own."""
    monkeypatch.setattr("sys.argv", ["bench"])


def build(name, causal=True, length=N):
    peer = peers.PEERS[name]
    if name not in peers.installed(peer.mechanism, "fwd"):
        pytest.skip(f"{name} is not installed")
    options = OPTIONS.get(peer.mechanism, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peer.make(Sizes(B, length, H, D, causal, options))


def draw():
    """q, k, v and a weight, [B H N D]."""
    return jax.random.normal(jax.random.key(0), (4, B, H, N, D))


def theirs(name, causal):
    *inputs, weight = draw()
    attend = build(name, causal)
    if not peers.PEERS[name].torch:
        out, pull = jax.vjp(attend, *inputs)
        return [out, *pull(weight)]
    import torch

    inputs = [torch.tensor(np.asarray(z), requires_grad=True) for z in inputs]
    out = attend(*inputs)
    out.backward(torch.tensor(np.asarray(weight)).reshape(out.shape))
    grads = [z.grad for z in inputs if z.grad is not None]  # of one vector for q and k: q's alone
    return [z.detach().numpy() for z in (out, *grads)]


def ours(name, causal):
    *inputs, weight = draw()
    kind = peers.PEERS[name].mechanism
    mechanism = mechanisms.get(kind)(**OPTIONS.get(kind, {}))
    pos = jnp.broadcast_to(jnp.arange(N), (B, N))
    # What is read off the input is the same for every token.
    x = jnp.zeros((B, N, 1))
    params = jax.tree.map(jnp.zeros_like, mechanism.init(jax.random.key(0), Dims(1, H, H, D, D)))

    def attend(*inputs):
        q, k, v = (z.swapaxes(1, 2) for z in inputs)
        tokens = Queries(q, pos, pos * 0), Keys(k, v, pos, pos * 0)
        return mechanism(params, *tokens, Rule(causal=causal), x=x).out.swapaxes(1, 2)

    out, pull = jax.vjp(attend, *inputs)
    return [out, *pull(weight)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", EXACT)
def test_outputs_and_gradients_are_ours(name, causal):
    if not causal and name in CAUSAL:
        with pytest.raises(UserError, match="causal"):
            build(name, causal)
        return
    for found, wanted in zip(theirs(name, causal), ours(name, causal)):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["reformer-pytorch", "transformers, Reformer"])
def test_a_hashing_peer_runs_with_its_gradient(name):
    """It draws hashes of its own."""
    out, *grads = theirs(name, True)
    assert out.size == B * H * N * D
    assert np.isfinite(out).all()
    assert len(grads) == 2
    assert all(np.abs(z).max() > 0 for z in grads)


@pytest.mark.parametrize("name", ["torch sdpa, windows", "torch sdpa, blocks"])
def test_a_length_that_a_peer_has_not_is_refused(name):
    with pytest.raises(UserError, match=r"only .*whole"):
        build(name, length=N + 1)
