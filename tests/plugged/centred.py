"""Softmax attention over values from which their running mean is taken away: it has statistics."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Cost, Mechanism, Result
from attnlab.engines import blockwise
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Centred(Mechanism):
    """``kernel`` [G E] follows the mean value of the batch, ``calls`` counts the calls."""

    decay: float = 0.5

    cost = Cost(time=2, memory=1, state=1)

    def init(self, key, dims):
        # The name under which a learned matrix would be decayed.
        mean = jnp.ones((dims.kv_heads, dims.value_dim))
        return {"gate": jnp.ones(()), "statistics": {"kernel": mean, "calls": jnp.int32(0)}}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        past = jax.lax.stop_gradient(params["statistics"])
        full = (keys.seg >= 0)[..., None, None]
        values = jax.lax.stop_gradient(jnp.where(full, keys.v, 0))
        mean = jnp.sum(values, (0, 1)) / jnp.maximum(jnp.sum(full), 1)
        mean = self.decay * past["kernel"] + (1 - self.decay) * mean
        keys = keys._replace(v=keys.v - params["gate"] * past["kernel"].astype(keys.v.dtype))
        out, _ = blockwise.attend(queries, keys, rule, 64)
        return Result(out, (), {"statistics": {"kernel": mean, "calls": past["calls"] + 1}})

    def flops(self, dims, length, causal=True):
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * length**2
