"""Every token is scored once, whatever the windows, batches and lengths; bits are real bits."""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny, trained

from attnlab.config import model_of
from attnlab.data.tokenizers import ByteTokenizer
from attnlab.decode import extend
from attnlab.errors import DataError, UserError
from attnlab.evaluate import Scores, Stopped, evaluate, format_scores, score, score_split
from attnlab.main import main
from attnlab.model import initial_memory
from attnlab.runs import open_run
from attnlab.sharding import batch_sharding, make_mesh
from attnlab.step import init_params
from attnlab.tasks.text import Evaluated
from attnlab.windows import cut_windows, in_lanes, stack

TEXTS = [b"a quick brown fox", b"", b"jumps over the lazy dog, and then some more of it" * 2, b"z"]


class Documents(NamedTuple):
    """A task that only has documents to score."""

    texts: list
    tokenizer: ByteTokenizer = ByteTokenizer()
    boundary: int = 256

    def documents(self, split):
        for number, text in enumerate(self.texts):
            ids = np.frombuffer(text, np.uint8).astype(np.int32)
            yield Evaluated(str(number), ids, len(text), len(text.split()), text.count(b"\n"))

    def info(self):
        return {"corpus": "documents"}


@pytest.fixture(scope="module")
def network():
    """(model, params) that has learnt nothing, but is far from uniform."""
    model = model_of(tiny(), 257)
    params = init_params(model, 0)
    return model, jax.tree.map(lambda p: 2 * p, params)


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_windows_score_every_target_once_and_are_full_whenever_they_can_be(targets, length, data):
    stride = data.draw(st.integers(1, length))
    windows = list(cut_windows(targets, length, stride))
    scored = [target for w in windows for target in range(w.first, w.stop)]
    assert scored == list(range(targets))
    for window in windows:
        assert 0 <= window.start <= window.first < window.stop
        assert window.stop - window.start == min(length, targets)
        # The first window apart, every token has at least this much context.
        assert (
            window.first == 0
            or window.first - window.start >= length - stride
            or (window.stop == targets)
        )


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary(network):
    model, params = network
    flat = jax.tree.map(jnp.zeros_like, params)
    result = score(model, flat, Documents(TEXTS), "test", length=8, stride=4).summary()
    assert result["nats"] / result["tokens"] == pytest.approx(math.log(257), rel=1e-6)
    assert result["token_perplexity"] == pytest.approx(257, rel=1e-5)
    assert all(
        row["bits_per_token"] == pytest.approx(math.log2(257), rel=1e-6)
        for row in result["loss_by_context"]
    )
    assert result["tokens"] == sum(len(text) + 1 for text in TEXTS)
    assert result["bytes"] == sum(map(len, TEXTS))


def test_the_sum_depends_on_neither_batch_nor_devices_nor_the_order_of_documents(network):
    model, params = network

    def nats(texts=TEXTS, **options):
        scores = score(model, params, Documents(texts), "test", length=16, stride=8, **options)
        return scores.nats

    expected = nats(batch=1)
    assert nats(batch=5) == pytest.approx(expected, rel=1e-6)
    assert nats(TEXTS[::-1], batch=5) == pytest.approx(expected, rel=1e-6)
    mesh = make_mesh("data:4,fsdp:2")
    with jax.set_mesh(mesh):
        assert nats(batch=3, sharding=batch_sharding(mesh, 8)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("attention", ["softmax", "window"])
def test_stride_1_gives_what_decoding_token_by_token_gives(attention):
    model = model_of(tiny(attention=attention), 257)
    params = init_params(model, 1)
    text = TEXTS[2][:30]
    scores = score(model, params, Documents([text]), "test", length=32, stride=1)
    ids = np.concatenate([[256], np.frombuffer(text, np.uint8), [256]])
    memory = initial_memory(model.architecture, model.mechanisms, 1, 32)
    nats = []
    for here, following in itertools.pairwise(ids):
        logits, memory = extend(model, params, jnp.full((1, 1), here, jnp.int32), memory)
        nats.append(-float(jax.nn.log_softmax(logits[0])[following]))
    np.testing.assert_allclose(scores.by_context[: len(nats)], nats, atol=1e-4)
    assert scores.nats == pytest.approx(sum(nats), abs=1e-4)


TAIL = str(Path(__file__).parent / "plugged" / "tail.py")


@pytest.fixture(scope="module")
def carrying():
    """(model, params) that hands on a window longer than any of the texts."""
    model = model_of(tiny(f"attention={TAIL}", "attention.window=128"), 257)
    return model, jax.tree.map(lambda p: 2 * p, init_params(model, 0))


def test_with_memory_handed_on_short_windows_score_what_one_long_window_does(carrying):
    model, params = carrying
    whole = score(model, params, Documents(TEXTS), "test", length=128, stride=128)
    mesh = make_mesh("data:4,fsdp:2")
    with jax.set_mesh(mesh):
        options = {"batch": 3, "sharding": batch_sharding(mesh, 8)}
        spread = score(model, params, Documents(TEXTS), "test", length=8, stride=8, **options)
    parts = score(model, params, Documents(TEXTS), "test", length=8, stride=8, batch=2)
    for scores in (parts, spread):
        assert scores.tokens == whole.tokens == scores.counts.sum()
        for (name, nats, size), expected in zip(scores.documents, whole.documents):
            assert (name, size) == (expected[0], expected[2])
            assert nats == pytest.approx(expected[1], rel=1e-5)
        longest = np.flatnonzero(whole.counts)[-1] + 1
        np.testing.assert_array_equal(scores.counts[:longest], whole.counts[:longest])
        np.testing.assert_allclose(scores.by_context[:longest], whole.by_context[:longest], 1e-4)
    assert [row["low"] for row in parts.summary()["loss_by_context"]] == [0, 1, 2, 4, 8, 16, 32, 64]
    forgetful = model_of(tiny("attention=window", "attention.window=128"), 257)
    alone = score(forgetful, params, Documents(TEXTS), "test", length=8, stride=8)
    assert abs(alone.nats - parts.nats) > 1


def test_a_row_reads_its_document_in_order_and_then_takes_the_next():
    lines = [(number, np.arange(count + 1)) for number, count in enumerate((5, 1, 9, 2, 4))]
    chunks = list(in_lanes(lines, 4, 2))
    read = [[piece and (piece.document, piece.window.start) for piece in chunk] for chunk in chunks]
    assert read == [
        [(0, 0), (1, 0)],
        [(0, 4), (2, 0)],
        [(3, 0), (2, 4)],
        [(4, 0), (2, 8)],
    ]
    arrays = stack(chunks[1], 4, 2, carried=True)
    assert arrays["pos"].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert arrays["seg"].tolist() == [[1, -1, -1, -1], [3, 3, 3, 3]]
    assert arrays["targets"].tolist() == [[5, 0, 0, 0], [1, 2, 3, 4]]
    assert list(in_lanes([], 4, 2)) == []


def test_memory_that_is_handed_on_reads_every_token_once(carrying):
    with pytest.raises(UserError, match=r"stride=4: this model carries .* use the length, 8"):
        score(*carrying, Documents(TEXTS), "test", length=8, stride=4)
    with pytest.raises(DataError, match="the test split is empty"):
        score(*carrying, Documents([]), "test", length=8, stride=8)
    first = score(*carrying, Documents(TEXTS), "test", length=8, stride=8, tokens=30)
    assert first.tokens == first.counts.sum() == 30


def test_the_result_says_whether_memory_was_handed_on(carrying):
    for (model, params), carried in ((carrying, True), (carrying, False)):
        config = tiny(f"attention={TAIL}" if carried else "attention=window")
        if not carried:
            model = model_of(config, 257)
        result = score_split(model, params, Documents(TEXTS), config, "test", 1, length=8)
        assert result["carried"] is carried
        assert ("memory handed on" in result["context"]) is carried
        assert ("memory handed on" in format_scores(result)) is carried
        json.dumps(result, allow_nan=False)


def test_a_corpus_twice_has_the_metrics_of_the_corpus_once(network):
    once, twice = (
        score(*network, Documents(texts), "test", length=16, stride=16).summary()
        for texts in (TEXTS, TEXTS + TEXTS)
    )
    for name in ("bits_per_byte", "token_perplexity", "word_perplexity"):
        assert once[name] == pytest.approx(twice[name], rel=1e-6)
    assert twice["tokens"] == 2 * once["tokens"]


def test_bits_and_perplexities_are_one_number_in_three_units(network):
    result = score(*network, Documents(TEXTS), "test", length=16, stride=8).summary()
    nats = result["nats"]
    assert result["bits_per_byte"] * result["bytes"] * math.log(2) == pytest.approx(nats)
    assert math.log(result["token_perplexity"]) * result["tokens"] == pytest.approx(nats)
    assert math.log(result["word_perplexity"]) * result["words"] == pytest.approx(nats)
    by_context = sum(row["tokens"] * row["bits_per_token"] for row in result["loss_by_context"])
    assert by_context * math.log(2) == pytest.approx(nats)
    assert sum(row["tokens"] for row in result["loss_by_context"]) == result["tokens"]
    lows = [row["low"] for row in result["loss_by_context"]]
    assert lows == [0, 1, 2, 4, 8]


PAGE = b" = Valkyria = \n \n The game <unk> of @-@ war ,\twon\n"
"""Pre-tokenised text: 3 words, none and 8, and 3 line ends."""


def test_perplexities_per_word_are_those_of_a_hand_count(network):
    model, params = network
    flat = jax.tree.map(jnp.zeros_like, params)
    texts = [PAGE, b"two words"]
    result = score(model, flat, Documents(texts), "test", length=8, stride=8).summary()
    assert (result["words"], result["lines"]) == (3 + 8 + 2, 3)
    nats = (len(PAGE) + 1 + len(b"two words") + 1) * math.log(257)
    assert result["word_perplexity"] == pytest.approx(math.exp(nats / 13), rel=1e-4)
    assert result["word_perplexity_eos"] == pytest.approx(math.exp(nats / 16), rel=1e-4)
    first = " = Valkyria = \n \n The gam"
    part = score(
        model, flat, Documents(texts), "test", length=8, stride=8, tokens=len(first)
    ).summary()
    assert (part["words"], part["lines"]) == (3 + 2, 2)


def test_a_perplexity_per_word_does_not_depend_on_the_tokenizer():
    """The same nats in one or two tokens are the same per word, and not per token."""
    by_tokens = []
    for tokens in (100, 200):
        scores = Scores(4)
        scores.documents, scores.tokens = [("a", 300.0, 500)], tokens
        scores.words, scores.lines = 90, 10
        by_tokens.append(scores.summary())
    for name in ("word_perplexity", "word_perplexity_eos", "bits_per_byte"):
        assert by_tokens[0][name] == by_tokens[1][name]
    assert by_tokens[0]["token_perplexity"] == pytest.approx(math.exp(3))
    assert by_tokens[0]["word_perplexity_eos"] == pytest.approx(math.exp(3))
    assert by_tokens[1]["token_perplexity"] == pytest.approx(math.exp(1.5))


@pytest.mark.parametrize("limit", [1, 18, 19, 60, 10_000])
def test_a_limit_scores_exactly_the_first_tokens(network, limit):
    whole = score(*network, Documents(TEXTS), "test", length=16, stride=16)
    part = score(*network, Documents(TEXTS), "test", length=16, stride=16, tokens=limit)
    assert part.tokens == min(limit, whole.tokens)
    assert part.bytes <= part.tokens
    if limit >= 60:
        # Documents before the cut are scored whole.
        assert part.documents[0][1] == pytest.approx(whole.documents[0][1])


def test_the_interval_holds_the_mean_and_shrinks_with_more_documents():
    def interval(count):
        scores, draw = Scores(4), np.random.default_rng(1)
        scores.documents = [(str(i), 1000 * draw.uniform(1, 2), 1000) for i in range(count)]
        scores.tokens = 1000 * count
        result = scores.summary()
        low, high = result["bits_per_byte_95"]
        assert low < result["bits_per_byte"] < high
        return high - low

    assert interval(100) < 0.5 * interval(10)
    one = Scores(4)
    one.documents, one.tokens = [("a", 5.0, 4)], 5
    assert one.summary()["bits_per_byte_95"] is None


def test_what_json_cannot_hold_is_null():
    scores = Scores(4)
    scores.documents, scores.tokens, scores.words = [("a", 1e6, 4)], 5, 1
    result = scores.summary()
    assert result["token_perplexity"] is None
    assert result["word_perplexity"] is None
    json.dumps(result, allow_nan=False)


def test_nothing_to_score_is_a_data_error(network):
    with pytest.raises(DataError, match="the test split is empty"):
        score(*network, Documents([]), "test", length=8, stride=8)
    with pytest.raises(DataError, match="holds no bytes"):
        score(*network, Documents([b""]), "test", length=8, stride=8).summary()


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_outside_the_window_is_refused(network, stride):
    with pytest.raises(UserError, match="must lie between 1 and the length, 8"):
        score(*network, Documents(TEXTS), "test", length=8, stride=stride)


def test_scoring_stops_when_told(network):
    with pytest.raises(Stopped):
        score(*network, Documents(TEXTS), "test", length=8, stride=8, stop=lambda: True)


def test_a_run_is_scored_beyond_its_training_length_and_the_result_says_so(capsys):
    path = trained()
    evaluate(path, length=80, stride=40)
    result = json.loads((path / "evaluations/test-length80-stride40-step12.json").read_text())
    assert (result["length"], result["stride"], result["trained_length"]) == (80, 40, 32)
    assert (path / "evaluations/test-length80-stride40-step12.png").exists()
    assert "bits per byte" in capsys.readouterr().out
    run = open_run(path)
    again = score_split(*run[2:4], run.task(), run.config, "test", 12, length=80, stride=40)
    assert again["nats"] == pytest.approx(result["nats"], rel=1e-6)


def test_the_command_agrees_with_what_training_wrote(capsys):
    path = trained()
    assert main(["evaluate", f"--workdir={path}"]) == 0
    written = json.loads((path / "evaluations/test-length32-stride32-step12.json").read_text())
    assert written["nats"] == pytest.approx(json.loads((path / "test.json").read_text())["nats"])
    assert main(["evaluate", f"--workdir={path}", "--step=4", "--split=validation"]) == 0
    assert (path / "evaluations/validation-length32-stride32-step4.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--length=0"], "length=0 must be at least 1"),
        (["--length=-3"], "length=-3 must be at least 1"),
        (["--stride=33"], "stride=33 must lie between 1 and the length, 32"),
        (["--stride=0"], "stride=0 must be at least 1"),
        (["--split=tset"], "did you mean 'test'?"),
        (["--step=5"], "no checkpoint 5"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(capsys, flags, message):
    path = trained()
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={path}", *flags]) == 2
    output = capsys.readouterr()
    assert message in output.err.splitlines()[-1]
    assert "Traceback" not in output.err
    assert output.out == ""
