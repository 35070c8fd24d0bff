"""Attention of packages in torch. Each function builds it for the sizes asked for and returns a
function of q, k, v [B H N D].

A package whose layer has projections of its own is fed through identities, so that the same part is
timed as of ours.
"""

import importlib
import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from attnlab.bench.sizes import Sizes
from attnlab.errors import UserError


def timed_call(attend: Callable, sizes: Sizes, backward: bool) -> Callable[[], Any]:
    """A call of ``attend`` on random inputs, or of its gradient."""
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


def sdpa(sizes: Sizes) -> Callable:
    attention = importlib.import_module("torch").nn.functional.scaled_dot_product_attention
    return lambda q, k, v: attention(q, k, v, is_causal=sizes.causal)


def window(sizes: Sizes) -> Callable:
    """Blocks of the window, each with the one before it: torch's own fast way to a window.
    Raises `UserError` unless causal and of whole windows."""
    if not sizes.causal or sizes.length % sizes.options["window"]:
        raise UserError(f"only causal, and whole windows: not {sizes.length} tokens")
    torch = importlib.import_module("torch")
    w = sizes.options["window"]
    attention = torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v):
        # Four axes, of which the second is the block: more than four have no fast way in torch.
        rows = [z.flatten(0, 1).unflatten(1, (-1, w)) for z in (q, k, v)]
        before = [torch.nn.functional.pad(z, (0, 0, 0, 0, 1, 0))[:, :-1] for z in rows[1:]]
        i, j = torch.arange(w)[:, None] + w, torch.arange(2 * w)[None]
        seen = (j <= i) & (j > i - w)
        mask = torch.stack([seen & (j >= w)] + [seen] * (rows[0].shape[1] - 1))
        keys = [torch.cat(pair, 2) for pair in zip(before, rows[1:])]
        return attention(rows[0], *keys, attn_mask=mask).reshape(q.shape)

    return attend


def block(sizes: Sizes) -> Callable:
    """Every block as if it were a head. Raises `UserError` for blocks that are not all whole."""
    attention = importlib.import_module("torch").nn.functional.scaled_dot_product_attention
    size = _whole_blocks(sizes, sizes.options.get("offset", 0))

    def attend(q, k, v):
        blocks = (z.flatten(1, 2).unflatten(1, (-1, size)) for z in (q, k, v))
        return attention(*blocks, is_causal=sizes.causal).reshape(q.shape)

    return attend


def fixed(sizes: Sizes) -> Callable:
    """Every block with its own keys and the columns of all blocks, of which a mask leaves those of
    others. Raises `UserError` for blocks that are not all whole."""
    torch = importlib.import_module("torch")
    size, columns = _whole_blocks(sizes), sizes.options["columns"]
    attention = torch.nn.functional.scaled_dot_product_attention
    blocks = sizes.length // size
    own = torch.ones(size, size, dtype=torch.bool)
    others = torch.ones(blocks, blocks, dtype=torch.bool).fill_diagonal_(False)
    if sizes.causal:
        own, others = own.tril(), others.tril()
    others = others.repeat_interleave(columns, 1)[:, None].expand(-1, size, -1)
    mask = torch.cat([own.expand(blocks, -1, -1), others], 2)

    def attend(q, k, v):
        q, k, v = (z.flatten(0, 1).unflatten(1, (-1, size)) for z in (q, k, v))

        def with_columns(z):
            far = z[:, :, -columns:].flatten(1, 2)[:, None]
            return torch.cat([z, far.expand(-1, blocks, -1, -1)], 2)

        out = attention(q, with_columns(k), with_columns(v), attn_mask=mask)
        return out.reshape(sizes.batch, sizes.heads, sizes.length, -1)

    return attend


def _whole_blocks(sizes: Sizes, offset: int = 0) -> int:
    size = sizes.options["block"]
    if offset or sizes.length % size:
        raise UserError(f"only whole blocks of {size}, not {sizes.length} tokens, offset {offset}")
    return size


def local(sizes: Sizes) -> Callable:
    kind = importlib.import_module("local_attention").LocalAttention
    options = {"causal": sizes.causal, "autopad": True, "use_rotary_pos_emb": False}
    return kind(window_size=sizes.options["window"], exact_windowsize=True, **options)


def reformer(sizes: Sizes) -> Callable:
    kind = importlib.import_module("reformer_pytorch").LSHAttention
    rounds, length = sizes.options["rounds"], sizes.options["length"]
    layer = kind(bucket_size=length, n_hashes=rounds, causal=sizes.causal)
    return lambda q, k, v: layer(q.flatten(0, 1), v.flatten(0, 1))[0]


def hugging_face_reformer(sizes: Sizes) -> Callable:
    """Its layer reads q and v off its input side by side, in place of its projections."""
    torch = importlib.import_module("torch")
    package = importlib.import_module("transformers.models.reformer")
    width = sizes.heads * sizes.head_dim
    config = package.ReformerConfig(
        num_attention_heads=sizes.heads,
        attention_head_size=sizes.head_dim,
        hidden_size=2 * width,
        lsh_attn_chunk_length=sizes.options["length"],
        num_hashes=sizes.options["rounds"],
        num_buckets=sizes.options["buckets"],
        is_decoder=sizes.causal,
        lsh_attention_probs_dropout_prob=0.0,
    )
    layer = package.modeling_reformer.LSHSelfAttention(config)
    for i, name in enumerate(("query_key", "value")):
        delattr(layer, name)
        setattr(layer, name, lambda x, i=i: x[..., i * width : (i + 1) * width])

    def attend(q, k, v):
        x = torch.cat([z.transpose(1, 2).flatten(2) for z in (q, v)], -1)
        return layer(x).hidden_states.unflatten(2, (sizes.heads, -1)).transpose(1, 2)

    return attend


def _through_identities(layer: Any) -> Callable:
    """A layer with projections, fed with what they would have made."""
    torch = importlib.import_module("torch")
    layer.to_qkv = layer.to_out = torch.nn.Identity()
    return lambda q, k, v: layer(torch.cat([z.transpose(1, 2).flatten(2) for z in (q, k, v)], -1))


def linformer(sizes: Sizes) -> Callable:
    torch = importlib.import_module("torch")
    kind = importlib.import_module("linformer").LinformerSelfAttention
    width = sizes.heads * sizes.head_dim
    layer = kind(width, sizes.length, k=sizes.options["rank"], heads=sizes.heads)
    layer.to_q = layer.to_k = layer.to_v = layer.to_out = torch.nn.Identity()
    return lambda q, k, v: layer(q.transpose(1, 2).flatten(2))


def nystrom(sizes: Sizes) -> Callable:
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


def performer(sizes: Sizes) -> Callable:
    kind = importlib.import_module("performer_pytorch").FastAttention
    return kind(sizes.head_dim, nb_features=sizes.options["features"], causal=sizes.causal)


def h_transformer(sizes: Sizes) -> Callable:
    package = importlib.import_module("h_transformer_1d.h_transformer_1d")
    kind = package.CausalHAttention1D if sizes.causal else package.HAttention1D
    options = {"block_size": sizes.options["block"], "max_seq_len": sizes.length}
    width = 3 * sizes.heads * sizes.head_dim
    return _through_identities(kind(width, heads=sizes.heads, dim_head=sizes.head_dim, **options))


def routing(sizes: Sizes) -> Callable:
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


def linear(sizes: Sizes) -> Callable:
    package = importlib.import_module("linear_attention_transformer.linear_attention_transformer")
    attend = package.causal_linear_attn if sizes.causal else package.linear_attn
    return lambda q, k, v: attend(q, k, v)


def fla_linear(sizes: Sizes) -> Callable:
    """Its fallback in plain torch; the kernels of the package are for accelerators. Raises
    `UserError` unless causal."""
    if not sizes.causal:
        raise UserError("flash-linear-attention is causal only")
    attention = importlib.import_module("fla.ops.linear_attn.naive").naive_chunk_linear_attn
    elu = importlib.import_module("torch").nn.functional.elu

    def attend(q, k, v):
        q, k, v = (z.transpose(1, 2) for z in (elu(q) + 1, elu(k) + 1, v))
        return attention(q, k, v, normalize=True).transpose(1, 2)

    return attend


def fla_delta(sizes: Sizes) -> Callable:
    """As `fla_linear`. Gates are read off the input, which is not handed over: they are what ours
    are for parameters of 0, β = rate / 2."""
    if not sizes.causal:
        raise UserError("flash-linear-attention is causal only")
    attention = importlib.import_module("fla.ops.delta_rule.naive").delta_rule_chunkwise
    unit = importlib.import_module("torch").nn.functional.normalize

    def attend(q, k, v):
        beta = v.new_full(v.shape[:-1], sizes.options["rate"] / 2)
        # It divides queries by √D.
        return attention(unit(q, dim=-1) * sizes.head_dim**0.5, unit(k, dim=-1), v, beta)[0]

    return attend


def fla_gated_delta(sizes: Sizes) -> Callable:
    """As `fla_delta`, with a = 1 / 2."""
    if not sizes.causal:
        raise UserError("flash-linear-attention is causal only")
    package = importlib.import_module("fla.ops.gated_delta_rule.naive")
    unit = importlib.import_module("torch").nn.functional.normalize

    def attend(q, k, v):
        q, k, v = (z.transpose(1, 2) for z in (unit(q, dim=-1), unit(k, dim=-1), v))
        beta = v.new_full(v.shape[:-1], sizes.options["rate"] / 2)
        decay = v.new_full(v.shape[:-1], -math.log(2))
        out, _ = package.naive_chunk_gated_delta_rule(q, k, v, decay, beta, scale=1.0)
        return out.transpose(1, 2)

    return attend


def fast_transformers(sizes: Sizes) -> Callable:
    """Its layer is told of its masks, which it would hold as N² numbers, only that they are
    whole."""
    torch = importlib.import_module("torch")
    package = importlib.import_module("fast_transformers.attention")
    kind = package.CausalLinearAttention if sizes.causal else package.LinearAttention
    layer = kind(sizes.head_dim)
    mask = SimpleNamespace(lower_triangular=sizes.causal, all_ones=not sizes.causal)
    lengths = SimpleNamespace(float_matrix=torch.ones(sizes.batch, sizes.length))

    def attend(q, k, v):
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return layer(q, k, v, mask, lengths, lengths).transpose(1, 2)

    return attend
