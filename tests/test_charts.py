"""Pictures of a comparison are drawn whatever was measured, and their names can be read."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlab.charts import format_power, plot_context, plot_costs, plot_overview, plot_recall
from attnlab.labels import MARKER, Box, choose_place
from attnlab.plots import COLOURS, ink_of, style_of

FRAME = Box(0, 0, 400, 300)


def entry(label, bits, **found):
    rows = [{"low": 2**k, "high": 2 ** (k + 1), "bits_per_token": bits + 1 / k} for k in (1, 2, 3)]
    distances = [{"distance": d, "accuracy": 0.5} for d in (16, 64)]
    measured = {
        "test": {"bits_per_byte": bits, "loss_by_context": rows},
        "needle": {"distances": distances, "absent": {"accuracy": 0.04}},
        "tokens_per_second": 1e3,
        "attention_flops": 1e6,
        "decoding_bytes": 1e5,
    }
    return {"label": label, **measured, **found}


@pytest.mark.parametrize(
    "entries",
    [
        [{"label": "failed"}],
        [entry("one", 2.0)],
        [entry("same", 2.0), entry("place", 2.0)],
        [entry("a", 2.0, needle=None), entry("b", float("inf"), tokens_per_second=None)],
        [entry(f"mechanism {n}", 2 + n / 99) for n in range(40)],
    ],
    ids=["nothing", "one", "same", "partly", "forty"],
)
def test_any_comparison_is_drawn(tmp_path, entries):
    plot_overview(entries, tmp_path / "overview.png", "title")
    plot_costs(entries, tmp_path / "costs.png")
    plot_context(entries, tmp_path / "context.png")
    plot_recall(entries, tmp_path / "recall.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 4


def test_thirty_six_lines_look_different():
    looks = [style_of(i) for i in range(3 * len(COLOURS))]
    assert len({(s["color"], s["ls"], s["marker"]) for s in looks}) == len(looks) == 36


def test_names_are_dark_enough_to_be_read():
    for i in range(len(COLOURS)):
        r, g, b = (int(ink_of(i)[k : k + 2], 16) for k in (1, 3, 5))
        assert 0.3 * r + 0.59 * g + 0.11 * b <= 0.53 * 255


@given(st.lists(st.tuples(st.floats(60, 340), st.floats(40, 260)), min_size=1, max_size=10))
def test_names_keep_clear_of_points_and_of_each_other(centres):
    points = [Box(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in centres]
    taken = list(points)
    for centre in centres:
        taken.append(choose_place(centre, 50, 10, taken, FRAME))
    names = taken[len(points) :]
    for box in names:
        assert box.outside(FRAME) < 1e-6
        assert all(box.overlap(point) < 1e-6 for point in points)
    assert all(a.overlap(b) < 1e-6 for a, b in itertools.combinations(names, 2))


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1500, "1.5k"), (2e6, "2M"), (3.25e9, "3.25G")]
)
def test_numbers_on_an_axis_are_short(number, text):
    assert format_power(number) == text
