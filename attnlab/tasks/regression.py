"""In-context linear regression: predict y at every x from the examples of a linear map before it.

    x1 y1 x2 y2 ... xL yL        asked at each x: its y, which stands in the next token

A new linear map in every row: w ~ N(0, I/d), x ~ N(0, S), y = w.x + noise N(0, 1), d = ``dim``.
A row of N tokens, N even, holds L = N/2 examples; a token is d + 1 real numbers, (x, 0) or (0, y).
The covariance is S = D^1/2 C D^1/2 with C_ij = ``correlation``^|i-j| and D diagonal, geometric from
largest to smallest with ratio ``condition`` and trace d; at 0 and 1 it is the identity. So
E y² = 1 + noise² whatever S is.

`least_squares` and `ridge` say what can be had: ridge with this penalty is the mean under the prior
of the maps, and nothing that sees the examples alone has a lower mean squared error.

Source: Garg et al., arXiv 2208.01066; the covariances as in He et al., 2503.12734.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnlab.errors import UserError
from attnlab.registry import register
from attnlab.tasks import Recipe
from attnlab.tasks.synthetic import rng_of
from attnlab.tasks.synthetic.rows import Rows


@register
@dataclass(frozen=True)
class Regression(Recipe):
    """``dim`` d of x, standard deviation of the ``noise`` in y, ``condition`` and ``correlation``
    of the covariance of x. All is drawn in float64 and rounded to float32. Raises `UserError` for
    options out of range and odd lengths. Cost: O(L d²) a row."""

    dim: int = 5
    noise: float = 0.1
    condition: float = 1.0
    correlation: float = 0.0

    kind = "regression"
    vocab_size = 0  # tokens are real numbers

    def __post_init__(self):
        if self.dim < 1:
            raise UserError(f"{self}: dim must be at least 1")
        if not (self.noise >= 0 and self.condition >= 1 and -1 < self.correlation < 1):
            raise UserError(
                f"{self}: use noise >= 0, condition >= 1 and correlation between -1 and 1"
            )

    @property
    def features(self) -> int:
        """Numbers of a token."""
        return self.dim + 1

    def build(self, *, seed: int, length: int, batch: int) -> "Examples":
        return Examples(self, seed=seed, length=length, batch=batch)

    def check(self, length: int) -> None:
        """Raises `UserError` for a length that is no number of examples."""
        if length < 2 or length % 2:
            raise UserError(f"length={length}: {self} needs an even one, 2 tokens an example")

    def covariance(self) -> np.ndarray:
        """S [d d]."""
        spread = self.condition ** -np.linspace(0, 1, self.dim)
        root = np.sqrt(spread * self.dim / spread.sum())
        steps = np.abs(np.subtract.outer(np.arange(self.dim), np.arange(self.dim)))
        return root[:, None] * float(self.correlation) ** steps * root

    def rows(
        self, rng: np.random.Generator, rows: int, examples: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The next rows of a stream: x [rows L d] and y [rows L], float32."""
        weights = rng.standard_normal((rows, self.dim)) / np.sqrt(self.dim)
        x = rng.standard_normal((rows, examples, self.dim))
        x = x @ np.linalg.cholesky(self.covariance()).T
        y = np.einsum("rld,rd->rl", x, weights)
        y += self.noise * rng.standard_normal(y.shape)
        return x.astype(np.float32), y.astype(np.float32)


class Examples(Rows):
    """Rows of examples; ``recipe`` is a `Regression`. Tokens are float32 [rows N d+1], targets
    float32 [rows N], NaN where nothing is asked. Splits share no row, since every row has a stream
    of its own."""

    def draw(
        self, split: str, step: int, rows: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        self.recipe.check(length)
        streams = (rng_of(self.seed, split, step, row) for row in rows)
        x, y = map(np.concatenate, zip(*(self.recipe.rows(rng, 1, length // 2) for rng in streams)))
        pos = np.broadcast_to(np.arange(length, dtype=np.int32), (len(x), length))
        return {**write(x, y), "pos": pos, "seg": np.zeros_like(pos)}


def write(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """x [R L d], y [R L] -> ``tokens`` [R 2L d+1] and ``targets`` [R 2L]."""
    R, L, d = x.shape
    tokens = np.zeros((R, 2 * L, d + 1), np.float32)
    tokens[:, 0::2, :d], tokens[:, 1::2, d] = x, y
    targets = np.full((R, 2 * L), np.nan, np.float32)
    targets[:, 0::2] = y
    return {"tokens": tokens, "targets": targets}


def least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x_i . argmin_w Σ_{j<i} (w.x_j − y_j)² for every i, of least norm where many fit: float64
    [R L] from x [R L d], y [R L]. Cost: O(R (L d² + L d³))."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    few = min(2 * x.shape[2], x.shape[1])
    predicted = np.zeros(y.shape)
    for i in range(1, few):  # so few that XᵀX may be singular, or nearly
        weights = np.linalg.pinv(x[:, :i]) @ y[:, :i, None]
        predicted[:, i] = np.einsum("rd,rd->r", x[:, i], weights[..., 0])
    predicted[:, few:] = _solved(x, y, few, 0.0)
    return predicted


def ridge(x: np.ndarray, y: np.ndarray, noise: float) -> np.ndarray:
    """x_i . (XᵀX + d noise² I)⁻¹ Xᵀy over the examples before i, for every i: float64 [R L].
    Without noise it is `least_squares`."""
    if not noise:
        return least_squares(x, y)
    return _solved(x.astype(np.float64), y.astype(np.float64), 0, x.shape[2] * noise**2)


def _solved(x: np.ndarray, y: np.ndarray, first: int, penalty: float) -> np.ndarray:
    """The predictions from ``first`` on by the normal equations: [R L-first]."""
    gram, moment = (_before(z) for z in (x[..., :, None] * x[..., None, :], x * y[..., None]))
    gram = gram[:, first:] + penalty * np.eye(x.shape[2])
    weights = np.linalg.solve(gram, moment[:, first:, :, None])
    return np.einsum("rld,rld->rl", x[:, first:], weights[..., 0])


def _before(z: np.ndarray) -> np.ndarray:
    """Σ_{j<i} z_j along the second axis."""
    return np.concatenate([np.zeros_like(z[:, :1]), np.cumsum(z[:, :-1], 1)], 1)
