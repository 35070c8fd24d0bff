"""Text to typed values and back."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlab.errors import UserError
from attnlab.literals import kind_of, parse, text_of


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("4", int, 4),
        ("-1_000", int, -1000),
        ("3", float, 3.0),
        ("1e-3", float, 1e-3),
        ("True", bool, True),
        ("no", bool, False),
        ("none", str, "none"),
        ("", str, ""),
        ("None", int | None, None),
        ("7", int | None, 7),
        ("null", str | None, None),
        ("deep", str | None, "deep"),
        ("2", int | float, 2),
        ("2.5", int | float, 2.5),
        ("1,2", tuple[int, ...], (1, 2)),
        ("(1, 2.5)", tuple[int, float], (1, 2.5)),
        ("", tuple[int, ...], ()),
        ("a,b", tuple, ("a", "b")),
        ("sum", Literal["sum", "mean"], "sum"),
    ],
)
def test_text_is_read_by_the_type_of_the_field(text, kind, value):
    read = parse(text, kind, "x")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("2.5", int, r"^x=2\.5: expected an integer, such as 4$"),
        ("", int, "expected an integer"),
        ("abc", float, r"expected a number, such as 0\.001"),
        ("maybe", bool, "expected true or false"),
        ("none", int, "expected an integer"),
        ("2.5", int | None, "expected an integer, such as 4 or none"),
        ("1,x", tuple[int, ...], "x=x: expected an integer"),
        ("1,2,3", tuple[int, int], "expected 2 values"),
        ("max", Literal["sum", "mean"], "not one of sum, mean"),
    ],
)
def test_a_wrong_type_names_the_place_the_type_and_an_example(text, kind, message):
    with pytest.raises(UserError, match=message):
        parse(text, kind, "x")


@given(
    st.integers()
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.none()
    | st.text()
    | st.lists(st.integers(), min_size=1).map(tuple)
)
def test_text_of_a_value_reads_back_as_the_value(value):
    assert parse(text_of(value), kind_of(value), "x") == value
