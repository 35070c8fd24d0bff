"""The mean of all visible values: attention that weighs nothing."""

from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.core import Cost, Dims, Mechanism, Result, Rule
from attnlab.engines import recurrent, undecayed
from attnlab.engines.recurrent import quotient, with_one
from attnlab.errors import UserError
from attnlab.refusals import refuse_bias, refuse_every_normaliser, refuse_taps
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Uniform(Mechanism):
    """The mean of all visible values: softmax with every logit 0, and tokens mixed all the same.

        out_i = (1 / n_i) Σ_j v_j   over the n_i visible keys

    The control of what weights are worth. Queries and keys are not used and the model makes none,
    so a layer has their parameters less. Shapes: queries [B N H D], keys [B M G D], values
    [B M G E] -> [B N H E], the heads of a kv head all alike.
    Cost: O(N C E) time in chunks of C = ``chunk`` tokens, O(N) memory; the decoding state is a sum
    and a count, E + 1 numbers for each kv head. Raises `UserError` for a chunk < 1 and, when
    called, for biased positions, normalisers and taps on logits. Source: the limit of softmax at an
    infinite temperature; as a control, "hard-coded" attention: You et al., arXiv 2005.00742.
    """

    chunk: int = 64

    cost = Cost(time=1, memory=1, state=0)
    spreads = True

    def __post_init__(self):
        if self.chunk < 1:
            raise UserError(f"uniform: chunk={self.chunk}; use chunk >= 1")

    def source(self, x, embedded, pos):
        return None

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        return recurrent.initial_state(batch, dims.kv_heads, 1, dims.value_dim + 1)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        after, one = state, jnp.ones((*keys.v.shape[:3], 1))
        if rule.causal:
            tokens = one, one, keys.v, keys.seg
            out, after = undecayed.attend(*tokens, state, chunk=self.chunk, mean=True)
        else:
            v = with_one(keys.cleared().v)
            out = quotient(recurrent.attend_both_ways(one, one, v, keys.seg, self.chunk))
        out = jnp.repeat(out, queries.q.shape[2] // out.shape[2], 2)
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), after if state else state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        seen = rule.allowed(queries, keys).astype(jnp.float32)
        sums = jnp.einsum("bnm,bmge->bnge", seen, with_one(keys.cleared().v))
        out = jnp.repeat(quotient(sums), queries.q.shape[2] // keys.v.shape[2], 2)
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        sums = dims._replace(heads=dims.kv_heads, key_dim=1, value_dim=dims.value_dim + 1)
        return recurrent.count_flops(sums, length, self.chunk, causal)

    @classmethod
    def examples(cls):
        return (cls(chunk=8),)


def _refuse(rule: Rule) -> None:
    refuse_every_normaliser("uniform", rule)
    refuse_bias("uniform", rule)
    refuse_taps("uniform", rule)
