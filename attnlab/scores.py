"""What scoring adds up, and the numbers that come of it; `attnlab.evaluate` says what they mean."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from attnlab.errors import DataError

BOOTSTRAP = 1000


class Headline(NamedTuple):
    """The one number of a result: its key, what it is called, and whether more of it is better."""

    key: str
    title: str
    higher: bool


HEADLINES = (
    Headline("bits_per_byte", "bits per byte", False),
    Headline("accuracy", "accuracy", True),
    Headline("normalised_squared_error", "normalised squared error", False),
)


def headline_of(result: Mapping[str, Any]) -> Headline:
    """The headline of a result as a kind of task gives it. Raises `KeyError` where it has none."""
    for headline in HEADLINES:
        if headline.key in result:
            return headline
    raise KeyError(f"none of {', '.join(h.key for h in HEADLINES)}")


@dataclass
class Scores:
    """Sums over the scored tokens. ``by_context`` and ``counts`` [length, or more]: nats and tokens
    by how many tokens were read before the newest one: of the window, or, where memory is
    ``carried``, of the document, however much of them the memory still holds."""

    length: int
    carried: bool = False
    documents: list[tuple[str, float, int]] = field(default_factory=list)  # name, nats, bytes
    tokens: int = 0
    words: int = 0
    lines: int = 0
    by_context: np.ndarray = field(init=False)
    counts: np.ndarray = field(init=False)

    def __post_init__(self):
        self.by_context = np.zeros(self.length)
        self.counts = np.zeros(self.length, np.int64)

    def add(self, document: int, context: int, nats: np.ndarray) -> None:
        """Counts neighbouring tokens of a document, before the first of which ``context`` tokens
        were read."""
        name, sum_before, size = self.documents[document]
        self.documents[document] = (name, sum_before + float(nats.sum()), size)
        stop, room = context + len(nats), len(self.counts)
        if stop > room:
            more = (0, max(stop, 2 * room) - room)
            self.by_context, self.counts = np.pad(self.by_context, more), np.pad(self.counts, more)
        self.by_context[context:stop] += nats
        self.counts[context:stop] += 1

    @property
    def nats(self) -> float:
        return math.fsum(nats for _, nats, _ in self.documents)

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size in self.documents)

    def summary(self) -> dict[str, Any]:
        """What `attnlab.evaluate` defines; the interval is a bootstrap over documents."""
        nats, size, units = self.nats, self.bytes, self.words + self.lines
        if not size:
            raise DataError("nothing to score: the split holds no bytes")
        return {
            "bits_per_byte": nats / size / math.log(2),
            "bits_per_byte_95": self._interval(),
            "token_perplexity": _exp(nats / self.tokens),
            "word_perplexity": _exp(nats / self.words) if self.words else None,
            "word_perplexity_eos": _exp(nats / units) if units else None,
            "nats": nats,
            "tokens": self.tokens,
            "bytes": size,
            "words": self.words,
            "lines": self.lines,
            "documents": len(self.documents),
            "loss_by_context": self._curve(),
        }

    def _interval(self) -> list[float] | None:
        pairs = np.array([(nats, size) for _, nats, size in self.documents if size])
        if len(pairs) < 2:
            return None
        draws = np.random.default_rng(0).integers(len(pairs), size=(BOOTSTRAP, len(pairs)))
        nats, size = pairs[draws].sum(1).T
        return [float(q) for q in np.quantile(nats / size / math.log(2), (0.025, 0.975))]

    def _curve(self) -> list[dict[str, float]]:
        """Mean bits per token for context sizes in [low, high), doubling."""
        rows, low = [], 0
        end = max([self.length, *(np.flatnonzero(self.counts)[-1:] + 1)])
        while low < end:
            high = int(min(max(1, 2 * low), end))
            if count := int(self.counts[low:high].sum()):
                nats = float(self.by_context[low:high].sum())
                bits = nats / count / math.log(2)
                rows.append({"low": low, "high": high, "tokens": count, "bits_per_token": bits})
            low = high
        return rows


def _exp(x: float) -> float | None:
    """None where a float, and JSON, cannot hold it."""
    return math.exp(x) if x < 700 else None
