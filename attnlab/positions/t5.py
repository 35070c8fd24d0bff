"""Relative position buckets of T5."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import Position
from attnlab.errors import UserError
from attnlab.positions.lookup import distances, look_up
from attnlab.registry import register


def bucket_table(buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every distance 0..max_distance, int32; later distances share the last.

    With e = buckets / 2: x itself below e, else min(buckets − 1, e + ⌊(buckets − e) ln(x / e) /
    ln(max_distance / e)⌋). Compared as powers of integers, because the edges of buckets fall on
    integers where a rounded logarithm may come out on either side.
    """
    exact = buckets // 2
    rest = buckets - exact

    def bucket(x: int) -> int:
        if x < exact:
            return x
        scaled = x**rest
        reached = (scaled * exact**b >= max_distance**b * exact**rest for b in range(1, rest))
        return exact + sum(reached)

    return np.array([bucket(x) for x in range(max_distance + 1)], np.int32)


@register
@dataclass(frozen=True)
class T5(Position):
    """A learned bias per head for every bucket of distances: exact near by, logarithmic far off.

    logits + table[h, bucket(pos_q − pos_k)], not divided by √D; see `bucket_table`. Both sides have
    ``buckets`` of their own (a T5 encoder that is said to have 32 has 16 of them on each side), and
    a causal model uses those of one side only. Parameters: ``table`` [H 2·buckets], that of later
    keys second; shared by all layers. Shapes: pos [B N], [B M] -> [B H N M] f32. Cost: one gather
    per logit. Distances from ``max_distance`` on share a bucket, also beyond the training length.
    Raises `UserError` for an odd number of buckets or max_distance <= buckets / 2.
    Source: Raffel et al., arXiv 1910.10683.
    """

    buckets: int = 32
    max_distance: int = 128

    biased = True
    shared = True

    def __post_init__(self):
        if self.buckets < 2 or self.buckets % 2 or self.max_distance <= self.buckets // 2:
            raise UserError(
                f"position t5: buckets={self.buckets}, max_distance={self.max_distance}; use an "
                "even number of buckets, at least 2, and max_distance > buckets / 2"
            )

    def init(self, key, dims):
        return {"table": 0.02 * jax.random.normal(key, (dims.heads, 2 * self.buckets))}

    def bias(self, params, q, q_pos, k_pos):
        near = bucket_table(self.buckets, self.max_distance)
        both = np.concatenate([self.buckets + near[:0:-1], near])  # of −max_distance..max_distance
        delta = jnp.clip(distances(q_pos, k_pos), -self.max_distance, self.max_distance)
        index = jnp.asarray(both)[delta + self.max_distance]
        return look_up(params["table"][None, :, None], index)
