"""Groups of heads, each with a mechanism of its own."""

from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.combination import Combination
from attnlab.core import Dims, Result, mechanisms
from attnlab.engines import head_groups
from attnlab.errors import UserError
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Heads(Combination):
    """Groups of heads, each with a mechanism of its own: out = [A_1(q_1, k_1, v_1), A_2(...), ...].

    Written ``attention=heads:window:lsh``: the first heads attend by ``window``, the rest by
    ``lsh``; a name that stands twice has two groups. ``sizes`` are the query heads of the groups,
    by default as equal as they can be, larger groups first. The options of a part are typed after
    its name, ``--config.attention.lsh.rounds=4``; ``heads`` alone is ``heads:window:softmax``. In a
    pattern over the layers, ``heads:window:lsh+softmax``, the sizes are
    ``--config.attention.heads.sizes=1,3``. A group has the kv heads that serve its query heads, and
    positions and normalisers with parameters per head give it those of its heads.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: the sum of the parts, each with its share of the heads. Raises `UserError` for sizes that
    do not match parts and heads, and for taps on logits and probabilities, which no part has of all
    heads; what a part refuses, the whole does. Source: local and global heads side by side, Roy et
    al., arXiv 2003.05997.
    """

    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.sizes and (len(self.sizes) != len(self.parts) or min(self.sizes) < 1):
            given = ",".join(map(str, self.sizes))
            raise UserError(
                f"heads: sizes={given} for {len(self.parts)} parts; give each part its number of "
                "heads, at least 1"
            )

    def dims_of_parts(self, dims: Dims) -> tuple[Dims, ...]:
        return tuple(group.dims(dims) for group in self.groups(dims.heads, dims.kv_heads))

    def groups(self, heads: int, kv_heads: int) -> tuple[head_groups.Group, ...]:
        """The group of each part. Raises `UserError` if they are not ``heads`` together."""
        parts = len(self.parts)
        sizes = self.sizes or tuple((heads + i) // parts for i in reversed(range(parts)))
        if min(sizes) < 1 or sum(sizes) != heads:
            raise UserError(
                f"heads: sizes={','.join(map(str, sizes))} of {parts} parts are not "
                f"model.heads={heads}, at least 1 each; set attention.sizes"
            )
        return head_groups.cut(sizes, kv_heads)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        return self._attend(lambda part: part, params, queries, keys, rule, state, x, key)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        return self._attend(lambda part: part.reference, params, queries, keys, rule, state, x, key)

    def _attend(self, form, params, queries, keys, rule, state, x, key):
        if rule.observed:
            places = " and ".join(dict.fromkeys(p for p, _ in rule.taps if p != "heads"))
            raise UserError(f"attention heads has the {places} of each part apart; tap a part")
        groups = self.groups(queries.q.shape[2], keys.k.shape[2])
        handed = tuple((g.queries(queries), g.keys(keys), g.rule(rule)) for g in groups)
        outs, state, aux = self.call_parts(form, params, handed, state, x, key)
        return Result(rule.tap("heads", jnp.concatenate(outs, 2)), state, aux)

    @classmethod
    def examples(cls):
        names = "window", "softmax", "infini", "routing", "han"
        window, softmax, infini, routing, han = map(mechanisms.get, names)
        return (
            cls((window(window=5), softmax())),
            cls((routing(clusters=4, length=5, decay=0.9), infini(segment=8)), sizes=(1, 3)),
            cls((han(), window(window=5))),
        )
