"""Content-based routing: attention inside clusters that follow the data by online k-means."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Mechanism, Result
from attnlab.engines import bucketed, rings, sorting, union
from attnlab.errors import UserError
from attnlab.refusals import refuse_normaliser, refuse_taps
from attnlab.registry import register


def normalise(u: Array) -> Array:
    """Mean 0 and variance 1 over the last axis, without scale or bias: |û| = √D."""
    u = u - jnp.mean(u, -1, keepdims=True)
    return u * jax.lax.rsqrt(jnp.mean(u * u, -1, keepdims=True) + 1e-6)


def affinities(u: Array, centroids: Array) -> Array:
    """û·μ_c / |μ_c|: [B N H D], [H K D] -> [B H N K] f32, without gradient."""
    size = jnp.sqrt(jnp.sum(centroids * centroids, -1, keepdims=True) + 1e-12)
    return jax.lax.stop_gradient(jnp.einsum("bnhd,hkd->bhnk", u, centroids / size))


def average(statistics: dict[str, Array], u: Array, members: Array, decay: float):
    """The next centroids μ and masses n, from one-hot ``members`` [B H N K] of ``u`` [B N H D]:

        n ← λ n + (1 − λ) Σ 1,   μ ← (λ n μ + (1 − λ) Σ u) / n

    so that μ is the mean of its members with weights λ^age. A cluster without a member keeps its
    centroid while its mass decays, and then starts afresh where tokens find it again; with a decay
    of 1 none moves. No division by 0 is left for a smoothing constant to prevent.
    """
    mean, mass = statistics["centroids"], jnp.maximum(statistics["mass"], 0.0)
    hits, total = jnp.sum(members, (0, 2)), jnp.einsum("bhnk,bnhd->hkd", members, u)
    new = decay * mass + (1 - decay) * hits
    found = ((hits > 0) & (new > 0))[..., None]
    moved = decay * mass[..., None] * mean + (1 - decay) * total
    moved /= jnp.where(found, new[..., None], 1.0)
    return {"centroids": jnp.where(found, moved, mean), "mass": new}


def select_members(affinity: Array, width: int) -> Array:
    """The published selection: every cluster takes the ``width`` tokens of the whole sequence that
    are closest to it. ``affinity`` [B H N K] -> who meets whom, bool [B H N N].

    It leaks: a later token that is closer pushes an earlier one out of a cluster, and so changes
    what other early tokens see, while every gradient to the future is 0. It is here to be measured;
    no configuration reaches it.
    """
    _, chosen = jax.lax.top_k(affinity.swapaxes(2, 3), width)
    member = jnp.any(jax.nn.one_hot(chosen, affinity.shape[2], dtype=bool), -2)
    return jnp.any(member[..., :, None] & member[..., None, :], 2)


@register
@dataclass(frozen=True)
class Routing(Mechanism):
    """Attention inside learned clusters: softmax over {j : c(j) = c(i), near in time}, by k-means.

    Query and key are one normalised vector û = LN((q + k) / √2), a single projection of x:
    logits e^τ û_i·û_j / √D with a learned τ per head; c(i) = argmax_c û_i·μ_c / |μ_c|. A token sees
    the ``length`` newest earlier tokens of its cluster and document (bidirectional: on either
    side), which later tokens cannot change, and itself only where it sees nothing else.
    Centroids μ [H K D] are measured: moving averages of their members with ``decay`` λ, in
    ``aux["statistics"]``; the first step puts them at the means of the first batch. û is held to
    its centroid by ``aux["loss"]`` = ``commitment`` · mean (û − μ)².
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N (K D + log N + length (D + E))) time, O(N (K + length)) memory; decoding keeps K rings
    of ``length`` tokens per head. ``length`` >= 2 N / K leaves room for uneven clusters; with
    K ≈ √N the whole is O(N^1.5). Raises `UserError` for sizes out of range, `ValueError` for keys
    that are not the queries' tokens.
    Source: Roy et al., arXiv 2003.05997, with a visible set that does not depend on later tokens
    (theirs: `select_members`).
    """

    clusters: int = 16
    length: int = 64
    decay: float = 0.999
    commitment: float = 1e-4

    cost = Cost(time=1, memory=1, state=0)

    def __post_init__(self):
        if min(self.clusters, self.length) < 1 or not 0 <= self.decay <= 1 or self.commitment < 0:
            raise UserError(
                f"routing: clusters={self.clusters}, length={self.length}, decay={self.decay}, "
                f"commitment={self.commitment}; use clusters and length >= 1, decay in 0..1, "
                "commitment >= 0"
            )

    def init(self, key, dims):
        shape = dims.heads, self.clusters
        centroids = normalise(jax.random.normal(key, (*shape, dims.key_dim)))
        return {
            "temperature": jnp.zeros(dims.heads),
            "statistics": {"centroids": centroids, "mass": jnp.zeros(shape)},
        }

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        return rings.empty(dims, batch, 1, self.clusters, self.length, dtype)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("routing", rule)
        if rule.observed and not state:
            return self.reference(params, queries, keys, rule)
        queries, keys, cluster, aux = self._routed(params, queries, keys)
        if state:
            refuse_taps("routing with a state", rule)
            out, state = rings.attend(state, queries, keys, rule, cluster[None])
            return Result(out, state)
        plan, reach = sorting.plan_runs(
            cluster[None], self.clusters, self.length, queries, rule.causal
        )
        out, lse = bucketed.attend(queries, keys, rule, plan, reach)
        return Result(out, state, {"lse": lse, **aux})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("routing", rule)
        queries, keys, cluster, aux = self._routed(params, queries, keys)
        if state:
            refuse_taps("routing with a state", rule)
            out, state = rings.attend(state, queries, keys, rule, cluster[None])
            return Result(out, state)
        met = union.meet(cluster, self.length, queries)
        out, lse, probs = union.attend(queries, keys, rule, met)
        return Result(out, state, {"lse": lse, "probs": probs, **aux})

    def _routed(self, params, queries, keys):
        """The tied tokens, the cluster of each [B H N], and what is measured about them."""
        u = normalise(bucketed.tie(queries, keys))
        statistics = jax.lax.stop_gradient(params["statistics"])
        cluster = jnp.argmax(affinities(u, statistics["centroids"]), -1).astype(jnp.int32)
        full = (queries.seg >= 0)[:, None, :, None]
        members = jax.nn.one_hot(cluster, self.clusters) * full
        tokens = jnp.maximum(jnp.sum(full) * u.shape[2], 1)
        own = jnp.einsum("bhnk,hkd->bnhd", members, statistics["centroids"])
        far = jnp.where(full.swapaxes(1, 2), u - own, 0.0)
        aux = {
            "loss": self.commitment * jnp.sum(far * far) / (tokens * u.shape[-1]),
            "statistics": average(statistics, jax.lax.stop_gradient(u), members, self.decay),
            "stats": {"largest_cluster": jnp.max(jnp.sum(members, (0, 2))) * u.shape[2] / tokens},
        }
        q = u * jnp.exp(params["temperature"])[:, None]
        dtype = queries.q.dtype
        return queries._replace(q=q.astype(dtype)), keys._replace(k=u.astype(dtype)), cluster, aux

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = sorting.count_pairs(length, self.clusters, self.length, causal)
        routing = length * self.clusters * dims.key_dim
        return 2.0 * dims.heads * ((dims.key_dim + dims.value_dim) * pairs + routing)

    @classmethod
    def examples(cls):
        return (cls(clusters=4, length=5, decay=0.9),)
