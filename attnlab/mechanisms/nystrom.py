"""Nyströmformer: softmax attention interpolated from landmarks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import documents
from attnlab.errors import UserError
from attnlab.mechanisms.linear import rotated
from attnlab.refusals import refuse_bias, refuse_causal, refuse_normaliser, refuse_taps
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Nystrom(Mechanism):
    """Softmax attention interpolated from m landmarks, the means of m stretches; for encoders.

        F = softmax(Q K̃ᵀ / √D),  A = softmax(Q̃ K̃ᵀ / √D),  B = softmax(Q̃ Kᵀ / √D),
        out = F A⁺ (B V) + conv(V)

    Q̃, K̃ are the means over m = ``landmarks`` stretches of ⌈L/m⌉ tokens of a document of L tokens.
    A⁺ takes ``steps`` of Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z))) from Z = Aᵀ / (‖A‖₁ ‖A‖∞),
    with the norms of each document and head apart. Few steps regularise: with m well below L the
    exact inverse is worse. conv is a learned depthwise convolution over ``kernel`` tokens (0 for
    none). F and B hold every token, so no mask can make the product causal.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N m (D + E) + steps m³) time a document of a row, O(N m) memory. Raises `UserError` for
    landmarks < 1, steps < 1, kernel < 0 or even and, when called, for causal rules, biased
    positions and taps on logits. Source: Xiong et al., arXiv 2102.03902.
    """

    landmarks: int = 64
    steps: int = 6
    kernel: int = 33

    cost = Cost(time=1, memory=1, state=1)

    def __post_init__(self):
        if self.landmarks < 1 or self.steps < 1 or self.kernel < 0:
            raise UserError(f"nystrom: {self}; use landmarks >= 1, steps >= 1, kernel >= 0")
        if self.kernel and self.kernel % 2 == 0:
            raise UserError(f"nystrom: kernel={self.kernel} has no middle; use an odd number or 0")

    def init(self, key: Array, dims: Dims):
        if not self.kernel:
            return {}
        return {"convolution": 0.02 * jax.random.normal(key, (dims.heads, self.kernel))}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        q, k, v = _prepare(queries, keys, rule)
        out = documents.sum_over(self._document, queries.seg, keys.seg, (params, q, k, v))
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def _document(self, own_q: Array, own_k: Array, arrays) -> Array:
        """The outputs of one document of each row, 0 elsewhere: f32 [B N H E]."""
        params, q, k, v = arrays
        soft_q, soft_k = (self._stretches(own) for own in (own_q, own_k))
        q_mark, q_full = _means(q, soft_q)
        k_mark, k_full = _means(k, soft_k)
        both = q_full[:, :, None] & k_full[:, None]
        same = jnp.eye(self.landmarks, dtype=bool)
        front = _softmax("bnhd,bmhd->bhnm", q, k_mark, own_q[:, :, None] & k_full[:, None])
        back = _softmax("bmhd,bnhd->bhmn", q_mark, k, q_full[:, :, None] & own_k[:, None])
        middle = _softmax("bnhd,bmhd->bhnm", q_mark, k_mark, both)
        middle += same & ~(q_full[:, :, None] & both.any(-1, keepdims=True))[:, None]
        inverse = pseudo_inverse(middle, self.steps)
        mixed = jnp.einsum("bhmn,bnhe->bhme", back, v)
        out = jnp.einsum("bhnm,bhmk,bhke->bnhe", front, inverse, mixed)
        if self.kernel:
            out += convolve(
                jnp.where(own_k[..., None, None], v, 0), params["convolution"], q.shape[1]
            )
        return jnp.where(own_q[..., None, None], out, 0)

    def _stretches(self, own: Array) -> Array:
        """Which landmark each token of the document belongs to, one-hot f32 [B N m]."""
        count = jnp.sum(own, 1, keepdims=True)
        length = jnp.maximum(-(-count // self.landmarks), 1)
        mark = (jnp.cumsum(own, 1) - 1) // length
        return jax.nn.one_hot(jnp.where(own, mark, -1), self.landmarks)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        q, k, v = _prepare(queries, keys, rule)
        own_k = rule.allowed(queries, keys)  # [B N M]: each query's own document
        own_q = (queries.seg[:, :, None] == queries.seg[:, None]) & (queries.seg >= 0)[:, None]

        def one(asked, q_own, k_own):
            return self._document(q_own, k_own, (params, q, k, v))[jnp.arange(len(q)), asked]

        asked = jnp.arange(q.shape[1])
        out = jax.vmap(one, (0, 1, 1), 1)(asked, own_q, own_k)
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        m = self.landmarks
        sides = 2.0 * length * m * (2 * dims.key_dim + 2 * dims.value_dim)
        means = 2.0 * length * m * dims.key_dim * 2
        inverse = 2.0 * m**2 * (dims.key_dim + dims.value_dim) + 8.0 * self.steps * m**3
        convolved = 2.0 * length * self.kernel * dims.value_dim
        return dims.heads * (sides + means + inverse + convolved)

    @classmethod
    def examples(cls):
        return (cls(landmarks=4, kernel=3), cls(landmarks=6, steps=2, kernel=0))


def pseudo_inverse(a: Array, steps: int) -> Array:
    """A⁺ of row-stochastic matrices [... m m] by the iteration of Razavi et al. (of third order).

    Each matrix has norms of its own. Cost: 4 m³ multiply-adds a step.
    """
    rows = jnp.max(jnp.sum(jnp.abs(a), -1), -1)[..., None, None]
    columns = jnp.max(jnp.sum(jnp.abs(a), -2), -1)[..., None, None]
    z, eye = a.swapaxes(-1, -2) / (rows * columns), jnp.eye(a.shape[-1])
    for _ in range(steps):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def convolve(v: Array, kernel: Array, length: int) -> Array:
    """Σ_t kernel[h, t] v[n + t − middle, h]: [B M H E], [H T] -> [B length H E], 0 from M on.

    As one product a stretch of C tokens with the band matrix K[h, n, m] = kernel[h, m − n], of the
    C + T − 1 tokens around it: XLA convolves head by head on a CPU at a hundredth of that speed.
    """
    (B, M, H, E), T = v.shape, kernel.shape[1]
    here = min(M, length)
    C = max(64, T - 1)
    tiles = -(-here // C)
    ahead = jnp.arange(C + T - 1) - jnp.arange(C)[:, None]
    band = jnp.where((ahead >= 0) & (ahead < T), kernel[:, jnp.clip(ahead, 0, T - 1)], 0)
    after = max(0, (tiles + 1) * C - T // 2 - M)
    v = jnp.pad(v, [(0, 0), (T // 2, after), (0, 0), (0, 0)])[:, : (tiles + 1) * C]
    v = v.reshape(B, tiles + 1, C, H, E)
    around = jnp.concatenate([v[:, :-1], v[:, 1:, : T - 1]], 2)
    out = jnp.einsum("hnm,bjmhe->bjnhe", band, around).reshape(B, tiles * C, H, E)[:, :here]
    return jnp.pad(out, [(0, 0), (0, length - here), (0, 0), (0, 0)])


def _prepare(queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array, Array]:
    """Scaled queries, and keys and values repeated to all heads: f32 [B N H ...]."""
    why = "every landmark is a mean over tokens of all times"
    refuse_causal("nystrom", rule, why, ("long_short", "slots", "favor"))
    refuse_normaliser("nystrom", rule)
    refuse_bias("nystrom", rule)
    refuse_taps("nystrom", rule)
    q, k = rotated(queries, keys, rule)
    scale = q.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    repeats = q.shape[2] // k.shape[2]
    v = keys.cleared().v.astype(jnp.float32)
    return q * scale, jnp.repeat(k, repeats, 2), jnp.repeat(v, repeats, 2)


def _means(z: Array, marks: Array) -> tuple[Array, Array]:
    """Means of [B N H D] over the tokens of each landmark [B N m]: [B m H D], and which exist."""
    count = jnp.sum(marks, 1)
    sums = jnp.einsum("bnhd,bnm->bmhd", z, marks)
    return sums / jnp.maximum(count, 1)[..., None, None], count > 0


def _softmax(product: str, a: Array, b: Array, seen: Array) -> Array:
    """softmax over the last axis of a product, where ``seen`` [B N M]; rows without any are 0."""
    z = jnp.where(seen[:, None], jnp.einsum(product, a, b), MASK)
    return jnp.where(seen[:, None], jax.nn.softmax(z, -1), 0)
