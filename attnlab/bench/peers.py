"""What others have for the same: packages that are measured beside a mechanism if installed.

Each entry builds a module of its package for the sizes asked for, fed with q, k, v of the same
shapes as ours where the package has a function of them. A package whose layer has projections of
its own is fed through identities, so that the same part is timed.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from attnlab.bench import twin
from attnlab.bench.subjects import Subject
from attnlab.config import architecture_of


class Sizes(NamedTuple):
    """Of one call; ``causal`` and ``options`` are those of the mechanism it stands beside."""

    batch: int
    length: int
    heads: int
    head_dim: int
    causal: bool
    options: dict[str, Any]


class Peer(NamedTuple):
    """``package`` to install, the ``mechanism`` it is measured beside, and ``make(sizes)``, which
    returns a function of torch tensors or jax arrays q, k, v [B H N D]."""

    package: str
    mechanism: str
    make: Callable[[Sizes], Callable]
    torch: bool = True


def _sdpa(sizes: Sizes) -> Callable:
    attention = importlib.import_module("torch").nn.functional.scaled_dot_product_attention
    return lambda q, k, v: attention(q, k, v, is_causal=sizes.causal)


def _sdpa_blocks(sizes: Sizes) -> Callable:
    """Blocks of the window, each with the one before it: torch's own fast way to a window."""
    torch = importlib.import_module("torch")
    w = sizes.options["window"]

    def attend(q, k, v):
        def cut(z):
            return z.unflatten(2, (-1, w))

        def with_before(z):
            z = cut(z)
            before = torch.nn.functional.pad(z, (0, 0, 0, 0, 1, 0))[:, :, :-1]
            return torch.cat([before, z], 3)

        i, j = torch.arange(w)[:, None] + w, torch.arange(2 * w)[None]
        seen = (j <= i) & (j > i - w)
        first = seen & (j >= w)
        blocks = q.shape[2] // w
        mask = torch.stack([first] + [seen] * (blocks - 1))
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(cut(q), with_before(k), with_before(v), attn_mask=mask).flatten(2, 3)

    return attend


def _local(sizes: Sizes) -> Callable:
    kind = importlib.import_module("local_attention").LocalAttention
    options = {"causal": sizes.causal, "autopad": True, "use_rotary_pos_emb": False}
    return kind(window_size=sizes.options["window"], exact_windowsize=True, **options)


def _reformer(sizes: Sizes) -> Callable:
    kind = importlib.import_module("reformer_pytorch").LSHAttention
    rounds, length = sizes.options["rounds"], sizes.options["length"]
    layer = kind(bucket_size=length, n_hashes=rounds, causal=sizes.causal)
    return lambda q, k, v: layer(q.flatten(0, 1), v.flatten(0, 1))[0]


def _through_identities(layer: Any) -> Callable:
    """A layer with projections, fed with what they would have made."""
    torch = importlib.import_module("torch")
    layer.to_qkv = layer.to_out = torch.nn.Identity()
    return lambda q, k, v: layer(torch.cat([z.transpose(1, 2).flatten(2) for z in (q, k, v)], -1))


def _linformer(sizes: Sizes) -> Callable:
    torch = importlib.import_module("torch")
    kind = importlib.import_module("linformer").LinformerSelfAttention
    width = sizes.heads * sizes.head_dim
    layer = kind(width, sizes.length, k=sizes.options["rank"], heads=sizes.heads)
    layer.to_q = layer.to_k = layer.to_v = layer.to_out = torch.nn.Identity()
    return lambda q, k, v: layer(q.transpose(1, 2).flatten(2))


def _nystrom(sizes: Sizes) -> Callable:
    kind = importlib.import_module("nystrom_attention").NystromAttention
    options = sizes.options
    return _through_identities(
        kind(
            3 * sizes.heads * sizes.head_dim,
            dim_head=sizes.head_dim,
            heads=sizes.heads,
            num_landmarks=options["landmarks"],
            residual_conv_kernel=33,
        )
    )


def _performer(sizes: Sizes) -> Callable:
    kind = importlib.import_module("performer_pytorch").FastAttention
    return kind(sizes.head_dim, nb_features=sizes.options["features"], causal=sizes.causal)


def _h_transformer(sizes: Sizes) -> Callable:
    package = importlib.import_module("h_transformer_1d.h_transformer_1d")
    kind = package.CausalHAttention1D if sizes.causal else package.HAttention1D
    options = {"block_size": sizes.options["block"], "max_seq_len": sizes.length}
    width = 3 * sizes.heads * sizes.head_dim
    return _through_identities(kind(width, heads=sizes.heads, dim_head=sizes.head_dim, **options))


def _routing(sizes: Sizes) -> Callable:
    kind = importlib.import_module("routing_transformer.routing_transformer").KmeansAttention
    clusters = sizes.options["clusters"]
    layer = kind(
        clusters,
        sizes.length // clusters,
        sizes.heads,
        sizes.head_dim,
        causal=sizes.causal,
        shared_qk=True,
    )
    return lambda q, k, v: layer(q, q, v)[0]


def _linear(sizes: Sizes) -> Callable:
    package = importlib.import_module("linear_attention_transformer.linear_attention_transformer")
    attend = package.causal_linear_attn if sizes.causal else package.linear_attn
    return lambda q, k, v: attend(q, k, v)


def _jax_attention(sizes: Sizes) -> Callable:
    attention = importlib.import_module("jax").nn.dot_product_attention

    def attend(q, k, v):
        turned = (z.swapaxes(1, 2) for z in (q, k, v))
        return attention(*turned, is_causal=sizes.causal).swapaxes(1, 2)

    return attend


PEERS = {
    "torch sdpa": Peer("torch", "softmax", _sdpa),
    "torch sdpa, blocks": Peer("torch", "window", _sdpa_blocks),
    "local-attention": Peer("local_attention", "window", _local),
    "reformer-pytorch": Peer("reformer_pytorch", "lsh", _reformer),
    "linformer": Peer("linformer", "linformer", _linformer),
    "nystrom-attention": Peer("nystrom_attention", "nystrom", _nystrom),
    "performer-pytorch": Peer("performer_pytorch", "favor", _performer),
    "h-transformer-1d": Peer("h_transformer_1d", "hierarchical", _h_transformer),
    "routing-transformer": Peer("routing_transformer", "routing", _routing),
    "linear-attention-transformer": Peer("linear_attention_transformer", "linear", _linear),
    "jax.nn": Peer("jax", "softmax", _jax_attention, torch=False),
}


MODELS = ("torch model", "torch model, compiled")


def installed(mechanism: str, mode: str) -> list[str]:
    """The peers of a mechanism, or of the model around it with ``mode`` train, whose packages are
    here."""
    found = importlib.util.find_spec
    if mode == "train":
        return list(MODELS) if mechanism == "softmax" and found("torch") else []
    return [n for n, p in PEERS.items() if p.mechanism == mechanism and found(p.package)]


def build_peer(name: str, config: ConfigDict, mode: str, length: int) -> Subject:
    """The same call by another package. Raises `UserError` for what it has not."""
    if mode == "train":
        return twin.build(config, length, compiled=name == MODELS[1])
    peer, a = PEERS[name], architecture_of(config)
    options = {k: v for k, v in config.attention.items() if k != "name"}
    sizes = Sizes(config.task.batch, length, a.heads, a.head_dim, a.causal, options)
    make = _of_torch if peer.torch else _of_jax
    begun = time.perf_counter()
    call = make(peer.make(sizes), sizes, mode == "fwdbwd")
    call()
    compiling = time.perf_counter() - begun
    return Subject(call, sizes.batch * length, 0.0, 0, compiling)


def _of_torch(attend: Callable, sizes: Sizes, backward: bool) -> Callable[[], Any]:
    import os

    torch = importlib.import_module("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = sizes.batch, sizes.heads, sizes.length, sizes.head_dim
    q, k, v, cotangent = (torch.randn(shape) for _ in range(4))

    def forward():
        with torch.no_grad():
            return attend(q, k, v)

    def gradient():
        inputs = [z.detach().requires_grad_() for z in (q, k, v)]
        out = attend(*inputs)
        out.backward(cotangent.reshape(out.shape))

    return gradient if backward else forward


def _of_jax(attend: Callable, sizes: Sizes, backward: bool) -> Callable[[], Any]:
    import jax

    shape = sizes.batch, sizes.heads, sizes.length, sizes.head_dim
    *inputs, cotangent = jax.random.normal(jax.random.key(0), (4, *shape))

    def gradient(inputs, cotangent):
        return jax.vjp(attend, *inputs)[1](cotangent)

    if backward:
        program = jax.jit(gradient)
        return lambda: jax.block_until_ready(program(inputs, cotangent))
    program = jax.jit(attend)
    return lambda: jax.block_until_ready(program(*inputs))
