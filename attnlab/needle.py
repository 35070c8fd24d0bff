"""Whether a run can recall: a random string, planted in held-out text and begun again at its end.

    boundary, text, S, text ..., first half of S, second half of S

The last half is predicted with everything before it in sight (teacher forced). ``distance`` is how
many tokens the second S begins after the first. Every window is full, so distances are compared at
one context size, with the same texts and the same strings. *absent* is the control: S stands only
at the end, so nothing can be recalled and what is left is guessing. Letters are drawn uniformly, so
that no code can spend fewer than log2 26 = 4.70 bits on one without looking back.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import Array
from attnlab.errors import DataError, UserError
from attnlab.files import write_json
from attnlab.model import Transformer

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
SIZE = 16  # letters of a planted string
SHORTEST = 16  # distance in tokens


class Needles(NamedTuple):
    """``windows`` [R N] int32; the tokens ``windows[r, n - asked[r]:]`` are to be recalled and
    are ``size[r]`` bytes long. The second string begins ``distance`` tokens after the first;
    0 where it was never planted."""

    windows: np.ndarray
    asked: np.ndarray
    size: np.ndarray
    distance: int


def choose_distances(length: int, longest: int) -> list[int]:
    """Powers of four from `SHORTEST`, and the farthest that a window of ``length`` tokens holds,
    for strings of at most ``longest`` tokens. Raises `UserError` where there is room for none."""
    farthest = length - 1 - longest
    first = max(SHORTEST, longest)
    if farthest < first:
        raise UserError(
            f"length={length}: a string of {longest} tokens needs at least {first + longest + 1}"
        )
    powers = [4**e for e in range(farthest.bit_length()) if first <= 4**e < farthest]
    return [*powers, farthest]


def plant_needles(
    text: np.ndarray, tokenizer: Any, length: int, samples: int, seed: int
) -> list[Needles]:
    """One `Needles` a distance, the last of them without any planted string.

    ``text`` [n] holds ids of held-out text. A function of its arguments alone; row r of every
    distance has the same text and the same string. Raises `UserError` for a window too short,
    `DataError` for no text.
    """
    if not len(text):
        raise DataError("nothing to plant a string in: the split holds no text")
    draw = np.random.default_rng((seed, 0x6E65))
    strings = [draw.choice(LETTERS, SIZE).tobytes() for _ in range(samples)]
    coded = [np.asarray(tokenizer.encode(string), np.int32) for string in strings]
    starts = draw.integers(max(1, len(text) - length + 1), size=samples)
    hay = [np.resize(np.roll(text, -start), length - 1).astype(np.int32) for start in starts]
    halves = [len(ids) - len(ids) // 2 for ids in coded]  # given; the rest is asked for
    asked = np.array([len(ids) - half for ids, half in zip(coded, halves)])
    size = np.array([len(tokenizer.decode(ids[half:])) for ids, half in zip(coded, halves)])
    planted = []
    for distance in [*choose_distances(length, max(map(len, coded))), 0]:
        windows = np.empty((samples, length), np.int32)
        for window, text_ids, ids in zip(windows, hay, coded):
            window[:] = np.concatenate([[tokenizer.boundary], text_ids])
            last = length - len(ids)
            window[last:] = ids
            if distance:
                window[last - distance : last - distance + len(ids)] = ids
        planted.append(Needles(windows, asked, size, distance))
    return planted


@partial(jax.jit, static_argnums=(0, 3))
def _recall(model: Transformer, params: Any, tokens: Array, last: int) -> tuple[Array, Array]:
    """Of the ``last`` tokens of each row: nats [R last], and whether each was the likeliest."""
    pos = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    out: Any = model.apply({"params": params}, tokens, pos, jnp.ones_like(pos))
    targets, logits = tokens[:, -last:], out[0][:, -last - 1 : -1]
    logs = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
    return nats, jnp.argmax(logits, -1) == targets


def score_needles(
    model: Transformer, params: Any, needles: Needles, batch: int = 8
) -> dict[str, float]:
    """``accuracy`` over the tokens asked for, ``bits_per_byte`` of them, and the standard error of
    the accuracy over windows. Cost: one forward pass over every window."""
    rows, last = len(needles.windows), int(needles.asked.max())
    nats, right = [], []
    for start in range(0, rows, batch):
        part = needles.windows[start : start + batch]
        full = np.concatenate([part, np.repeat(part[:1], batch - len(part), 0)])
        for found, values in zip((nats, right), _recall(model, params, full, last)):
            found.append(np.asarray(values, np.float64)[: len(part)])
    asked = np.arange(last) >= last - needles.asked[:, None]
    hits = (np.concatenate(right) * asked).sum(1)
    share = hits / needles.asked
    bits = float((np.concatenate(nats) * asked).sum()) / math.log(2)
    return {
        "accuracy": float(hits.sum() / needles.asked.sum()),
        "standard_error": float(share.std() / rows**0.5),
        "bits_per_byte": bits / int(needles.size.sum()),
    }


def measure_recall(
    model: Transformer,
    params: Any,
    task: Any,
    *,
    length: int,
    split: str = "test",
    samples: int = 32,
    seed: int = 0,
    batch: int = 8,
) -> dict[str, Any]:
    """Recall at every distance that fits in ``length`` tokens of a split, and without anything to
    recall: JSON. The same for the same arguments. Raises what `plant_needles` raises."""
    documents = [document.tokens for document in task.documents(split)]
    text = np.concatenate(documents) if documents else np.zeros(0, np.int32)
    planted = plant_needles(text, task.tokenizer, length, samples, seed)
    scores = [score_needles(model, params, needles, batch) for needles in planted]
    return {
        "split": split,
        "length": length,
        "seed": seed,
        "samples": samples,
        "string_bytes": SIZE,
        "guessing_bits_per_byte": math.log2(len(LETTERS)),
        "absent": scores[-1],
        "distances": [{"distance": n.distance, **s} for n, s in zip(planted, scores[:-1])],
    }


def needle(
    workdir: str | Path,
    length: int | None = None,
    samples: int = 32,
    seed: int = 0,
    step: int | None = None,
) -> None:
    """Measures the recall of a run, prints it and writes ``needle.json`` into the workdir.

    Raises `UserError` for a length, number of samples or step that cannot be, `DataError` for data
    or checkpoints that cannot be read.
    """
    from attnlab.runs import open_run

    for name, value in (("length", length), ("samples", samples)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if seed < 0:
        raise UserError(f"seed={seed} must be at least 0")
    run = open_run(workdir, step)
    run.need_text()
    trained, most = run.config.task.length, run.config.evaluate.batch
    length = length or trained
    batch = min(samples, max(1, most * trained // max(length, trained)))
    options = {"length": length, "samples": samples, "seed": seed, "batch": batch}
    result = {"step": run.step, **measure_recall(run.model, run.params, run.task(), **options)}
    print(format_recall(result))
    file = run.path / "needle.json"
    try:
        write_json(file, result)
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror}") from None
    print(f"written: {file}")


def format_recall(result: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    lines = [
        f"recall of {result['string_bytes']} random letters, the second half given the first; "
        f"{result['samples']} windows of {result['length']} tokens, step {result['step']}",
        "  distance   accuracy   bits per byte",
    ]
    rows: Sequence[dict] = [*result["distances"], {"distance": "absent", **result["absent"]}]
    for row in rows:
        lines.append(
            f"  {row['distance']:>8}   {row['accuracy']:8.3f}   {row['bits_per_byte']:13.3f}"
        )
    return "\n".join(lines)
