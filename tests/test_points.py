"""Targets of the tasks that point, against packages of others and against what tries everything."""

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull
from scipy.spatial import Delaunay as Triangulation

from attnlab import tasks
from attnlab.errors import UserError
from attnlab.tasks.delaunay import Delaunay, collect, find_triangles
from attnlab.tasks.hull import Hull, find_hull, is_simple, measure_area
from attnlab.tasks.synthetic import SPLITS
from attnlab.tasks.synthetic.points import count_points, read_named
from attnlab.tasks.synthetic.splits import split_of
from attnlab.tasks.tsp import Tsp, find_tours, measure_tour

TASKS = [Hull, Delaunay, Tsp]
each = pytest.mark.parametrize("task", TASKS)
seeds = st.integers(0, 2**32 - 1)


def place(seed, n):
    return np.random.default_rng(seed).random((n, 2), np.float32).astype(np.float64)


def rows_of(task, low, high, rows, seed=0):
    return task(low).rows(np.random.default_rng(seed), rows, high)


def named_of(batch):
    """Points, and the indices named, of every row."""
    for points, n, row in zip(batch["tokens"], count_points(batch["seg"]), batch["targets"]):
        yield points[:n].astype(np.float64), read_named(row, n)


def left_of(a, b, points):
    """Twice the area of (a, b, p) for each p, positive to the left."""
    return (b[0] - a[0]) * (points[:, 1] - a[1]) - (b[1] - a[1]) * (points[:, 0] - a[0])


def walk_hull(points):
    """From each corner, the next one is that which has all others on its left."""
    n, after = len(points), {}
    for i, j in permutations(range(n), 2):
        others = [p for p in range(n) if p not in (i, j)]
        if (left_of(points[i], points[j], points[others]) > 0).all():
            after[i] = j
    order = [min(after)]
    while after[order[-1]] != order[0]:
        order.append(after[order[-1]])
    return order


@settings(max_examples=60)
@given(seeds, st.integers(3, 12))
def test_hull_corners_have_all_points_on_their_left(seed, n):
    points = place(seed, n)
    assert find_hull(points).tolist() == walk_hull(points)


@settings(max_examples=40)
@given(seeds, st.integers(3, 80))
def test_hulls_are_those_of_another_program(seed, n):
    points = place(seed, n)
    hull = ConvexHull(points)
    corners = np.roll(hull.vertices, -int(hull.vertices.argmin()))
    assert find_hull(points).tolist() == corners.tolist()
    assert measure_area(points[corners]) == pytest.approx(hull.volume, rel=1e-9)


@settings(max_examples=60)
@given(seeds, st.integers(3, 10))
def test_triangles_are_those_with_an_empty_circumcircle(seed, n):
    points, empty = place(seed, n), []
    for triple in combinations(range(n), 3):
        a, b, c = points[list(triple)]
        centre = np.linalg.solve(2 * np.stack([b - a, c - a]), [b @ b - a @ a, c @ c - a @ a])
        others = np.delete(points, triple, 0)
        if (np.linalg.norm(others - centre, axis=1) > np.linalg.norm(a - centre)).all():
            empty.append(list(triple))
    assert find_triangles(points).tolist() == empty  # combinations come in the canonical order


@settings(max_examples=40)
@given(seeds, st.integers(3, 80))
def test_triangles_are_those_of_another_program_and_as_many_as_euler_says(seed, n):
    points = place(seed, n)
    found = find_triangles(points)
    assert found.tolist() == sorted(np.sort(Triangulation(points).simplices, 1).tolist())
    assert len(found) == 2 * n - 2 - len(find_hull(points))


@settings(max_examples=25)
@given(seeds, st.integers(3, 7))
def test_no_permutation_is_a_shorter_tour(seed, n):
    points = place(seed, n)
    (tour,) = find_tours(points[None])
    shortest = min(measure_tour(points[[0, *rest]]) for rest in permutations(range(1, n)))
    assert sorted(tour) == list(range(n))
    assert measure_tour(points[tour]) == pytest.approx(shortest, rel=1e-12)


@settings(max_examples=6, deadline=None)
@given(seeds, st.integers(8, 12))
def test_no_exchange_of_edges_shortens_a_tour(seed, n):
    points = place(seed, n)
    (tour,) = find_tours(points[None])
    length = measure_tour(points[tour])
    for i, j in combinations(range(n), 2):
        turned = np.concatenate([tour[:i], tour[i : j + 1][::-1], tour[j + 1 :]])
        assert measure_tour(points[turned]) >= length - 1e-12


def test_mean_tours_are_those_published():
    for n, published in ((5, 2.12), (10, 2.87)):
        batch = rows_of(Tsp, n, n, 1000)
        found = Tsp(n).total(Tsp(n).measure(batch, batch["targets"]))
        assert found["tour_length"] == pytest.approx(published, rel=0.02)


@each
@given(seed=seeds, low=st.integers(3, 9), more=st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_rows_are_padded_points_and_sequences_that_end_once(task, seed, low, more):
    high = low + more
    batch = rows_of(task, low, high, 4, seed)
    assert batch["tokens"].dtype == np.float32
    assert batch["targets"].dtype == batch["seg"].dtype == np.int32
    assert batch["targets"].shape == (4, task(low).steps(high))
    for points, seg, targets in zip(*(batch[name] for name in ("tokens", "seg", "targets"))):
        count = int((seg >= 0).sum())
        assert low <= count <= high
        assert (seg == np.where(np.arange(high) < count, 0, -1)).all()
        assert (points[count:] == 0).all()
        assert ((points >= 0) & (points <= 1)).all()
        named = read_named(targets, count)
        assert targets[len(named)] == high
        assert (targets[len(named) + 1 :] == -1).all()


@each
def test_every_number_of_points_is_as_likely(task):
    batch = task(5).write({"count": np.arange(60)[:, None] / 60, "points": np.zeros((60, 20))}, 10)
    assert np.bincount(count_points(batch["seg"])).tolist() == [0] * 5 + [10] * 6


@each
def test_fewer_rows_of_a_stream_are_the_first_of_more(task):
    few, many = (rows_of(task, 4, 8, n) for n in (3, 9))
    assert all((few[name] == many[name][:3]).all() for name in few)


@each
def test_batches_are_pure_and_their_splits_apart(task):
    config = {"name": task.__name__.lower(), "length": 7, "batch": 6, "min_points": 4}
    made = tasks.build(config, seed=3)
    batch, part = made.batch(5), made.batch(5, slice(2, 4))
    assert set(batch) == {"tokens", "targets", "pos", "seg"}
    assert all((batch[name][2:4] == part[name]).all() for name in batch)
    assert not (batch["tokens"] == made.batch(6)["tokens"]).all()
    drawn = {split: made.draw(split, 0, range(40), 7)["tokens"] for split in SPLITS}
    assert all((split_of(rows) == SPLITS.index(split)).all() for split, rows in drawn.items())
    assert len(np.unique(np.concatenate(list(drawn.values())), axis=0)) == 120


@each
def test_targets_score_full_marks_and_nothing_scores_nothing(task):
    batch = rows_of(task, 4, 9, 20)
    right = task(4).measure(batch, batch["targets"])
    assert all((values >= 1 - 1e-12).all() for values in right.values())
    wrong = task(4).measure(batch, np.full_like(batch["targets"], -1))
    assert not any((values > 0).any() for values in wrong.values())
    assert wrong["accuracy"].tolist() == [0] * 20


@each
def test_targets_stand_in_canonical_order(task):
    for points, named in named_of(rows_of(task, 5, 12, 30, seed=2)):
        if task is Delaunay:
            triangles = named.reshape(-1, 3).tolist()
            assert triangles == sorted(map(sorted, triangles))
            continue
        assert named[0] == named.min()
        if task is Tsp:
            assert named[1] < named[-1]
        else:
            assert (left_of(points[named[0]], points[named[1]], points) >= 0).all()


def test_a_polygon_is_the_same_wherever_it_starts_and_whichever_way_round():
    batch, task = rows_of(Hull, 8, 8, 1, seed=1), Hull(8)
    ((_, corners),) = named_of(batch)
    for same in (np.roll(corners, 2), corners[::-1]):
        assert task.measure(batch, same[None])["accuracy"] == 1
    missing = task.measure(batch, corners[None, :-1])
    assert missing["accuracy"] == 0
    assert 0 < missing["area_coverage"] < 1
    swapped = corners[[1, 0, *range(2, len(corners))]]
    assert task.measure(batch, swapped[None])["simple_polygons"] == 0


def test_a_polygon_that_crosses_or_repeats_itself_is_not_simple():
    square = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    assert is_simple(square)
    assert measure_area(square) == 1
    for order in ([0, 2, 1, 3], [0, 1, 2, 0], [0, 1], []):
        assert not is_simple(square[order])


@settings(max_examples=60)
@given(seeds, st.integers(3, 8))
def test_a_polygon_is_simple_where_no_two_edges_cross(seed, n):
    """Edges cross where the system of their lines has a solution inside both."""
    corners, crossed = place(seed, n), False
    for i, j in combinations(range(n), 2):
        if (j - i) % n in (1, n - 1):
            continue
        one, other = corners[(i + 1) % n] - corners[i], corners[(j + 1) % n] - corners[j]
        s, t = np.linalg.solve(np.stack([one, -other], 1), corners[j] - corners[i])
        crossed |= bool(0 < s < 1 and 0 < t < 1)
    assert is_simple(corners) == (not crossed)


@pytest.mark.parametrize(("bad", "told"), [(1, True), (2, False)])
def test_no_area_is_told_where_more_than_one_in_a_hundred_is_no_polygon(bad, told):
    simple = np.arange(100) >= bad
    measures = {"simple_polygons": simple * 1.0, "area_coverage": np.where(simple, 0.5, np.nan)}
    assert Hull().total(measures)["area_coverage"] == (0.5 if told else None)


def test_coverage_counts_triangles_in_any_order_and_no_leftovers():
    batch, task = rows_of(Delaunay, 6, 6, 1), Delaunay(6)
    ((_, named),) = named_of(batch)
    shuffled = named.reshape(-1, 3)[::-1, ::-1].ravel()
    assert task.measure(batch, shuffled[None]) == {"accuracy": 1, "triangle_coverage": 1}
    some = task.measure(batch, shuffled[None, :5])
    assert some == {"accuracy": 0, "triangle_coverage": pytest.approx(3 / len(named))}
    assert collect(np.array([2, 1, 0, 5])) == {(0, 1, 2), (5,)}


def test_a_tour_that_visits_twice_or_stops_early_has_no_length():
    batch, task = rows_of(Tsp, 5, 5, 3), Tsp(5)
    output = np.array([[0, 1, 2, 3, 3, 5], [0, 1, 2, 5, 3, 4], [4, 3, 2, 1, 0, 5]])
    found = task.measure(batch, output)
    lengths = [np.nan, np.nan, measure_tour(batch["tokens"][2, ::-1].astype(np.float64))]
    np.testing.assert_allclose(found["tour_length"], lengths)
    assert task.total(found)["tour_length"] == pytest.approx(lengths[2])
    assert task.total({"tour_length": found["tour_length"][:2]}) == {"tour_length": None}


def test_edges_draw_what_is_named():
    assert Hull().edges(np.array([4, 1, 2])).tolist() == [[4, 1], [1, 2], [2, 4]]
    lines = [[0, 1], [1, 2], [2, 0]]
    assert Delaunay().edges(np.array([0, 1, 2, 7])).tolist() == lines


@each
def test_what_cannot_be_is_refused_in_a_line(task):
    with pytest.raises(UserError, match="min_points must be at least 3") as error:
        task(2)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"length=4: .* needs at least 5"):
        task(5).check(4)


def test_tours_of_many_points_are_refused():
    with pytest.raises(UserError, match="length=13: the shortest tour is found of at most 12"):
        tasks.build({"name": "tsp", "length": 13, "batch": 2, "min_points": 5})


@each
def test_no_rows_are_no_rows(task):
    assert rows_of(task, 5, 8, 0)["targets"].shape == (0, task(5).steps(8))
