"""Anchor attention: near keys, and stripes that a group of queries is shown by the group before."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import (
    MASK,
    Array,
    Cost,
    Dims,
    Keys,
    Mechanism,
    Queries,
    Result,
    Rule,
    count_pairs,
)
from attnlab.engines import blockwise, dense, gathered, parts, segments
from attnlab.engines.stripes import State, Stripes
from attnlab.errors import UserError
from attnlab.refusals import refuse_bidirectional, refuse_normaliser, refuse_taps
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Anchor(Mechanism):
    """Attention to the first block, the own group, and stripes that came near the anchor before.

        R_i = {j <= i : j < b or γ(j) = γ(i)},   x_i = max over R_i of z_ij   (the anchor)
        m_γj = max over the blocks t of group γ − 1 of (q̄_t·k_j / √D − x̄_t),   b <= j < γ g b
        out_i = softmax over R_i and the S keys of the highest m_γj >= −θ, γ = γ(i)

    with b = ``block``, groups γ of g = ``step`` blocks by their position in the document, q̄_t and
    x̄_t the means over a block of queries as the position module turns them (its bias is added at
    the middle of the block) and of their anchors, θ = ``threshold`` in units of a logit, S =
    ``stripes``, for each head. At θ = −inf nothing but R_i is seen. Published, a group's own
    queries choose its stripes, so that later ones reach earlier outputs: here those of the group
    before choose. A group of which a query is missing chooses nothing (the first of a document that
    does not begin at a multiple of g b). No gradient passes the choice. ``aux["stats"]`` has the
    share of keys above −θ that were more than S. Shapes: queries [B N H D], keys [B M G D], values
    [B M G E] -> [B N H E].
    Cost: O(N (g b + S) (D + E) + N M / b D) time, O(N S / (g b)) memory for places; decoding keeps
    all keys and values, and chooses once a group; there the tokens of a document must lie side by
    side. Causal only; raises `UserError` for a rule that is not, sizes < 1, a threshold that is no
    number, and taps on logits while decoding.
    Source: Zhang et al., AnchorAttention, arXiv 2505.23520.
    """

    block: int = 32
    step: int = 4
    stripes: int = 128
    threshold: float = 12.0

    cost = Cost(time=2, memory=1, state=1)
    recalls = True

    ago: ClassVar[int] = 1
    """How many groups before the one that is shown the stripes the one that chooses them is."""

    def __post_init__(self):
        if min(self.block, self.step, self.stripes) < 1 or math.isnan(self.threshold):
            raise UserError(
                f"anchor: block={self.block}, step={self.step}, stripes={self.stripes}, "
                f"threshold={self.threshold}; use sizes >= 1 and a threshold that is a number"
            )

    @property
    def relative(self) -> bool:
        return False

    @property
    def chosen(self) -> Stripes:
        """How its stripes are chosen."""
        return Stripes(self.block, self.step, self.stripes, self.threshold, self.ago)

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> State:
        return self.chosen.initial_state(dims, batch)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        if rule.observed and not state:
            return self.reference(params, queries, keys, rule)
        self._refuse(rule)
        refuse_taps("anchor", rule)
        plain, chosen = segments.part_of(rule), self.chosen
        queries, keys = jax.tree.map(jnp.asarray, (queries.cleared(), keys.cleared()))
        near, tile = plain.restrict(chosen.region), segments.tile_of(chosen.group)
        out, lse = blockwise.attend(queries, keys, near, tile)
        choice, after = chosen.choose(queries, keys, plain, state)
        far, far_lse = gathered.attend(queries, keys, plain, chosen.plan(choice))
        out, lse = parts.merge([out.swapaxes(1, 2), far], [lse, far_lse])
        out = rule.tap("heads", out.swapaxes(1, 2).astype(queries.q.dtype))
        stats = {"stripes_left_out": choice.left_out}
        return Result(out, after, {"lse": lse, "stats": stats})

    def _refuse(self, rule: Rule) -> None:
        refuse_bidirectional("anchor", rule, "a group is shown what the one before it chose")
        refuse_normaliser("anchor", rule)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        self._refuse(rule)
        out, lse, probs = dense.attend(queries, keys, rule, self._seen(queries, keys, rule))
        return Result(out, state, {"lse": lse, "probs": probs})

    def _seen(self, queries: Queries, keys: Keys, rule: Rule) -> Array:
        """R and the stripes as a mask [B H N M], literally."""
        rule = lax.stop_gradient(dataclasses.replace(rule, taps=()))
        queries, keys = (segments.precise(lax.stop_gradient(z.cleared())) for z in (queries, keys))
        own = self.chosen.region.visible(queries.pos[:, :, None], keys.pos[:, None])[:, None]
        near = own & rule.allowed(queries, keys)[:, None]
        x = jnp.max(jnp.where(near, rule.logits(queries, keys), MASK), -1)
        wanted, margin = self._margin(queries, keys, rule, x)
        wanted &= margin >= -self.threshold
        best = jnp.where(wanted, margin, -jnp.inf)
        top, slot = lax.top_k(best, min(self.stripes, best.shape[-1]))
        picked = jnp.zeros(best.shape, bool)
        return own | jnp.put_along_axis(picked, slot, top > -jnp.inf, -1, inplace=False)

    def _margin(self, queries: Queries, keys: Keys, rule: Rule, x: Array) -> tuple[Array, Array]:
        """Which keys each query may be shown and their m, bool and f32 [B H N M]: of anchors ``x``
        [B H N]. Blocks are known by their first token."""
        b, group, (pos, seg) = self.block, self.chosen.group, queries[1:]
        alike = (seg[:, :, None] == seg[:, None]) & (seg >= 0)[:, None]
        same = alike & (pos[:, :, None] // b == pos[:, None] // b)
        whole = (pos % b == 0) & (jnp.sum(same, -1) == b)
        q = rule.rotate(queries.q, pos, "query").swapaxes(1, 2)
        k = rule.rotate(keys.k, keys.pos, "key").swapaxes(1, 2)
        q, x = (jnp.einsum("btn,bhn...->bht...", same / b, z) for z in (q, x))
        score = rule.biased(q, k, pos // b * b + (b - 1) // 2, keys.pos) - x[..., None]
        begin = pos // group * group
        shown = (seg[:, :, None] == keys.seg[:, None]) & (keys.seg >= 0)[:, None]
        shown &= (keys.pos >= b)[:, None] & (keys.pos[:, None] < begin[..., None])
        margin = jnp.full(score.shape, -jnp.inf)
        for i in range(self.step):
            first = begin - self.ago * group + i * b
            match = alike & (first[..., None] == pos[:, None]) & whole[:, None]
            shown &= jnp.any(match, -1, keepdims=True)
            block = jnp.argmax(match, -1)[:, None, :, None]
            margin = jnp.maximum(margin, jnp.take_along_axis(score, block, 2))
        return shown[:, None], margin

    def limit(self, length: int):
        return dataclasses.replace(self, stripes=length, threshold=math.inf)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        chosen, D, E = self.chosen, dims.key_dim, dims.value_dim
        group, tile = chosen.group, chosen.tile(length)
        whole, rest = divmod(length, group)
        near = whole * count_pairs(group) + count_pairs(rest)
        near += max(0, length - group) * self.block
        tiles = max(0, whole - 1) * -(-group // tile) + (-(-rest // tile) if whole else 0)
        far = tiles * tile * min(self.stripes, length)
        pooled = max(0, -(-length // group) - 1) * self.step * length
        return 2.0 * dims.heads * ((near + far) * (D + E) + (near + pooled) * D)

    @classmethod
    def examples(cls):
        return (
            cls(block=2, step=3, stripes=3, threshold=4.0),
            cls(block=4, step=2, stripes=40, threshold=1.5),
        )
