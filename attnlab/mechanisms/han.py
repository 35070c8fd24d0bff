"""Words, sentences and paragraphs: exact inside a word, one vector for each finished unit."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Pattern, Queries, Result, count_pairs
from attnlab.engines import blockwise, matching, segments, units
from attnlab.refusals import refuse_normaliser
from attnlab.registry import register


@dataclass(frozen=True)
class Earlier(Pattern):
    """Keys at or before the query, whatever the rule."""

    def visible(self, q_pos, k_pos):
        return k_pos <= q_pos

    def reaches(self, q_low, q_high, k_low, k_high):
        return k_low <= q_high


@dataclass(frozen=True)
class Later(Pattern):
    """Keys at or behind the query."""

    def visible(self, q_pos, k_pos):
        return k_pos >= q_pos

    def reaches(self, q_low, q_high, k_low, k_high):
        return k_high >= q_low


@register
@dataclass(frozen=True)
class Han(Mechanism):
    """The tokens of one's word, the words of one's sentence, its paragraph's sentences, all others.

    A token sees its own word exactly, other words of its sentence, other sentences of its paragraph
    and other paragraphs of its document as one key and value each, in one softmax:
        logit = q·k̄ + ln c,   k̄ = Σ_t α_t k_t, v̄ likewise,
        α = softmax over the parts t of the unit of u·tanh(k_t W + b) + ln c_t
    with c the tokens a unit stands for and u, W, b of the level; u begins at 0, where every vector
    is the mean of its tokens. Every visible token is covered once, so a query of 0 then gives the
    exact mean of all visible values. Under a causal rule only finished units are seen. A unit
    stands at the position behind its end, or before its beginning for those that it follows.
    Where units end is said by the tokenizer; without marks a document is one word, and this is
    softmax attention. Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N n (D + E)) time, with n the most parts of a unit, hence O(N²) for text without marks,
    as counted here, and for many paragraphs; O(N) memory; decoding keeps all keys.
    Source: Yang et al., Hierarchical Attention Networks, NAACL 2016; log counts, exactness inside
    the word and causal use are this laboratory's.
    """

    cost = Cost(time=2, memory=1, state=1)
    marked = True

    def init(self, key: Array, dims: Dims):
        G, D = dims.kv_heads, dims.key_dim
        weight = D**-0.5 * jax.random.normal(key, (units.LEVELS, G, D, D))
        zero = jnp.zeros((units.LEVELS, G, D))
        return {"weight": weight, "offset": zero, "context": zero}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("han", rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        level = units.numbered(keys)
        own = matching.locate(queries.pos, queries.seg, keys.pos, keys.seg)
        above = jnp.take_along_axis(level.above, jnp.maximum(own, 0)[None], 2)
        above = jnp.where(own >= 0, above, -1)
        inner = segments.part_of(rule)
        asking = queries._replace(seg=above[0])
        parts = [blockwise.attend(asking, level.keys._replace(seg=level.above[0]), inner)]
        for i in range(units.LEVELS):
            level = units.pooled(level, _score(params, i, level.keys.k))
            asking = queries._replace(seg=above[i + 1])
            answering = level.keys._replace(seg=level.above[0])
            sides = [(level.last + 1, Earlier())]
            sides += [] if rule.causal else [(level.first - 1, Later())]
            for pos, side in sides:
                there = answering._replace(pos=pos)
                parts.append(blockwise.attend(asking, there, inner.restrict(side)))
        out, lse = segments.join(*parts)
        return Result(rule.tap("heads", out), state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("han", rule)
        keys = keys.cleared()
        count = jnp.ones(keys.pos.shape)
        plain = keys._replace(unit=None, count=count)
        among, asked = _shared(keys, keys), _shared(queries, keys)
        first = last = keys.pos
        kept = keys.seg >= 0
        parts: list[tuple[Queries, Keys, Array]] = [(queries, plain, asked[1])]
        for i in range(units.LEVELS):
            score = _score(params, i, plain.k) + jnp.log(jnp.maximum(count, 1))[..., None]
            inside = among[i + 1] & kept[:, None]
            z = jnp.where(inside[..., None], score[:, None], -jnp.inf)
            weight = jnp.where(inside[..., None], jax.nn.softmax(z, 2, where=inside[..., None]), 0)
            k, v = (
                jnp.einsum("bjtg,btgd->bjgd", weight, z.astype(jnp.float32)).astype(z.dtype)
                for z in (plain.k, plain.v)
            )
            count = jnp.einsum("bjt,bt->bj", inside.astype(jnp.float32), count)
            first = jnp.min(jnp.where(among[i + 1], keys.pos[:, None], keys.pos[..., None]), 2)
            last = jnp.max(jnp.where(among[i + 1], keys.pos[:, None], keys.pos[..., None]), 2)
            kept = (keys.seg >= 0) & (keys.pos == last)  # one token speaks for its unit
            plain = Keys(k, v, keys.pos, keys.seg, count)
            other = asked[i + 2] & ~asked[i + 1] & kept[:, None]
            before = other & (last[:, None] < queries.pos[..., None])
            parts.append((queries, plain._replace(pos=last + 1), before))
            if not rule.causal:
                behind = other & (first[:, None] > queries.pos[..., None])
                parts.append((queries, plain._replace(pos=first - 1), behind))
        out, lse, probs = matching.attend_densely(rule, *parts)
        return Result(out, state, {"lse": lse, "probs": probs})

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = count_pairs(length, None, causal)
        pooling = units.LEVELS * length * dims.kv_heads * dims.key_dim * (dims.key_dim + 2)
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs + 2.0 * pooling


def _score(params, level: int, k: Array) -> Array:
    """u·tanh(k W + b): keys [B M G D] -> f32 [B M G]."""
    weight, offset, context = (params[z][level] for z in ("weight", "offset", "context"))
    hidden = jnp.einsum("bmgd,gde->bmge", k.astype(jnp.float32), weight)
    return jnp.einsum("bmge,ge->bmg", jnp.tanh(hidden + offset), context)


def _shared(tokens: Queries | Keys, keys: Keys) -> list[Array]:
    """For each level, the token itself (0) to the document (4), whether a token and a key lie in
    the same unit, from the number of borders before each: bool [B N M]."""
    same = (tokens.seg[..., None] == keys.seg[:, None]) & (keys.seg >= 0)[:, None]
    unit = jnp.zeros_like(keys.pos) if keys.unit is None else keys.unit

    def borders(z: Queries | Keys, level: int) -> Array:
        document = (z.seg[..., None] == keys.seg[:, None]) & (keys.seg >= 0)[:, None]
        z_pos, k_pos = z.pos[..., None], keys.pos[:, None]
        ended = (k_pos < z_pos) & (unit % 4 >= level)[:, None]
        begun = (k_pos <= z_pos) & (unit // 4 >= level)[:, None]
        return jnp.sum(document * (ended.astype(jnp.int32) + begun), -1)

    levels = [
        same & (borders(tokens, level)[..., None] == borders(keys, level)[:, None])
        for level in range(1, units.LEVELS + 1)
    ]
    return [same & (tokens.pos[..., None] == keys.pos[:, None]), *levels, same]
