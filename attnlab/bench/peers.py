"""What others have for the same: packages that are measured beside a mechanism if installed.

What attends is in `torch_peers` and `jax_peers`, fed with q, k, v of the same shapes as ours.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from attnlab.bench import jax_peers, torch_peers, twin
from attnlab.bench.sizes import Sizes
from attnlab.bench.subjects import Subject
from attnlab.config import architecture_of


class Peer(NamedTuple):
    """``packages`` it imports, the ``mechanism`` it is measured beside, and ``make(sizes)``, which
    returns a function of torch tensors or jax arrays q, k, v [B H N D]."""

    packages: str
    mechanism: str
    make: Callable[[Sizes], Callable]
    torch: bool = True


PEERS = {
    "torch sdpa": Peer("torch", "softmax", torch_peers.sdpa),
    "jax.nn": Peer("jax", "softmax", jax_peers.attention, torch=False),
    "tokamax": Peer("tokamax", "softmax", jax_peers.tokamax, torch=False),
    "tokamax, chunked": Peer("tokamax", "softmax", jax_peers.tokamax_chunked, torch=False),
    "torch sdpa, windows": Peer("torch", "window", torch_peers.window),
    "local-attention": Peer("local_attention", "window", torch_peers.local),
    "torch sdpa, blocks": Peer("torch", "block", torch_peers.block),
    "torch sdpa, blocks and columns": Peer("torch", "fixed", torch_peers.fixed),
    "reformer-pytorch": Peer("reformer_pytorch", "lsh", torch_peers.reformer),
    "transformers, Reformer": Peer("transformers torch", "lsh", torch_peers.hugging_face_reformer),
    "lucidrains/linformer": Peer("linformer", "linformer", torch_peers.linformer),
    "nystrom-attention": Peer("nystrom_attention", "nystrom", torch_peers.nystrom),
    "performer-pytorch": Peer("performer_pytorch", "favor", torch_peers.performer),
    "h-transformer-1d": Peer("h_transformer_1d", "hierarchical", torch_peers.h_transformer),
    "routing-transformer": Peer("routing_transformer", "routing", torch_peers.routing),
    "linear-attention-transformer": Peer(
        "linear_attention_transformer", "linear", torch_peers.linear
    ),
    "pytorch-fast-transformers": Peer("fast_transformers", "linear", torch_peers.fast_transformers),
    "flash-linear-attention, naive": Peer("fla triton", "linear", torch_peers.fla_linear),
    "flash-linear-attention, naive delta": Peer("fla triton", "delta", torch_peers.fla_delta),
    "flash-linear-attention, naive gated delta": Peer(
        "fla triton", "gated_delta", torch_peers.fla_gated_delta
    ),
    "attnax": Peer("attnax", "linear", jax_peers.attnax, torch=False),
}

MODELS = ("torch model", "torch model, compiled")


def known(mechanism: str, mode: str) -> dict[str, str]:
    """The peers of a mechanism, or of the model around it with ``mode`` train, and the packages
    that each needs."""
    if mode == "train":
        return dict.fromkeys(MODELS, "torch") if mechanism == "softmax" else {}
    return {name: peer.packages for name, peer in PEERS.items() if peer.mechanism == mechanism}


def installed(mechanism: str, mode: str) -> list[str]:
    """Those whose packages are here."""
    found = importlib.util.find_spec
    return [n for n, needs in known(mechanism, mode).items() if all(map(found, needs.split()))]


def build_peer(name: str, config: ConfigDict, mode: str, length: int) -> Subject:
    """The same call by another package. Raises `UserError` for what it has not."""
    if mode == "train":
        return twin.build(config, length, compiled=name == MODELS[1])
    peer, a = PEERS[name], architecture_of(config)
    options = {k: v for k, v in config.attention.items() if k != "name"}
    sizes = Sizes(config.task.batch, length, a.heads, a.head_dim, a.causal, options)
    timed_call = (torch_peers if peer.torch else jax_peers).timed_call
    begun = time.perf_counter()
    call = timed_call(peer.make(sizes), sizes, mode == "fwdbwd")
    call()
    compiling = time.perf_counter() - begun
    return Subject(call, sizes.batch * length, 0.0, 0, compiling)
