"""The label of a ListOps expression is what its string evaluates to, read by another program."""

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.errors import UserError
from attnlab.tasks.listops import (
    CLOSE,
    NAMES,
    PAD,
    VOCABULARY,
    ListOps,
    baselines,
    shallow_value,
)

OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def parse(words, depth=1):
    """Value of the expression at the head of ``words``, which is consumed; its depth; and how many
    arguments its operators have, in all."""
    word = words.pop(0)
    if word.isdigit():
        return int(word), depth, []
    arguments, deepest, counts = [], depth, []
    while words[0] != "]":
        value, below, inner = parse(words, depth + 1)
        arguments.append(value)
        deepest = max(deepest, below)
        counts += inner
    words.pop(0)
    return OPERATORS[word](arguments), deepest, [*counts, len(arguments)]


def words_of(row):
    return [NAMES[token] for token in row if token != PAD]


@pytest.fixture(scope="module")
def published():
    return [ListOps().rows(np.random.default_rng(seed), 3000, 2000) for seed in (0, 1)]


def test_labels_of_the_published_task_are_the_values_of_their_strings(published):
    for row, label in zip(published[0]["tokens"][:1000], published[0]["targets"]):
        words = words_of(row)
        value, depth, counts = parse(words)
        assert value == label
        assert not words
        assert depth <= 10
        assert min(counts) >= 2
        assert max(counts) <= 10


def test_lengths_are_those_measured_for_the_published_grammar(published):
    length = np.concatenate([part["seg"] >= 0 for part in published]).sum(1)
    assert length.min() > 500
    assert length.max() < 2000
    assert length.mean() == pytest.approx(1030, abs=25)
    assert np.percentile(length, (25, 50, 75)) == pytest.approx((693, 955, 1289), abs=45)


def test_labels_are_distributed_as_measured_for_the_published_grammar(published):
    share = (
        np.bincount(np.concatenate([part["targets"] for part in published]), minlength=10) / 6000
    )
    assert share[0] == pytest.approx(0.174, abs=0.02)
    assert share[9] == pytest.approx(0.159, abs=0.02)
    assert share[1:9].min() > 0.06
    assert share[1:9].max() < 0.11


def test_baselines_are_those_measured_for_the_published_grammar(published):
    found = baselines(*published)
    assert found["majority"] == pytest.approx(0.174, abs=0.03)
    assert found["root"] == pytest.approx(0.371, abs=0.03)
    assert found["shallow"] == pytest.approx(0.488, abs=0.03)


def test_nodes_follow_the_grammar_where_no_length_is_refused():
    """All trees: a quarter are operators; kinds, digits and numbers of arguments are uniform."""
    part = ListOps(max_depth=3, max_args=4, min_length=0).rows(
        np.random.default_rng(0), 20_000, 100
    )
    first = part["tokens"][:, 0]
    assert (first >= 10).mean() == pytest.approx(0.25, abs=0.015)
    assert np.bincount(first[first >= 10] - 10) / (first >= 10).sum() == pytest.approx(
        [0.25] * 4, abs=0.03
    )
    assert np.bincount(first[first < 10]) / (first < 10).sum() == pytest.approx(
        [0.1] * 10, abs=0.01
    )
    rows = part["tokens"][first >= 10][:2000]
    counts = np.bincount([parse(words_of(row))[2][-1] for row in rows])
    assert counts[:2].sum() == 0
    assert counts[2:] / counts.sum() == pytest.approx([1 / 3] * 3, abs=0.04)


@settings(max_examples=30)
@given(
    st.integers(2, 6), st.integers(2, 6), st.integers(0, 3), st.integers(5, 40), st.integers(0, 99)
)
def test_every_option_gives_rows_that_keep_to_it(depth, args, low, room, seed):
    part = ListOps(depth, args, low).rows(np.random.default_rng(seed), 8, low + room)
    assert part["tokens"].shape == part["seg"].shape == (8, low + room)
    assert {array.dtype for array in part.values()} == {np.dtype(np.int32)}
    for row, seg, label in zip(part["tokens"], part["seg"], part["targets"]):
        words = words_of(row)
        assert low < len(words) < low + room
        assert (seg == np.where(np.arange(len(row)) < len(words), 0, -1)).all()
        value, deepest, counts = parse(words)
        assert (value, words) == (label, [])
        assert deepest <= depth
        assert max(counts, default=2) <= args


def test_equal_generators_give_equal_rows():
    first, second = (ListOps().rows(np.random.default_rng(7), 5, 2000) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_no_rows_are_no_rows():
    assert ListOps().rows(np.random.default_rng(0), 0, 2000)["tokens"].shape == (0, 2000)


def test_the_shallow_value_is_the_operator_on_direct_digits():
    texts = {
        "[MAX 3 [MIN 9 8 ] 5 ]": 5,
        "[MIN 3 [MIN 1 0 ] 5 ]": 3,
        "[MED 1 [MIN 9 8 ] 4 ]": 2,
        "[SM 7 8 [MIN 9 8 ] ]": 5,
        "[SM [MAX 9 8 ] [MIN 9 8 ] ]": 10,
        "4": 4,
    }
    tokens = np.full((len(texts), 12), PAD)
    for row, text in zip(tokens, texts):
        words = text.split()
        row[: len(words)] = [NAMES.index(word) for word in words]
    assert shallow_value(tokens).tolist() == list(texts.values())


def test_ids_are_dense():
    assert len(NAMES) == PAD == VOCABULARY - 1
    assert NAMES[CLOSE] == "]"


@pytest.mark.parametrize(
    "options",
    [
        {"max_depth": 0},
        {"max_args": 1},
        {"min_length": -1},
        {"length": 501},
        {"max_depth": 3},  # 2 + 10 (2 + 10) = 122 tokens at most
    ],
)
def test_options_without_meaning_are_refused_in_one_line(options):
    options = dict(options)
    length = options.pop("length", 2000)

    def built():
        ListOps(**options).check(length)

    with pytest.raises(UserError) as caught:
        built()
    assert "\n" not in str(caught.value)


def test_lengths_that_no_tree_reaches_in_practice_are_refused(monkeypatch):
    monkeypatch.setattr("attnlab.tasks.listops.PATIENCE", 3)
    with pytest.raises(UserError, match="none of"):
        ListOps(max_depth=4, min_length=1200).rows(np.random.default_rng(0), 1, 2000)
