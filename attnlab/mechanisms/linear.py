"""Linear attention: a positive feature map in place of the exponential."""

from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import recurrent, undecayed
from attnlab.engines.recurrent import quotient, with_one
from attnlab.errors import UserError
from attnlab.refusals import refuse_bias, refuse_every_normaliser, refuse_taps
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Linear(Mechanism):
    """Kernel attention with φ = elu + 1: Σ φ(q)·φ(k) v / Σ φ(q)·φ(k) over the visible keys.

    Causal, it is a recurrence with a state of constant size, S_t = S_(t-1) + φ(k_t) [v_t, 1]ᵀ.
    Rotations are applied before the feature map, so with rope an output depends on where both
    tokens are. The scale of the rule has no meaning without logits and is not used.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N D E) time in chunks of ``chunk`` tokens, O(N) memory; the decoding state is one
    D x (E + 1) matrix for each kv head. Raises `UserError` for a chunk < 1 and, when called, for
    biased positions and taps on logits. Source: Katharopoulos et al., arXiv 2006.16236.
    """

    chunk: int = 64

    cost = Cost(time=1, memory=1, state=0)
    spreads = True
    isotropic = False

    def __post_init__(self):
        if self.chunk < 1:
            raise UserError(f"linear: chunk={self.chunk}; use chunk >= 1")

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        return recurrent.initial_state(batch, dims.kv_heads, dims.key_dim, dims.value_dim + 1)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        self._refuse(rule)
        after = state
        if rule.causal:
            q = rule.rotate(queries.q.astype(jnp.float32), queries.pos, "query")
            k = rule.rotate(keys.k.astype(jnp.float32), keys.pos, "key")
            out, after = undecayed.attend(
                q, k, keys.v, keys.seg, state, chunk=self.chunk, mean=True, features=elu_plus_one
            )
        else:
            q, k, v = *self._features(queries, keys, rule), with_one(keys.cleared().v)
            out = quotient(recurrent.attend_both_ways(q, k, v, keys.seg, self.chunk))
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, after if state else state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        self._refuse(rule)
        q, k = self._features(queries, keys, rule)
        k, v = (jnp.repeat(z, q.shape[2] // z.shape[2], 2) for z in (k, with_one(keys.cleared().v)))
        weight = jnp.where(
            rule.allowed(queries, keys)[:, None], jnp.einsum("bnhd,bmhd->bhnm", q, k), 0
        )
        out = quotient(jnp.einsum("bhnm,bmhe->bnhe", weight, v)).astype(queries.q.dtype)
        return Result(rule.tap("heads", out), state)

    def _refuse(self, rule: Rule) -> None:
        refuse_every_normaliser("linear", rule)
        refuse_bias("linear", rule)
        refuse_taps("linear", rule)

    def _features(self, queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
        q, k = rotated(queries, keys, rule)
        return elu_plus_one(q), elu_plus_one(k)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        weighed = dims._replace(value_dim=dims.value_dim + 1)
        return recurrent.count_flops(weighed, length, self.chunk, causal)

    @classmethod
    def examples(cls):
        return (cls(chunk=8),)


def elu_plus_one(z: Array) -> Array:
    """φ(z) = elu(z) + 1: e^z below 0, 1 + z above."""
    # The exponential of what is not used must stay finite for the gradient.
    return jnp.where(z > 0, z + 1, jnp.exp(jnp.minimum(z, 0)))


def rotated(queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
    """Queries [B N H D] and keys [B M G D] in f32, turned by their position."""
    q, k = queries.cleared().q.astype(jnp.float32), keys.cleared().k.astype(jnp.float32)
    return rule.rotate(q, queries.pos, "query"), rule.rotate(k, keys.pos, "key")
