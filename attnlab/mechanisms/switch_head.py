"""SwitchHead: every head chooses among experts for its values and for its outputs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule, count_pairs
from attnlab.engines import blockwise, dense, segments
from attnlab.errors import UserError
from attnlab.registry import register

HIGHEST = jax.lax.Precision.HIGHEST


@register
@dataclass(frozen=True)
class SwitchHead(Mechanism):
    """Exact attention with experts per head for values and outputs: few heads, much capacity.

        v'_j = Σ_e∈top σ(v_j·s_e) v_j V_e,  A = softmax(q kᵀ / √D) v',
        out_i = Σ_e∈top σ(x_i·r_e) A_i O_e
    with ``experts`` matrices V_e [E E] of each kv head and O_e [E E] of each head, of which every
    token uses the ``top`` with the largest scores. Gates are sigmoids: experts do not compete, and
    no loss balances them. The experts of a value are gated by the value itself and those of an
    output by the block's input x: a key that comes out of a cache has no x any more. (Published:
    both gates and both projections read x; here they stand behind the block's own.) Scores start
    as unit vectors, matrices as N(0, 1 / E).
    Shapes: queries [B N H D], keys [B M G D], values [B M G E], x [B N width] -> [B N H E].
    Cost: that of softmax attention and O((N + M) experts E²) per head; decoding keeps all keys and
    values and computes the experts of all values anew. Raises `UserError` unless
    1 <= top <= experts.
    Source: Csordás et al., arXiv 2312.07987.
    """

    experts: int = 4
    top: int = 2

    cost = Cost(time=2, memory=1, state=1)

    def __post_init__(self):
        if not 1 <= self.top <= self.experts:
            raise UserError(
                f"switch_head: top={self.top}, experts={self.experts}; use 1 <= top <= experts"
            )

    def init(self, key, dims):
        E, X, H, G = dims.value_dim, self.experts, dims.heads, dims.kv_heads
        a, b, c, d = (jax.random.normal(k, s) for k, s in zip(
            jax.random.split(key, 4), ((G, E, X), (G, X, E, E), (dims.width, H, X), (H, X, E, E))
        ))  # fmt: skip
        return {
            "value_scores": a / jnp.linalg.norm(a, axis=1, keepdims=True),
            "values": E**-0.5 * b,
            "output_scores": c / jnp.linalg.norm(c, axis=0, keepdims=True),
            "outputs": E**-0.5 * d,
        }

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        keys, inner = self._valued(params, keys), segments.part_of(rule)
        out, lse = blockwise.attend(queries, keys, inner)
        return Result(self._output(params, out, rule, x), state, {"lse": lse})

    def reference(self, params, queries: Queries, keys, rule: Rule, state=(), *, x=None, key=None):
        keys, inner = self._valued(params, keys), segments.part_of(rule)
        out, lse, probs = dense.attend(queries, keys, inner)
        out = self._output(params, out, rule, x)
        return Result(out, state, {"lse": lse, "probs": probs})

    def _valued(self, params, keys: Keys) -> Keys:
        """The same keys with the values that their experts make of them."""
        v = keys.cleared().v.astype(jnp.float32)
        scores = jnp.einsum("bmge,gex->bmgx", v, params["value_scores"], precision=HIGHEST)
        mixed = jnp.einsum("bmgx,bmge,gxef->bmgf", self._gates(scores), v, params["values"])
        return keys._replace(v=mixed.astype(keys.v.dtype))

    def _output(self, params, out: Array, rule: Rule, x: Array | None) -> Array:
        assert x is not None, "the gates of the outputs read the block's input"
        x, z = x.astype(jnp.float32), out.astype(jnp.float32)
        scores = jnp.einsum("bnw,whx->bnhx", x, params["output_scores"], precision=HIGHEST)
        mixed = jnp.einsum("bnhx,bnhe,hxef->bnhf", self._gates(scores), z, params["outputs"])
        return rule.tap("heads", mixed.astype(out.dtype))

    def _gates(self, scores: Array) -> Array:
        """σ of the ``top`` largest of the last axis, 0 elsewhere."""
        _, chosen = jax.lax.top_k(scores, self.top)
        return jnp.sum(jax.nn.one_hot(chosen, self.experts), -2) * jax.nn.sigmoid(scores)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        E = dims.value_dim
        pairs = dims.heads * (dims.key_dim + E) * count_pairs(length, None, causal)
        scores = dims.kv_heads * E + dims.heads * dims.width
        matrices = (dims.kv_heads + dims.heads) * E * E
        return 2.0 * (pairs + length * self.experts * (scores + matrices))

    @classmethod
    def examples(cls):
        return (cls(experts=3, top=2),)
