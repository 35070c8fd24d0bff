"""How well a run predicts held-out documents: bits per byte, perplexities, loss by context size.

Each document is scored on its own, from its first token to its end mark. A window of ``length``
tokens moves in strides of ``stride`` and scores the tokens that no earlier window has scored:
``stride = length`` is cheapest, smaller strides give every token more context, at least
``length - stride`` tokens. The last window is moved back so that it is full.

A model that carries its memory from batch to batch is read as it was trained: the windows of a
document follow each other, ``stride = length``, and each goes on from the memory that the one
before it left; layers that carry nothing see their window. With S the sum of the negative
log-likelihoods in nats over all tokens and end marks,

    bits per byte = S / (bytes ln 2),  perplexity per token = e^(S/tokens), per word = e^(S/words),
    per word with <eos> = e^(S/(words + lines))

so that ``bits per byte`` is the size of a real code and may be compared with compressors, and a
perplexity per word does not depend on the tokenizer. Words are what white space separates in the
raw bytes, and lines their line feeds: `word_perplexity` is what is reported on PG-19, whose
vocabulary is open, `word_perplexity_eos` what is reported on WikiText-103, whose files are words
already, one <eos> a line. Of another count, such as that of the publishers, it is e^(nats/count).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from attnlab import hosts
from attnlab.carry import carries, hand_on, nothing_read, resume
from attnlab.errors import DataError, UserError
from attnlab.files import write_json
from attnlab.model import Transformer
from attnlab.scores import Scores
from attnlab.sharding import put, reading, spread
from attnlab.step import token_losses
from attnlab.windows import Line, in_lanes, side_by_side, stack

CONTEXTS = {
    False: "reset at every document; boundary mark first; end marks are scored",
    True: "memory handed on from window to window, reset at every document; boundary mark first; "
    "end marks are scored",
}


class Stopped(Exception):
    """Scoring was told to stop before its end."""


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _losses(
    model: Transformer,
    params: Any,
    carried: Any,
    batch: dict[str, jax.Array],
    rows: NamedSharding | None,
) -> tuple[jax.Array, Any]:
    """Losses [B N], the same on every device, and what the next batch goes on from."""
    losses = token_losses(model, params, batch, resume(model, carried, batch))
    nll, carried = losses.nll, hand_on(model, losses.extras.memory, batch)
    if rows is not None:
        everywhere = NamedSharding(rows.mesh, PartitionSpec())
        nll = jax.lax.with_sharding_constraint(nll, everywhere)
        carried = jax.tree.map(lambda z: jax.lax.with_sharding_constraint(z, rows), carried)
    return nll, carried


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
    batches. Raises `UserError` for a stride outside 1..length, or below the length where memory is
    carried, `DataError` for an empty split, `Stopped`.
    """
    if not 1 <= stride <= length:
        raise UserError(f"stride={stride} must lie between 1 and the length, {length}")
    result = Scores(length, carries(model))
    if result.carried and stride < length:
        raise UserError(
            f"stride={stride}: this model carries its memory from window to window, which reads "
            f"every token once; use the length, {length}"
        )
    lines = _lines(task.documents(split), task, tokens, result)
    if result.carried:  # one document a row: no more rows than documents
        first = list(itertools.islice(lines, batch))
        lines, batch = itertools.chain(first, lines), max(1, len(first))
    batch, share = spread(batch, sharding)
    if result.carried:
        chunks = in_lanes(lines, length, batch)
    else:
        chunks = side_by_side(lines, length, stride, batch)
    carried = jax.jit(nothing_read, static_argnums=(0, 1), out_shardings=sharding)(model, batch)
    for chunk in chunks:
        if stop():
            raise Stopped
        arrays: Any = stack(chunk, length, batch, result.carried)
        if sharding is not None:
            arrays = put({name: z[share] for name, z in arrays.items()}, sharding)
        nll, carried = _losses(model, params, carried, arrays, sharding)
        for piece, values in zip(chunk, np.asarray(nll, np.float64)):
            if piece is not None:
                start, first, end = piece.window
                context = first if result.carried else first - start
                result.add(piece.document, context, values[first - start : end - start])
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


def _lines(documents: Iterable, task: Any, limit: int, result: Scores) -> Iterator[Line]:
    """Ids of the documents, [boundary, tokens, boundary]; counts as it goes."""
    for document in documents:
        if limit and result.tokens >= limit:
            return
        ids, size = document.tokens, document.n_bytes
        words, ends = document.n_words, document.n_lines
        line = np.concatenate([[task.boundary], ids, [task.boundary]]).astype(np.int32)
        if limit and len(ids) + 1 > limit - result.tokens:
            ids = ids[: limit - result.tokens]
            text = task.tokenizer.decode(ids)
            line, size = line[: len(ids) + 1], len(text)
            words, ends = len(text.split()), text.count(b"\n")
        index = len(result.documents)
        result.documents.append((document.doc_id, 0.0, size))
        result.tokens += len(line) - 1
        result.words += words
        result.lines += ends
        yield index, line


def evaluate(
    workdir: str | Path,
    split: str = "test",
    length: int | None = None,
    stride: int | None = None,
    step: int | None = None,
) -> None:
    """Scores a run, prints the numbers, and writes a JSON file and a plot into
    ``workdir/evaluations``. Lengths beyond the training length are legal. Raises `UserError` for a
    wrong split, length, stride or step, `DataError` for data or checkpoints that cannot be read.
    Several processes share the work."""
    from attnlab.kinds import kind_of
    from attnlab.runs import open_run

    for name, value in (("length", length), ("stride", stride)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    with hosts.meeting(lambda: "run the same command again"):
        run, (_, rows) = open_run(workdir, step), reading()
        task, kind = hosts.in_turn(run.task), kind_of(run.config)
        hosts.agree("the data", task.info())
        result = kind.score(
            run.model,
            run.params,
            task,
            run.config,
            split,
            run.step,
            length=length or 0,
            stride=stride or 0,
            sharding=rows,
        )
    if jax.process_index() > 0:
        return
    print(kind.format(result))
    strided = f"-stride{result['stride']}" if "stride" in result else ""
    name = f"{split}-length{result['length']}{strided}-step{run.step}"
    folder = run.path / "evaluations"
    try:
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{name}.json", result)
        kind.plot(result, folder / f"{name}.png")
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
        "context": CONTEXTS[scores.carried],
        "carried": scores.carried,
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
    ended = result["word_perplexity_eos"]
    shown = f"  (95 % over documents: {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    per_token = result["token_perplexity"]
    lines = [
        f"{result['corpus']}, {result['split']} split: {result['documents']} documents, "
        f"{result['bytes']:,} bytes, step {result['step']}",
        f"window {result['length']}, stride {result['stride']} "
        f"(trained on {result['trained_length']})"
        + (", memory handed on from window to window" if result["carried"] else ""),
        f"  bits per byte     {result['bits_per_byte']:.4f}{shown}",
        f"  token perplexity  {per_token:.4g}" if per_token else "  token perplexity  beyond e^700",
        f"  word perplexity   {words:.4g}  ({ended:.4g} with line ends as words)"
        if words
        else "  word perplexity   no words or > e^700",
        "  context   bits per token",
    ]
    for row in result["loss_by_context"]:
        lines.append(f"  {row['low']:>7}   {row['bits_per_token']:.3f}")
    return "\n".join(lines)
