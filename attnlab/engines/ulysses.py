"""Attention over a sequence that lies on several devices, by exchanging tokens for heads.

Each of P devices has a P-th of the tokens of all heads. One all-to-all makes of that all tokens of
a P-th of the heads, on which attention is what it is on one device; another one turns the outputs
back. A query meets all its keys at once, so this serves what no merger of parts can.
Source: Jacobs et al., arXiv 2309.14509.
"""

from functools import partial

from jax import lax

from attnlab.core import Array, Keys, Queries, Rule
from attnlab.engines import blockwise, report_use, sharded
from attnlab.engines.sharded import SEQUENCE


def attend(
    queries: Queries, keys: Keys, rule: Rule, tile: int | None = None
) -> tuple[Array, Array]:
    """`blockwise.attend`, with the tokens split along the mesh axis ``seq`` if there is one and
    both numbers of heads can be split along it too; with all of them on every device otherwise.

    Shapes as there. Cost on each device: its share of the pairs, O((N + M) / P) memory times that
    of a rule that wants whole rows; it sends and receives its queries, keys, values and outputs.
    """
    N, M = queries.pos.shape[1], keys.pos.shape[1]
    devices = sharded.count(N) if N == M else 1
    if devices == 1:
        return blockwise.attend(queries, keys, rule, tile)
    heads = queries.q.shape[2], keys.k.shape[2]
    at = sharded.layout(queries.q.shape[0], *heads)
    if sharded.has_parameters(rule) or any(at.own(number) % devices for number in heads):
        report_use("blockwise", f"sequence gathered on {devices} devices")
        return blockwise.attend(queries, keys, rule, tile)
    report_use("ulysses", f"{devices} devices")
    return sharded.attend(partial(_attend, tile), queries, keys, rule)


def _attend(tile: int | None, queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
    def of_all(z: Array) -> Array:
        """[B n] -> [B N]."""
        return lax.all_gather(z, SEQUENCE, axis=1, tiled=True)

    def to_heads(z: Array) -> Array:
        """[B n heads X] -> [B N heads/P X]."""
        return lax.all_to_all(z, SEQUENCE, 2, 1, tiled=True)

    pos, seg = of_all(queries.pos), of_all(queries.seg)
    queries = Queries(to_heads(queries.q), pos, seg)
    count = None if keys.count is None else of_all(keys.count)
    pos, seg = of_all(keys.pos), of_all(keys.seg)
    keys = Keys(to_heads(keys.k), to_heads(keys.v), pos, seg, count)
    out, lse = blockwise.attend(queries, keys, rule, tile)
    out = lax.all_to_all(out, SEQUENCE, 1, 2, tiled=True)
    return out, lax.all_to_all(lse, SEQUENCE, 2, 1, tiled=True)
