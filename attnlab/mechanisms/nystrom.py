"""Nyströmformer: softmax attention interpolated from landmarks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import documents, kept
from attnlab.errors import UserError
from attnlab.mechanisms.linear import rotated
from attnlab.products import collected, mixed, scores
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
        (q_mark, q_full), (k_mark, k_full) = _means(q, soft_q), _means(k, soft_k)
        q, k, v = (z.swapaxes(1, 2) for z in (q, k, jnp.where(own_k[..., None, None], v, 0)))
        both = q_full[:, :, None] & k_full[:, None]
        same = jnp.eye(self.landmarks, dtype=bool)
        front = kept.softmax(scores(q, k_mark), k_full[:, None, None], -1)
        # Tokens first here too: pairs that lie alike need no copy for any of their products.
        back = kept.softmax(scores(k, q_mark), own_k[:, None, :, None] & q_full[:, None, None], -2)
        middle = kept.softmax(scores(q_mark, k_mark), both[:, None], -1)
        alone = same & ~(q_full[:, :, None] & both.any(-1, keepdims=True))
        middle = jnp.where(alone[:, None], 1, middle)
        out = mixed(front, pseudo_inverse(middle, self.steps) @ collected(back, v))
        if self.kernel:
            out += _part(convolve(v, params["convolution"]), 0, q.shape[2])
        return jnp.where(own_q[..., None, None], out.swapaxes(1, 2), 0)

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
            return self._literally(params, q, k, v, q_own, k_own)[jnp.arange(len(q)), asked]

        asked = jnp.arange(q.shape[1])
        out = jax.vmap(one, (0, 1, 1), 1)(asked, own_q, own_k)
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def _literally(self, params, q: Array, k: Array, v: Array, own_q: Array, own_k: Array) -> Array:
        """`_document` by the equations."""

        def means(z: Array, marks: Array) -> Array:
            sums = jnp.einsum("bnhd,bnm->bmhd", z, marks)
            return sums / jnp.maximum(jnp.sum(marks, 1), 1)[..., None, None]

        def softmax(a: Array, b: Array, own_a: Array, own_b: Array) -> Array:
            seen = (own_a[:, :, None] & own_b[:, None])[:, None]
            z = jnp.where(seen, jnp.einsum("bnhd,bmhd->bhnm", a, b), MASK)
            return jnp.where(seen, jax.nn.softmax(z, -1), 0)

        marks_q, marks_k = (self._stretches(own) for own in (own_q, own_k))
        marked_q, marked_k = means(q, marks_q), means(k, marks_k)
        full_q, full_k = (jnp.any(marks > 0, 1) for marks in (marks_q, marks_k))
        middle = softmax(marked_q, marked_k, full_q, full_k)
        # What does not exist is a matrix of 1 apart, which its inverse leaves apart.
        middle += jnp.eye(self.landmarks) * (jnp.sum(middle, -1, keepdims=True) == 0)
        front, back = softmax(q, marked_k, own_q, full_k), softmax(marked_q, k, full_q, own_k)
        inverse = pseudo_inverse(middle, self.steps)
        out = jnp.einsum("bhnm,bhmk,bhkl,blhe->bnhe", front, inverse, back, v)
        if self.kernel:
            own = jnp.where(own_k[..., None, None], v, 0)
            own = jnp.pad(
                own, [(0, 0), (self.kernel // 2, self.kernel + q.shape[1]), (0, 0), (0, 0)]
            )
            for t, weight in enumerate(params["convolution"].T):
                out += own[:, t : t + q.shape[1]] * weight[:, None]
        return jnp.where(own_q[..., None, None], out, 0)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        m = self.landmarks
        sides = 2.0 * length * m * (2 * dims.key_dim + 2 * dims.value_dim)
        means = 2.0 * length * m * dims.key_dim * 2
        inverse = 2.0 * m**2 * (dims.key_dim + dims.value_dim) + 8.0 * self.steps * m**3
        return dims.heads * (sides + means + inverse)

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


@jax.custom_vjp
def convolve(v: Array, kernel: Array) -> Array:
    """Σ_t kernel[h, t] v[n + t − middle, h]: [B H N E], [H T] -> [B H N E].

    As sums of some shifted arrays, each of which XLA forms in one pass: on a CPU it convolves head
    by head at a hundredth of that speed.
    """
    (_, _, N, _), T = v.shape, kernel.shape[1]
    turns = -(-T // 64)
    taps = -(-T // turns)
    kernel = jnp.pad(kernel, [(0, 0), (0, turns * taps - T)])
    around = _part(v, -(T // 2), N + turns * taps - 1)

    def turn(i: Array, total: Array) -> Array:
        weights = lax.dynamic_slice_in_dim(kernel, i * taps, taps, 1)[..., None, None]
        near = lax.dynamic_slice_in_dim(around, i * taps, N + taps - 1, 2)
        return sum((weights[:, t] * near[:, :, t : t + N] for t in range(taps)), total)

    return lax.fori_loop(0, turns, turn, jnp.zeros_like(v))


def _convolve_backward(given: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    """The gradient of a kernel sums over the diagonals of products of stretches of C tokens with
    the C + T − 1 around them."""
    v, kernel = given
    (B, H, N, E), T = v.shape, kernel.shape[1]
    C = max(64, T - 1)
    tiles = -(-N // C)
    asked = _part(d_out, 0, tiles * C).reshape(B, H, tiles, C, E)
    around = _part(v, -(T // 2), (tiles + 1) * C).reshape(B, H, tiles + 1, C, E)
    around = around[:, :, :-1], around[:, :, 1:, : T - 1]
    band = jnp.concatenate([jnp.sum(scores(asked, z), (0, 2)) for z in around], -1)
    n = jnp.arange(C)[:, None]
    d_kernel = jnp.sum(band[:, n, n + jnp.arange(T)], 1)
    return convolve(d_out, kernel[:, ::-1]), d_kernel


convolve.defvjp(lambda v, kernel: (convolve(v, kernel), (v, kernel)), _convolve_backward)


def _part(z: Array, start: int, count: int) -> Array:
    """``count`` tokens from ``start`` <= 0 on, 0 where there are none: [B H N E]."""
    after = max(0, start + count - z.shape[2])
    return jnp.pad(z, [(0, 0), (0, 0), (-start, after), (0, 0)])[:, :, :count]


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
    """Means of [B N H D] over the tokens of each landmark [B N m]: [B H m D], and which exist."""
    count = jnp.sum(marks, 1)
    sums = collected(marks, z.reshape(*z.shape[:2], -1))
    means = sums / jnp.maximum(count, 1)[..., None]
    return means.reshape(*means.shape[:2], *z.shape[2:]).swapaxes(1, 2), count > 0
