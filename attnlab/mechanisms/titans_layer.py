"""Memory as layer: attention in a window over what a memory that learns answers."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Dims, Result, Rule
from attnlab.engines import persistent, segments
from attnlab.mechanisms.titans_gate import State, TitansGate, normed, refuse
from attnlab.mechanisms.window import Near
from attnlab.registry import register


@register
@dataclass(frozen=True)
class TitansLayer(TitansGate):
    """Attention in a window and to learned tokens, over the answers of `titans` (Titans MAL).

        m_i = norm(M_iᵀ q_i),   (q'_i, k'_i, v'_i) = m_i (W_q, W_k, W_v)
        out_i = softmax over [P; j : i − window < j <= i] of (q'_i · k') v'

    with M the memory of `titans`, which learns from k and v, and P ``persistent`` learned keys and
    values that all queries see. norm divides each head by its root mean square and multiplies by a
    learned vector; W are of all heads together. P and the memory know no positions; the window
    takes rotations and biases. The layer's projections serve the memory, so that the attention sees
    nothing but its answers, as in the paper, where the memory reads P too; norm is not there: the
    answers to the first tokens are small. Shapes: queries [B N H D], keys [B N G D], values
    [B N G E] -> [B N H E]; W_q [H E H D], W_k [H E G D], W_v [H E G E].
    Cost, state and refusals as `titans_gate`, and the products with W.
    Source: Behrouz et al., arXiv 2501.00663.
    """

    def init(self, key: Array, dims: Dims):
        for_memory, for_slots, for_heads = jax.random.split(key, 3)
        return {
            "memory": self.titans.init(for_memory, dims),
            "persistent": persistent.init(for_slots, dims, self.persistent),
            "norm": jnp.ones((dims.heads, dims.value_dim)),
            "project": projections(for_heads, dims),
        }

    def _combined(self, recall, attend, params, queries, keys, rule, state, x) -> Result:
        refuse(self, rule)
        memory, local = state or ((), ())
        # In f32: what is rounded on its way through memory, norm and attention adds up.
        dtype, queries, keys = queries.q.dtype, segments.precise(queries), segments.precise(keys)
        found = recall(params["memory"], queries, keys, Rule(), memory, x=x)
        answers = normed(found.out, params["norm"])
        q, k, v = (
            projected(answers, params["project"][name]) for name in ("query", "key", "value")
        )
        queries, keys = queries._replace(q=q), keys._replace(k=k, v=v)
        seen, after = segments.remember(keys, segments.precise(local))
        out, _ = attend(params["persistent"], queries, seen, rule.restrict(Near(self.window)))
        out = rule.tap("heads", out.astype(dtype))
        if state:
            state = State(found.state, segments.as_before(after, local))
        return Result(out, state, {})

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        return super().flops(dims, length, causal) + count_projections(dims, length)

    @classmethod
    def examples(cls):
        return (cls(window=5, persistent=3, chunk=8),)


def projections(key: Array, dims: Dims) -> dict[str, Array]:
    """What makes queries, keys and values of the outputs of all heads, [H E heads X] each."""
    H, G, D, E = dims.heads, dims.kv_heads, dims.key_dim, dims.value_dim
    shapes = {"query": (H, D), "key": (G, D), "value": (G, E)}
    draws = jax.random.split(key, len(shapes))
    return {
        name: (H * E) ** -0.5 * jax.random.normal(draw, (H, E, *shape))
        for draw, (name, shape) in zip(draws, shapes.items())
    }


def projected(z: Array, weight: Array) -> Array:
    """z W: [B N H E], [H E heads X] -> [B N heads X]."""
    return jnp.einsum("bnhe,hegx->bngx", z, weight)


def count_projections(dims: Dims, length: int, queries: bool = True) -> float:
    """Operations of `projected` to keys and values, and to ``queries``."""
    H, G, D, E = dims.heads, dims.kv_heads, dims.key_dim, dims.value_dim
    return 2.0 * length * H * E * (H * D * queries + G * (D + E))
