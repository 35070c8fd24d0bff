"""What synthetic tasks promise: pure rows, the chances they state, splits that share nothing."""

from collections import Counter
from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from attnlab.errors import UserError
from attnlab.tasks.common_words import CommonWords
from attnlab.tasks.copy import Copy
from attnlab.tasks.frequent_words import FrequentWords
from attnlab.tasks.induction import Induction
from attnlab.tasks.mqar import Mqar
from attnlab.tasks.needle import Needle
from attnlab.tasks.selective_copy import SelectiveCopy
from attnlab.tasks.synthetic import SPLITS, rng_of
from attnlab.tasks.synthetic.choices import choose_weighted, shuffle
from attnlab.tasks.synthetic.splits import draw, split_of
from attnlab.tasks.variables import Variables

TASKS = [
    Copy(),
    Copy(size=5),
    SelectiveCopy(),
    Induction(queries=8),
    Mqar(),
    Mqar(passes=2, noise=True),
    Needle(),
    Needle(keys=4, values=3, queries=2),
    Variables(chains=3),
    CommonWords(common=3, often=9),
    FrequentWords(),
]
each = pytest.mark.parametrize("task", TASKS, ids=str)


def same(one, other):
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)


def likely(counts, chances):
    """Counts that are not far from what was promised: such a test fails once in 10,000 seeds."""
    chances = np.asarray(chances) / np.sum(chances)
    return chisquare(counts, np.sum(counts) * chances).pvalue > 1e-4


@each
@given(seed=st.integers(0, 2**40), rows=st.integers(1, 5))
def test_fewer_rows_of_a_stream_are_the_first_of_more(task, seed, rows):
    few, many = (task.rows(np.random.default_rng(seed), n, 128) for n in (rows, 6))
    assert same(few, {name: values[:rows] for name, values in many.items()})


@each
def test_a_stream_goes_on_where_it_stopped(task):
    rng = np.random.default_rng(1)
    first, second = (task.rows(rng, 2, 128)["tokens"] for _ in range(2))
    whole = task.rows(np.random.default_rng(1), 4, 128)["tokens"]
    assert (np.concatenate([first, second]) == whole).all()
    assert len(np.unique(whole, axis=0)) == 4


@each
@pytest.mark.parametrize("split", SPLITS)
def test_a_drawn_row_depends_on_its_number_alone(task, split):
    options = {"seed": 3, "split": split, "step": 7}
    batch = draw(task, 96, rows=range(6), **options)
    assert same(batch, draw(task, 96, rows=range(6), **options))
    alone = draw(task, 96, rows=[4], **options)
    assert same(alone, {name: values[4:5] for name, values in batch.items()})
    assert (split_of(batch["tokens"]) == SPLITS.index(split)).all()
    for other in ({"seed": 4}, {"step": 8}):
        moved = draw(task, 96, rows=range(6), **options | other)
        assert (moved["tokens"] != batch["tokens"]).any(1).all()


@pytest.mark.parametrize(
    ("task", "length", "instances"),
    [(Copy(vocab=5, size=4), 8, 3**4), (SelectiveCopy(vocab=4, symbols=2), 12, 45 * 4)],
)
def test_every_instance_of_a_small_space_is_in_one_split(task, length, instances):
    seen = []
    for split in SPLITS:
        batches = [
            draw(task, length, seed=seed, split=split, step=0, rows=range(800)) for seed in (0, 1)
        ]
        seen.append({row.tobytes() for batch in batches for row in batch["tokens"]})
    assert all(seen)
    assert not any(a & b for a, b in combinations(seen, 2))
    assert len(set.union(*seen)) == instances


@each
def test_no_rows_are_rows(task):
    drawn = draw(task, 96, seed=0, split="test", step=0, rows=[])
    assert drawn["tokens"].shape == drawn["targets"].shape == (0, 96)


def test_a_split_gets_its_tenth():
    tokens = Copy().rows(np.random.default_rng(0), 5000, 64)["tokens"]
    assert likely(np.bincount(split_of(tokens), minlength=3), [8, 1, 1])


def test_a_split_without_instances_is_refused():
    task = Copy(vocab=3, size=1)
    (only,) = split_of(task.rows(np.random.default_rng(0), 1, 2)["tokens"])
    empty = next(split for split in SPLITS if split != SPLITS[only])
    with pytest.raises(UserError, match=f"split={empty}: none of") as error:
        draw(task, 2, seed=0, split=empty, step=0, rows=[0])
    assert "\n" not in str(error.value)


def test_streams_differ_and_wrong_ones_are_refused():
    keys = list(product((0, 1), SPLITS, (0, 1), (0, 1)))
    assert len({rng_of(*key).random() for key in keys}) == len(keys)
    with pytest.raises(UserError, match="did you mean 'train'"):
        rng_of(0, "trian", 0, 0)
    for wrong in ((-1, "test", 0, 0), (0, "test", -1, 0), (0, "test", 0, -1)):
        with pytest.raises(UserError, match="must be at least 0"):
            rng_of(*wrong)


@each
def test_the_shortest_length_is_served_and_every_shorter_one_refused(task):
    assert task.shortest > 1
    for length in range(task.shortest + 40):
        if length < task.shortest:
            with pytest.raises(UserError, match=f"length={length}: .* needs at least") as error:
                task.rows(np.random.default_rng(0), 1, length)
            assert "\n" not in str(error.value)
        elif not isinstance(task, FrequentWords | Mqar):
            assert (task.rows(np.random.default_rng(0), 2, length)["targets"] >= 0).any(1).all()


@pytest.mark.parametrize(
    ("task", "options", "mend"),
    [
        (Copy, {"vocab": 2}, "vocab must be at least 3"),
        (Copy, {"size": 0}, "size must be"),
        (SelectiveCopy, {"symbols": 0}, "symbols must be"),
        (SelectiveCopy, {"vocab": 2}, "vocab must be"),
        (Induction, {"vocab": 4, "queries": 4}, "vocab must be at least 5"),
        (Mqar, {"pairs": 0}, "pairs must be"),
        (Mqar, {"vocab": 17, "pairs": 8}, "vocab must be at least 18"),
        (Mqar, {"power": 0.0}, "power must be above 0"),
        (Mqar, {"passes": 0}, "passes must be"),
        (Needle, {"keys": 2, "queries": 3}, "queries must be at most keys, 2"),
        (Needle, {"keys": 33}, "names must be at least keys, 33"),
        (Needle, {"keys": 7, "values": 5}, "numbers must be .* 35"),
        (Needle, {"depth": 1.5}, "depth must be in 0 .. 1"),
        (Needle, {"values": 0}, "values must be"),
        (Variables, {"hops": -1}, "hops must be at least 0"),
        (Variables, {"chains": 7}, "names must be .* 35"),
        (Variables, {"chains": 5, "numbers": 4}, "numbers must be at least 5"),
        (CommonWords, {"often": 3}, "often must be above seldom"),
        (CommonWords, {"words": 9}, "words must be at least 10"),
        (FrequentWords, {"asked": 0}, "asked must be"),
        (FrequentWords, {"words": 2}, "words must be at least 3"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_line(task, options, mend):
    with pytest.raises(UserError, match=mend) as error:
        task(**options)
    assert "\n" not in str(error.value)


def test_lengths_with_no_answer_are_refused():
    with pytest.raises(UserError, match=r"length=33: Mqar\(.* needs an even one"):
        Mqar().check(33)
    with pytest.raises(UserError, match=r"length=20: FrequentWords\(.* equal counts"):
        FrequentWords().check(20)


def test_a_shuffle_begins_with_every_draw_alike():
    drawn = Counter(map(tuple, shuffle(np.random.default_rng(0).random((12000, 2)), 4)[:, :2]))
    assert likely([drawn[pair] for pair in permutations(range(4), 2)], np.ones(12))
    whole = shuffle(np.random.default_rng(1).random((50, 2)), 4)
    assert (np.sort(whole) == np.arange(4)).all()


def test_weighted_draws_take_one_after_the_other():
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    drawn = choose_weighted(np.random.default_rng(0).random((20000, 4)), weights, 2)
    counts = Counter(map(tuple, drawn))
    pairs = list(permutations(range(4), 2))
    chances = [weights[i] * weights[j] / (1 - weights[i]) for i, j in pairs]
    assert likely([counts[pair] for pair in pairs], chances)


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gaps_of_mqar_fall_as_stated(power):
    task, N = Mqar(pairs=4, power=power), 48
    tokens = task.rows(np.random.default_rng(0), 8000, N)["tokens"]
    asked = tokens[:, 8:] == tokens[:, :1]  # the first key is the first to draw its slot
    gaps = np.bincount(np.argmax(asked, axis=1) // 2, minlength=20)
    weights = [power * (g + 1) ** (power - 1) for g in range(20)]
    assert likely(gaps, weights)
    assert task.chances(N) == pytest.approx(np.array(weights) / sum(weights))


def test_depths_are_uniform():
    N = 64
    passkey = Needle().rows(np.random.default_rng(0), 9000, N)["depth"][:, -1] * (N - 1)
    assert likely(np.bincount(np.rint(passkey).astype(int) - 2, minlength=60), np.ones(60))
    # Two distinct places of 10, seen from the earlier one: 9, 8, ... ways to put the other.
    scattered = SelectiveCopy(symbols=2).rows(np.random.default_rng(0), 9000, 12)["depth"]
    first = np.rint(scattered[:, 10] * 11).astype(int)
    assert likely(np.bincount(first, minlength=9), np.arange(9, 0, -1))


@pytest.mark.parametrize(("task", "length"), [(Needle(keys=2), 10), (Variables(2, 0), 10)])
def test_every_arrangement_of_needles_and_fillers_is_as_likely(task, length):
    tokens = task.rows(np.random.default_rng(0), 6000, length)["tokens"]
    begins = Counter(tuple(np.flatnonzero(row[:8] == 0)) for row in tokens)
    expected = [(a, b + 2) for a, b in combinations(range(4), 2)]
    assert set(begins) == set(expected)
    assert likely([begins[places] for places in expected], np.ones(6))


def test_keys_and_values_of_induction_are_any_two_symbols():
    batch = Induction(vocab=5).rows(np.random.default_rng(0), 6000, 9)
    drawn = Counter(zip(batch["tokens"][:, -1], batch["targets"][:, -1]))
    assert likely([drawn[pair] for pair in permutations(range(5), 2)], np.ones(20))


def test_which_word_is_common_and_where_it_stands_is_drawn_anew():
    task = CommonWords(common=1, often=2, seldom=1, words=4)
    batch = task.rows(np.random.default_rng(0), 8000, 6)
    assert likely(np.bincount(batch["targets"][:, -1] - 2, minlength=4), np.ones(4))
    common = batch["tokens"][:, :5] == batch["targets"][:, -1:]
    pairs = Counter(tuple(np.flatnonzero(row)) for row in common)
    assert likely([pairs[places] for places in combinations(range(5), 2)], np.ones(10))


def test_frequent_words_fall_with_their_rank():
    counts = FrequentWords(power=2.0, words=3).counts(1003)
    total = 1 + 1 / 4 + 1 / 9 + 1 / 16
    assert counts.tolist() == [int(1000 / rank**2 / total) for rank in (2, 3, 4)]
