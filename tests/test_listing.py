"""``attnlab list`` shows every choice by its name and first sentence, and one choice in full."""

import pytest

from attnlab.core import mechanisms, normalisers, positions
from attnlab.listing import show, table


@pytest.mark.parametrize(
    ("kind", "registry"),
    [("mechanisms", mechanisms), ("positions", positions), ("normalisers", normalisers)],
)
def test_every_choice_has_a_row_with_its_first_sentence(capsys, kind, registry):
    show(kind)
    lines = capsys.readouterr().out.splitlines()
    for name in registry.names():
        (row,) = [line for line in lines if line.split()[0] == name]
        assert row.endswith(registry.get(name).__doc__.splitlines()[0])


def test_mechanisms_show_how_their_cost_grows(capsys):
    show("mechanisms")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["softmax", "N^2", "N", "N"] in [row[:4] for row in rows]
    assert ["window", "N", "N", "1"] in [row[:4] for row in rows]


def test_without_a_name_all_kinds_are_shown(capsys):
    show()
    out = capsys.readouterr().out
    kinds = ("mechanisms", "positions", "normalisers", "tasks", "corpora")
    assert all(f"{kind}:" in out for kind in kinds)
    assert "kjv" in out
    assert "text" in out


def test_a_card_has_the_docstring_and_the_options_as_they_are_typed(capsys):
    show("window")
    out = capsys.readouterr().out
    assert "attention=window" in out
    assert "--config.attention.window=256" in out
    assert "Beltagy" in out
    show("none")
    assert "position=none" in capsys.readouterr().out


def test_a_name_of_several_kinds_shows_a_card_of_each(capsys):
    show("softmax")
    out = capsys.readouterr().out
    assert "attention=softmax" in out
    assert "normaliser=softmax" in out
    show("top_k")
    assert "--config.normaliser.k=16" in capsys.readouterr().out


def test_table_aligns_columns():
    assert table([("a", "bbb"), ("cc", "d")]) == "  a   bbb\n  cc  d"
    assert table([]) == ""
