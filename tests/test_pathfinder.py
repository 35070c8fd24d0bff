"""A Pathfinder image can be read: who follows the dashes from disc to disc finds the label."""

import numpy as np
import pytest
from scipy.ndimage import uniform_filter
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from attnlab.errors import UserError
from attnlab.tasks.pathfinder import GEOMETRY, SEGMENTS, Pathfinder
from attnlab.tasks.synthetic.curves import Curve, grow_distractors, grow_pairs
from attnlab.tasks.synthetic.grid import Field, Grid, distance, ink, lanczos

READING = {32: (50, 1.5, 3), 64: (70, 2.3, 3), 128: (100, 3.2, 5)}
"""Size -> from which brightness on a pixel is lit, how far the next may be, width of a disc."""


def follow(pixels):
    """Whether the two brightest blobs of an image are joined by lit pixels near each other."""
    size = int(len(pixels) ** 0.5)
    level, reach, width = READING[size]
    image = pixels.reshape(size, size).astype(float)
    lit = np.argwhere(image >= level)
    near = cKDTree(lit).query_pairs(reach, output_type="ndarray")
    links = coo_matrix((np.ones(len(near)), near.T), (len(lit), len(lit)))
    part = connected_components(links, directed=False)[1]
    (first, second), _ = find_discs(image, width)
    return part[nearest(lit, first)] == part[nearest(lit, second)]


def find_discs(image, width):
    """Centres of the two brightest blobs, and the image without them."""
    glow, bare, found = uniform_filter(image, width, mode="constant"), image.copy(), []
    for _ in range(2):
        y, x = np.unravel_index(glow.argmax(), glow.shape)
        found.append((y, x))
        for array in (glow, bare):
            array[max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1] = 0
    return found, bare


def nearest(points, place):
    return np.linalg.norm(points - np.array(place), axis=1).argmin()


@pytest.fixture(scope="module")
def images():
    return Pathfinder().rows(np.random.default_rng(3), 300, 1024)


def test_following_the_dashes_finds_every_label(images):
    assert [follow(row) for row in images["tokens"]] == images["targets"].astype(bool).tolist()


@pytest.mark.parametrize(
    ("size", "difficulty"),
    [(32, "easy"), (32, "intermediate"), (64, "hard"), (128, "easy"), (128, "hard")],
)
def test_following_the_dashes_finds_the_label_at_other_sizes(size, difficulty):
    drawn = Pathfinder(difficulty).rows(np.random.default_rng(5), 16, size**2)
    assert drawn["tokens"].shape == (16, size**2)
    assert [follow(row) for row in drawn["tokens"]] == drawn["targets"].astype(bool).tolist()


def test_rows_are_images_of_bytes_with_balanced_labels(images):
    assert {array.dtype for array in images.values()} == {np.dtype(np.int32)}
    assert (images["tokens"].min(), images["tokens"].max()) == (0, 255)
    assert not images["seg"].any()
    assert abs(images["targets"].mean() - 0.5) < 4 * 0.5 / 300**0.5
    assert len(np.unique(images["tokens"], axis=0)) == 300


def test_without_the_discs_the_classes_have_the_same_ink(images):
    bare = [find_discs(row.reshape(32, 32).astype(float), 3)[1] for row in images["tokens"]]
    ink = np.sum(bare, axis=(1, 2))
    joined, apart = ink[images["targets"] == 1], ink[images["targets"] == 0]
    error = (joined.var() / len(joined) + apart.var() / len(apart)) ** 0.5
    assert abs(joined.mean() - apart.mean()) < 4 * error


def drawn(size, difficulty, rows=20, seed=0):
    """The long curves, the short ones, and which of those are drawn, of some images."""
    rng, shape = np.random.default_rng(seed), GEOMETRY[size**2]
    gap = rng.choice(shape.gaps, rows).astype(float)
    pair = grow_pairs(rng, shape, gap, SEGMENTS[difficulty])
    short = grow_distractors(rng, shape, pair[0].field, gap, SEGMENTS[difficulty] // 3)
    return shape, gap, np.stack([curve.dashes for curve in pair], 1), *short


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("difficulty", SEGMENTS)
def test_dashes_and_gaps_have_their_lengths(size, difficulty):
    shape, gap, long, short, exists = drawn(size, difficulty)
    for dashes in (long, short[exists]):
        np.testing.assert_allclose(np.abs(dashes[..., 1] - dashes[..., 0]), shape.dash)
    gaps = np.abs(long[..., 1:, 0] - long[..., :-1, 1])
    np.testing.assert_allclose(gaps, np.broadcast_to(gap[:, None, None], gaps.shape))
    assert exists.sum(1).max() <= shape.distractors
    assert exists.sum(1).mean() > shape.distractors / 4


@pytest.mark.parametrize("size", [32, 64, 128])
def test_curves_turn_less_than_their_continuity_allows(size):
    shape, _, long, *_ = drawn(size, "hard")
    angle = np.angle(long[..., 1] - long[..., 0])
    turn = np.abs((np.diff(angle) + np.pi) % (2 * np.pi) - np.pi)
    assert turn.max() * shape.continuity <= np.pi / 2 + 1e-6
    assert turn.mean() > 0.1


@pytest.mark.parametrize("size", [32, 64, 128])
def test_curves_keep_their_distance_from_each_other_and_from_the_border(size):
    """Points along one curve are a gap and more from every dash of another: within the size of a
    cell of what is promised."""
    shape, _, long, short, exists = drawn(size, "hard", rows=6)
    rough = 1.0
    for i in range(6):
        curves = [*long[i], *np.split(short[i], short.shape[1] // 4)]
        kept = [True, True, *exists[i][::4]]
        curves = [curve for curve, keep in zip(curves, kept) if keep]
        for a, one in enumerate(curves):
            points = one[..., :1] + np.linspace(0, 1, 9) * (one[..., 1:] - one[..., :1])
            assert min(points.real.min(), points.imag.min()) >= 1
            assert max(points.real.max(), points.imag.max()) <= size - 1
            for other in curves[a + 1 :]:
                far = distance(np.tile(points.ravel(), (len(other), 1)), other)
                assert far.min() >= shape.clear - rough


def test_seeds_of_both_curves_stand_the_stated_distance_apart():
    for size in (32, 64, 128):
        shape, _, long, *_ = drawn(size, "easy", rows=5)
        np.testing.assert_allclose(np.abs(long[:, 0, 0, 0] - long[:, 1, 0, 0]), shape.apart)


def test_a_curve_with_nowhere_to_go_is_left_out():
    shape = GEOMETRY[1024]
    field = Field(shape.grid, 2, shape.clear, 1)
    curve = Curve(shape, field, np.ones(2), 2)
    rows = np.arange(2)
    assert curve.begin(rows, np.full(2, 16 + 16j), np.zeros(2)).all()
    field.taken[1] = True
    assert curve.extend(np.random.default_rng(0), rows, 1).tolist() == [0]


def test_places_and_points_agree():
    grid = Grid(8, 2.5)
    points = np.array([0.25 + 0.25j, 7.75 + 3.25j])
    np.testing.assert_allclose(grid.centres(grid.cells(points)), points)
    around = grid.centres(grid.cells(points)[1] + grid.disc(1.5))
    assert np.abs(around - points[1]).max() <= 1.5
    assert len(around) == 29  # whole points within 3 of the origin


def test_ink_is_bright_on_strokes_and_discs_and_dark_elsewhere():
    strokes = np.array([[[4 + 4j, 12 + 4j], [4 + 10j, 12 + 10j]]])
    drawn, discs = np.array([[True, False]]), np.array([[8 + 13j]])
    (image,) = ink(Grid(16, 3), strokes, drawn, discs, thickness=2, radius=1.5, contrast=1.5)
    assert image.shape == (16, 16)
    assert image[3:5, 5:11].min() > 200
    assert image[12:14, 7:9].min() > 200
    assert image[9:11, 0:5].max() < 30
    assert image[:, :2].max() < 30


def test_the_reduction_keeps_a_constant_image():
    np.testing.assert_allclose(lanczos(32) @ np.ones(64), 1)


def test_equal_generators_give_equal_images():
    first, second = (Pathfinder().rows(np.random.default_rng(9), 3, 1024) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_no_rows_are_no_rows():
    assert Pathfinder().rows(np.random.default_rng(0), 0, 1024)["tokens"].shape == (0, 1024)


@pytest.mark.parametrize("options", [{"difficulty": "hrad"}, {"pool": 0}, {"length": 1000}])
def test_options_without_meaning_are_refused_in_one_line(options):
    options = dict(options)
    length = options.pop("length", 1024)

    def built():
        return Pathfinder(**options).build(seed=0, length=length, batch=2)

    with pytest.raises(UserError) as caught:
        built()
    assert "\n" not in str(caught.value)
