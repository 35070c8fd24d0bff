"""Mixture of heads: a router chooses which heads a token listens to, and how much."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Mechanism, Result, count_pairs
from attnlab.engines import blockwise, dense, segments
from attnlab.errors import UserError
from attnlab.registry import register

HIGHEST = jax.lax.Precision.HIGHEST
"""Routers compute in f32 on every backend: what is chosen should not hang on a rounding."""


@register
@dataclass(frozen=True)
class MixtureOfHeads(Mechanism):
    """Exact attention whose heads are experts: some always on, of the rest the κ best per token.

    The first ``shared`` = S heads are on for every token; of the E = H − S others, those with the
    κ = ``top`` largest p = softmax(x W_r). out_h = g_h A_h with [α_1, α_2] = 2 softmax(x W_a) and
        g = α_1 S softmax(x W_s) for shared heads,  g = α_2 κ p_h / Σ_chosen p for the chosen,
    0 for the rest; uniform routers and κ = E give g = 1, which is softmax attention. Balance:
    ``aux["loss"]`` = ``balance`` E Σ_e P_e f_e, P_e the mean of p_e over tokens and f_e the share
    of tokens that chose e (κ when all heads are used alike).
    Shapes: queries [B N H D], keys [B M G D], values [B M G E], x [B N width] -> [B N H E].
    Cost: that of softmax attention, as all heads are computed; decoding keeps all keys and values.
    Raises `UserError` for a number of heads that leaves fewer than ``top`` to choose from.
    Source: Jin et al., arXiv 2410.11842.
    """

    shared: int = 1
    top: int = 2
    balance: float = 0.01

    cost = Cost(time=2, memory=1, state=1)

    def __post_init__(self):
        if self.shared < 0 or self.top < 1 or self.balance < 0:
            raise UserError(
                f"mixture_of_heads: shared={self.shared}, top={self.top}, balance={self.balance}; "
                "use shared >= 0, top >= 1, balance >= 0"
            )

    def init(self, key, dims):
        routed = self._routed(dims.heads)
        # Almost uniform, yet no two heads tie, which a choice would settle alike for all tokens.
        router = 0.1 * dims.width**-0.5 * jax.random.normal(key, (dims.width, routed))
        shared = {"shared": jnp.zeros((dims.width, self.shared))} if self.shared > 1 else {}
        levels = {"levels": jnp.zeros((dims.width, 2))} if self.shared else {}
        return {"router": router, **shared, **levels}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        gates, aux = self._gates(params, x, queries)
        out, lse = blockwise.attend(queries, keys, segments.part_of(rule))
        return Result(self._gated(gates, out, rule), state, {"lse": lse, **aux})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        gates, aux = self._gates(params, x, queries)
        out, lse, probs = dense.attend(queries, keys, segments.part_of(rule))
        return Result(self._gated(gates, out, rule), state, {"lse": lse, "probs": probs, **aux})

    def _routed(self, heads: int) -> int:
        """How many heads there are to choose from. Raises `UserError` if they are too few."""
        if self.top > heads - self.shared:
            raise UserError(
                f"mixture_of_heads: shared={self.shared} of model.heads={heads} leave "
                f"{heads - self.shared} to choose top={self.top} from; use fewer shared or a "
                "smaller top"
            )
        return heads - self.shared

    def _gates(self, params, x, queries):
        """g [B N H] f32, and what is measured about them."""
        assert x is not None, "the router reads the block's input"
        routed, x = self._routed(queries.q.shape[2]), x.astype(jnp.float32)

        def softmax(name: str) -> Array:
            return jax.nn.softmax(jnp.matmul(x, params[name], precision=HIGHEST), -1)

        p = softmax("router")
        chosen = jnp.sum(jax.nn.one_hot(jax.lax.top_k(p, self.top)[1], routed), -2)
        gates = self.top * p * chosen / jnp.sum(p * chosen, -1, keepdims=True)
        if self.shared:
            always = softmax("shared") if self.shared > 1 else jnp.ones((*p.shape[:2], 1))
            levels = 2.0 * softmax("levels")
            always = self.shared * always * levels[..., :1]
            gates = jnp.concatenate([always, gates * levels[..., 1:]], -1)
        loss, busiest = measure_balance(p, chosen, queries.seg >= 0)
        return gates, {"loss": self.balance * loss, "stats": {"busiest_head": busiest}}

    def _gated(self, gates, out, rule):
        out = (gates[..., None] * out.astype(jnp.float32)).astype(out.dtype)
        return rule.tap("heads", out)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = (dims.key_dim + dims.value_dim) * count_pairs(length, None, causal)
        routing = length * (dims.width * (dims.heads + 2) + dims.heads * dims.value_dim)
        return 2.0 * (dims.heads * pairs + routing)

    @classmethod
    def examples(cls):
        return (cls(shared=2, top=1),)


def measure_balance(p: Array, chosen: Array, full: Array) -> tuple[Array, Array]:
    """E Σ_e P_e f_e, and the largest f_e: ``p`` and ``chosen`` (0 or 1) [B N E], over the ``full``
    tokens [B N]. 1 when each of E experts is the only choice of as many tokens, E when one is of
    all; the gradient is that of P."""
    count = jnp.maximum(jnp.sum(full), 1)
    mean, share = (jnp.sum(jnp.where(full[..., None], z, 0), (0, 1)) / count for z in (p, chosen))
    return p.shape[-1] * jnp.sum(mean * share), jnp.max(share)
