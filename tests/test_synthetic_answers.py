"""Who reads the tokens of a synthetic row finds its answers, by the words of the task alone.

A solver takes the tokens of one row, as a list, and returns (position asked, answer, position of
the answer) in any order. It knows the ids; that nothing else is asked is part of the promise.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlab.errors import UserError
from attnlab.tasks.common_words import CommonWords
from attnlab.tasks.copy import Copy
from attnlab.tasks.frequent_words import FrequentWords
from attnlab.tasks.induction import Induction
from attnlab.tasks.mqar import Mqar
from attnlab.tasks.needle import Needle
from attnlab.tasks.selective_copy import SelectiveCopy
from attnlab.tasks.variables import Variables


def solve_copy(task, row):
    bar = row.index(1)
    string = [token for token in row[:bar] if token]
    assert len(string) == (task.size or len(row) // 2)
    assert row[:bar] == string + [0] * (bar - len(string))
    assert row[bar + 1 :] == string[:-1], "all but the last symbol is written, to the end"
    return [(bar + j, answer, j) for j, answer in enumerate(string)]


def solve_selective_copy(task, row):
    markers = [i for i, token in enumerate(row) if token == 1]
    symbols = [i for i, token in enumerate(row) if token > 1]
    assert len(markers) == len(symbols)
    return [(i, row[j], j) for i, j in zip(markers, symbols)]


def solve_induction(task, row):
    end = len(row) - task.queries
    found = []
    for i in range(end, len(row)):
        assert row.count(row[i]) == 2, "a key stands once, and is asked once"
        j = row.index(row[i]) + 1
        found.append((i, row[j], j))
    return found


def solve_mqar(task, row):
    half, i, place = task.vocab // 2, 0, {}
    while i < len(row) and 0 < row[i] < half <= row[i + 1]:
        place[row[i]] = i + 1
        i += 2
    assert i == 2 * task.pairs * task.passes
    queries = [j for j in range(i, len(row)) if row[j]]
    assert sorted(row[j] for j in queries) == sorted(place), "every key is asked once"
    assert len({row[j] for j in place.values()}) == task.pairs, "no value is written for two keys"
    return [(j, row[place[row[j]]], place[row[j]]) for j in queries]


def solve_needle(task, row):
    needles = [i for i, token in enumerate(row) if token == 0]
    queries = [i for i, token in enumerate(row) if token == 1]
    assert len(queries) == task.queries
    found = []
    for i in queries:
        items = [j + 2 for j in needles if row[j + 1] == row[i + 1]]
        assert len(items) == task.values
        assert row[i + 2 : i + len(items) + 1] == [row[j] for j in items[:-1]]
        found += [(i + 1 + n, row[j], j) for n, j in enumerate(items)]
    return found


def solve_variables(task, row):
    query = row.index(2)
    statements = [i for i, token in enumerate(row) if token in (0, 1)]
    assert len(statements) == task.chains * (task.hops + 1)
    found, wanted, kind = [], row[query + 1], 0
    while after := [i for i in statements if row[i] == kind and row[i + 2] == wanted]:
        (i,) = after
        assert not found or i > found[-1][2], "a name is set before it is used"
        wanted, kind = row[i + 1], 1
        found.append((query + 1 + len(found), wanted, i + 1))
    assert row[query + 2 :] == [answer for _, answer, _ in found[:-1]]
    return found


def solve_common(task, row):
    end = row.index(1)
    counts = Counter(token for token in row[:end] if token)
    common = [word for word in counts if counts[word] == max(counts.values())]  # as first seen
    assert row[end + 1 :] == common[:-1]
    return [(end + n, word, None) for n, word in enumerate(common)]


def solve_frequent(task, row):
    end = row.index(1)
    counts = Counter(token for token in row[:end] if token)
    ranked = sorted(counts, key=lambda word: -counts[word])[: len(row) - end]
    assert row[end + 1 :] == ranked[:-1]
    assert len(ranked) == task.asked
    return [(end + n, word, None) for n, word in enumerate(ranked)]


few = st.integers(1, 3)
TASKS = {
    solve_copy: st.builds(
        Copy, vocab=st.integers(3, 9), size=st.one_of(st.none(), st.integers(1, 9))
    ),
    solve_selective_copy: st.builds(SelectiveCopy, vocab=st.integers(3, 9), symbols=few),
    solve_induction: st.builds(Induction, vocab=st.integers(4, 20), queries=few),
    solve_mqar: st.builds(
        Mqar,
        vocab=st.integers(8, 33),
        pairs=few,
        passes=few,
        power=st.sampled_from([0.01, 1.0, 2.0]),
    ),
    solve_needle: st.builds(
        Needle,
        keys=st.integers(3, 5),
        values=few,
        queries=few,
        depth=st.one_of(st.none(), st.floats(0, 1)),
    ),
    solve_variables: st.builds(Variables, chains=few, hops=st.integers(0, 5), fillers=few),
    solve_common: st.builds(
        CommonWords, common=few, often=st.integers(4, 6), seldom=few, words=st.integers(3, 20)
    ),
    solve_frequent: st.builds(
        FrequentWords, asked=few, power=st.sampled_from([0.5, 1.0, 2.0]), words=st.integers(3, 20)
    ),
}


def accepts(task, length):
    try:
        task.check(length)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("solve", TASKS, ids=lambda solve: solve.__name__)
@given(data=st.data())
def test_a_solver_finds_the_answers_where_they_are_asked_and_nowhere_else(solve, data):
    task = data.draw(TASKS[solve])
    lengths = [task.shortest + more for more in (0, 1, 2, 5, 20, 60, 300)]
    length = data.draw(st.sampled_from([n for n in lengths if accepts(task, n)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    batch = task.rows(rng, 3, length)
    for name, dtype in (("tokens", np.int32), ("targets", np.int32), ("depth", np.float32)):
        if name in batch:
            assert batch[name].dtype == dtype
            assert batch[name].shape == (3, length)
    assert batch["tokens"].min() >= 0
    assert max(batch["tokens"].max(), batch["targets"].max()) < task.vocab_size
    for r, row in enumerate(batch["tokens"].tolist()):
        found = solve(task, row)
        targets = np.full(length, -1)
        depth = np.full(length, np.nan)
        for i, answer, item in found:
            targets[i] = answer
            depth[i] = np.nan if item is None else item / (length - 1)
        assert (targets != -1).sum() == len(found) > 0
        assert (batch["targets"][r] == targets).all()
        if "depth" in batch:
            np.testing.assert_allclose(batch["depth"][r], depth, rtol=1e-6)
        else:
            assert np.isnan(depth).all()


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(("keys", "values", "queries"), [(1, 1, 1), (6, 1, 1), (2, 3, 2)])
def test_a_needle_of_the_first_key_asked_stands_at_the_depth(depth, keys, values, queries):
    task = Needle(keys=keys, values=values, queries=queries, depth=depth)
    length = 200
    batch = task.rows(np.random.default_rng(0), 50, length)
    hay, others = length - task.tail, 2 * (keys * values - 1)
    items = batch["depth"] * (length - 1)
    asked = hay + 1 + np.arange(values)
    nearest = np.abs(items[:, asked] - 2 - depth * (hay - 3)).min(1)
    assert (nearest <= others + 1).all()
    if depth in (0, 1):
        assert nearest.max() < 0.01


def test_noise_replaces_fillers_alone():
    quiet, noisy = (Mqar(vocab=64, pairs=4, noise=noise) for noise in (False, True))
    u = np.random.default_rng(0).random((20, noisy.width(64)))
    plain = quiet.form(u[:, : quiet.width(64)], 64)
    loud = noisy.form(u, 64)
    assert (plain["targets"] == loud["targets"]).all()
    written = plain["tokens"] > 0
    assert (plain["tokens"] == loud["tokens"])[written].all()
    assert loud["tokens"][~written].mean() == pytest.approx(31.5, rel=0.1)
