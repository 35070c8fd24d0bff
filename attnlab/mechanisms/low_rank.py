"""The attention matrix as a product of two thin ones."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import recurrent, running
from attnlab.errors import UserError
from attnlab.mechanisms.linear import rotated
from attnlab.refusals import refuse_bias, refuse_every_normaliser, refuse_taps
from attnlab.registry import register


@register
@dataclass(frozen=True)
class LowRank(Mechanism):
    """The attention matrix as U Vᵀ of rank k: queries share among k columns, columns among keys.

        u_i = softmax over r of q_i·W_r,   V_jr = e^(k_j·M_r) / Σ_j' e^(k_j'·M_r),
        out_i = Σ_r u_ir Σ_j V_jr v_j

    so that every row of U Vᵀ is a distribution over the visible keys. With a causal rule the sums
    over j run to i, which is still of rank k at every step. W, M [heads k D] are learned. Rotated
    keys lose what a mean over them cancels: position none or absolute suits it best.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N k (D + E)) time in chunks of ``chunk`` tokens, O(N k) memory; the decoding state is
    k (E + 2) numbers a kv head. Raises `UserError` for rank < 1 or chunk < 1 and, when called, for
    biased positions, taps on logits and normalisers. Source: the factorisation of Shen et al.,
    arXiv 1812.01243, with learned columns.
    """

    rank: int = 64
    chunk: int = 64

    cost = Cost(time=1, memory=1, state=0)
    isotropic = False

    def __post_init__(self):
        if self.rank < 1 or self.chunk < 1:
            raise UserError(
                f"low_rank: rank={self.rank}, chunk={self.chunk}; use rank >= 1 and chunk >= 1"
            )

    def init(self, key: Array, dims: Dims):
        a, b = jax.random.split(key)
        scale, D, k = dims.key_dim**-0.5, dims.key_dim, self.rank
        return {
            "query": scale * jax.random.normal(a, (dims.heads, k, D)),
            "key": scale * jax.random.normal(b, (dims.kv_heads, k, D)),
        }

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        heads, k = dims.kv_heads, self.rank
        return (
            running.initial_top(batch, heads, k),
            recurrent.initial_state(batch, heads, 1, k),
            recurrent.initial_state(batch, heads, k, dims.value_dim),
        )

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        u, log_weight = _factors(params, queries, keys, rule)
        v, seg, chunk = keys.cleared().v, keys.seg, self.chunk
        repeats = u.shape[2] // v.shape[2]
        if rule.causal:
            top, totals, columns = state or ((), (), ())
            weight, decay, _, top = running.rescale(log_weight, seg, top)
            one = jnp.ones((*weight.shape[:3], 1))
            options = {"chunk": chunk, "kernels": rule.kernels}
            total, totals = recurrent.attend(
                one, one, weight, seg, totals, value_decay=decay, **options
            )
            share = u / _positive(jnp.repeat(total, repeats, 2))
            out, columns = recurrent.attend(
                share, weight, v, seg, columns, key_decay=decay, **options
            )
            state = (top, totals, columns) if state else state
        else:
            weight, _ = running.rescale_both_ways(log_weight, seg)
            one = jnp.ones((*weight.shape[:3], 1))
            total = recurrent.attend_both_ways(one, one, weight, seg, chunk)
            share = u / _positive(jnp.repeat(total, repeats, 2))
            out = recurrent.attend_both_ways(share, weight, v, seg, chunk)
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        u, log_weight = _factors(params, queries, keys, rule)
        seen = rule.allowed(queries, keys)[..., None, None]
        columns = jax.nn.softmax(jnp.where(seen, log_weight[:, None], MASK), 2)
        columns = jnp.where(seen, columns, 0)
        columns = jnp.repeat(columns, u.shape[2] // keys.v.shape[2], 3)
        v = jnp.repeat(keys.cleared().v.astype(jnp.float32), u.shape[2] // keys.v.shape[2], 2)
        out = jnp.einsum("bnhr,bnmhr,bmhe->bnhe", u, columns, v)
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        factors = 2.0 * length * (dims.heads + dims.kv_heads) * dims.key_dim * self.rank
        totals = Dims(dims.width, dims.kv_heads, dims.kv_heads, 1, self.rank)
        columns = dims._replace(key_dim=self.rank)
        return factors + sum(
            recurrent.count_flops(each, length, self.chunk, causal, along_axis=causal)
            for each in (totals, columns)
        )

    @classmethod
    def examples(cls):
        return (cls(rank=5, chunk=8),)


def _factors(params, queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
    """u [B N H k], and ln V [B M G k] up to the normaliser of its columns; f32."""
    refuse_every_normaliser("low_rank", rule)
    refuse_bias("low_rank", rule)
    refuse_taps("low_rank", rule)
    q, k = rotated(queries, keys, rule)
    u = jax.nn.softmax(jnp.einsum("bnhd,hrd->bnhr", q, params["query"]), -1)
    return u, jnp.einsum("bmgd,grd->bmgr", k, params["key"])


def _positive(total: Array) -> Array:
    """1 where nothing was summed."""
    return jnp.where(total > 0, total, 1.0)
