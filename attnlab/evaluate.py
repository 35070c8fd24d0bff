"""How well a run predicts held-out documents: bits per byte, perplexities, loss by context size.

Each document is scored on its own, from its first token to its end mark. A window of ``length``
tokens moves in strides of ``stride`` and scores the tokens that no earlier window has scored:
``stride = length`` is cheapest, smaller strides give every token more context, at least
``length - stride`` tokens. The last window is moved back so that it is full. With S the sum of the
negative log-likelihoods in nats over all tokens and end marks,

    bits per byte = S / (bytes ln 2),  perplexity per token = e^(S/tokens), per word = e^(S/words)

so that ``bits per byte`` is the size of a real code and may be compared with compressors.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from attnlab.errors import DataError, UserError
from attnlab.files import write_json
from attnlab.model import Transformer
from attnlab.sharding import put
from attnlab.step import token_losses

BOOTSTRAP = 1000


class Stopped(Exception):
    """Scoring was told to stop before its end."""


class Window(NamedTuple):
    """Targets [start, stop) of a document, of which those from ``first`` on are scored."""

    start: int
    first: int
    stop: int


def cut_windows(targets: int, length: int, stride: int) -> Iterator[Window]:
    """Windows that score each of ``targets`` tokens exactly once, ``stride`` by ``stride``."""
    done = 0
    while done < targets:
        stop = min(done + (stride if done else length), targets)
        yield Window(max(0, stop - length), done, stop)
        done = stop


@dataclass
class Scores:
    """Sums over the scored tokens. ``by_context`` and ``counts`` [length]: nats and tokens by how
    many tokens of the window stand before the newest one that is seen."""

    length: int
    documents: list[tuple[str, float, int]] = field(default_factory=list)  # name, nats, bytes
    tokens: int = 0
    words: int = 0
    by_context: np.ndarray = field(init=False)
    counts: np.ndarray = field(init=False)

    def __post_init__(self):
        self.by_context = np.zeros(self.length)
        self.counts = np.zeros(self.length, np.int64)

    @property
    def nats(self) -> float:
        return math.fsum(nats for _, nats, _ in self.documents)

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size in self.documents)

    def summary(self) -> dict[str, Any]:
        """The numbers of the module's docstring; the interval is a bootstrap over documents."""
        nats, size = self.nats, self.bytes
        if not size:
            raise DataError("nothing to score: the split holds no bytes")
        return {
            "bits_per_byte": nats / size / math.log(2),
            "bits_per_byte_95": self._interval(),
            "token_perplexity": _exp(nats / self.tokens),
            "word_perplexity": _exp(nats / self.words) if self.words else None,
            "nats": nats,
            "tokens": self.tokens,
            "bytes": size,
            "words": self.words,
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
        while low < self.length:
            high = min(max(1, 2 * low), self.length)
            if count := int(self.counts[low:high].sum()):
                nats = float(self.by_context[low:high].sum())
                bits = nats / count / math.log(2)
                rows.append({"low": low, "high": high, "tokens": count, "bits_per_token": bits})
            low = high
        return rows


@partial(jax.jit, static_argnums=(0, 3))
def _losses(
    model: Transformer, params: Any, batch: dict[str, jax.Array], out: NamedSharding | None
) -> jax.Array:
    nll = token_losses(model, params, batch).nll
    return nll if out is None else jax.lax.with_sharding_constraint(nll, out)


def score(
    model: Transformer,
    params: Any,
    task: Any,
    split: str,
    *,
    length: int,
    stride: int,
    batch: int = 16,
    tokens: int = 0,
    sharding: NamedSharding | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Scores:
    """Scores the documents of a split (the first ``tokens`` targets when > 0).

    Cost: a forward pass over length / stride tokens for every token of the split. ``sharding``
    spreads the windows over devices; every process must then call. ``stop()`` is asked between
    batches. Raises `UserError` for a stride outside 1..length, `DataError` for an empty split,
    `Stopped`.
    """
    if not 1 <= stride <= length:
        raise UserError(f"stride={stride} must lie between 1 and the length, {length}")
    result, everywhere, share = Scores(length), None, slice(None)
    if sharding is not None:
        batch = -(-batch // sharding.num_devices) * sharding.num_devices
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        part = batch // jax.process_count()
        share = slice(part * jax.process_index(), part * (jax.process_index() + 1))
    rows = _rows(task.documents(split), task, length, stride, tokens, result)
    while chunk := [row for _, row in zip(range(batch), rows)]:
        if stop():
            raise Stopped
        arrays: Any = _stack(chunk, length, batch)
        if sharding is not None:
            arrays = put({name: z[share] for name, z in arrays.items()}, sharding)
        nll = np.asarray(_losses(model, params, arrays, everywhere), np.float64)
        for (index, window, _), values in zip(chunk, nll):
            low, high = window.first - window.start, window.stop - window.start
            name, nats, size = result.documents[index]
            result.documents[index] = (name, nats + float(values[low:high].sum()), size)
            result.by_context[low:high] += values[low:high]
            result.counts[low:high] += 1
    assert int(result.counts.sum()) == result.tokens
    if not result.tokens:
        raise DataError(f"nothing to score: the {split} split is empty")
    return result


def score_split(
    model: Transformer,
    params: Any,
    task: Any,
    config: ConfigDict,
    split: str,
    step: int,
    *,
    length: int = 0,
    stride: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """`score` and `describe_scores` with the settings of `config.evaluate`; options of `score`.

    ``length`` and ``stride`` replace those of the config when they are not 0.
    """
    settings, trained = config.evaluate, config.task.length
    length = length or settings.length or trained
    if length < 1:
        raise UserError(f"length={length} must be at least 1")
    stride = stride or min(settings.stride or length, length)
    batch = max(1, settings.batch * trained // max(length, trained))
    scores = score(model, params, task, split, length=length, stride=stride, batch=batch, **options)
    return describe_scores(scores, task, config, split, stride, step)


def _rows(
    documents: Iterable, task: Any, length: int, stride: int, limit: int, result: Scores
) -> Iterator[tuple[int, Window, np.ndarray]]:
    """Windows with the ids of their document, [boundary, tokens, boundary]; counts as it goes."""
    for document in documents:
        if limit and result.tokens >= limit:
            return
        ids, size, words = document.tokens, document.n_bytes, document.n_words
        line = np.concatenate([[task.boundary], ids, [task.boundary]]).astype(np.int32)
        if limit and len(ids) + 1 > limit - result.tokens:
            ids = ids[: limit - result.tokens]
            text = task.tokenizer.decode(ids)
            line, size, words = line[: len(ids) + 1], len(text), len(text.split())
        index = len(result.documents)
        result.documents.append((document.doc_id, 0.0, size))
        result.tokens += len(line) - 1
        result.words += words
        for window in cut_windows(len(line) - 1, length, stride):
            yield index, window, line


def _stack(chunk: list, length: int, batch: int) -> dict[str, np.ndarray]:
    """A full [batch, length] whatever is left, so that one program serves all."""
    arrays = {name: np.zeros((batch, length), np.int32) for name in ("tokens", "targets")}
    arrays["pos"] = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    arrays["seg"] = np.full((batch, length), -1, np.int32)
    for row, (_, window, line) in enumerate(chunk):
        n = window.stop - window.start
        arrays["tokens"][row, :n] = line[window.start : window.stop]
        arrays["targets"][row, :n] = line[window.start + 1 : window.stop + 1]
        arrays["seg"][row, :n] = 1
    return arrays


def _exp(x: float) -> float | None:
    """None where a float, and JSON, cannot hold it."""
    return math.exp(x) if x < 700 else None


def evaluate(
    workdir: str | Path,
    split: str = "test",
    length: int | None = None,
    stride: int | None = None,
    step: int | None = None,
) -> None:
    """Scores a run, prints the numbers, and writes a JSON file and a plot into
    ``workdir/evaluations``. Lengths beyond the training length are legal. Raises `UserError` for a
    wrong split, length, stride or step, `DataError` for data or checkpoints that cannot be read."""
    from attnlab.plots import plot_contexts
    from attnlab.runs import open_run

    for name, value in (("length", length), ("stride", stride)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    run = open_run(workdir, step)
    task = run.task()
    result = score_split(
        run.model,
        run.params,
        task,
        run.config,
        split,
        run.step,
        length=length or 0,
        stride=stride or 0,
    )
    print(format_scores(result))
    name = f"{split}-length{result['length']}-stride{result['stride']}-step{run.step}"
    folder = run.path / "evaluations"
    try:
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{name}.json", result)
        curve = {f"{split}, {result['length']} tokens": result["loss_by_context"]}
        plot_contexts(curve, folder / f"{name}.png")
    except OSError as error:
        raise DataError(f"cannot write in {folder}: {error.strerror}") from None
    print(f"written: {folder / name}.json and .png")


def describe_scores(
    scores: Scores, task: Any, config: Any, split: str, stride: int, step: int
) -> dict[str, Any]:
    """`Scores.summary` with what is needed to compare it with another: JSON."""
    return {
        "split": split,
        "corpus": task.info().get("corpus", config.task.corpus),
        "tokenizer": task.tokenizer.name,
        "step": step,
        "length": scores.length,
        "stride": stride,
        "trained_length": config.task.length,
        "context": "reset at every document; boundary mark first; end marks are scored",
        "dtype": config.model.dtype,
        "average": bool(config.optimizer.ema),
        **scores.summary(),
        "per_document": [
            {"document": name, "bytes": size, "bits_per_byte": nats / size / math.log(2)}
            for name, nats, size in scores.documents
            if size
        ],
    }


def format_scores(result: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    interval, words = result["bits_per_byte_95"], result["word_perplexity"]
    shown = f"  (95 % over documents: {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    per_token = result["token_perplexity"]
    lines = [
        f"{result['corpus']}, {result['split']} split: {result['documents']} documents, "
        f"{result['bytes']:,} bytes, step {result['step']}",
        f"window {result['length']}, stride {result['stride']} "
        f"(trained on {result['trained_length']})",
        f"  bits per byte     {result['bits_per_byte']:.4f}{shown}",
        f"  token perplexity  {per_token:.4g}" if per_token else "  token perplexity  beyond e^700",
        f"  word perplexity   {words:.4g}" if words else "  word perplexity   no words or > e^700",
        "  context   bits per token",
    ]
    for row in result["loss_by_context"]:
        lines.append(f"  {row['low']:>7}   {row['bits_per_token']:.3f}")
    return "\n".join(lines)
