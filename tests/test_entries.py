"""Entries differ in their attention and in nothing else."""

import json

import pytest
from tiny import tiny

from attnlab.config import flat, from_json, mechanisms_of, to_json
from attnlab.core import mechanisms
from attnlab.entries import differences, folder_of, make_configs, parse_entries
from attnlab.errors import UserError


@pytest.fixture
def carrier(tmp_path):
    """A mechanism that carries state from batch to batch."""
    path = tmp_path / "carrier.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from attnlab.mechanisms.softmax import Softmax\n"
        "from attnlab.registry import register\n\n"
        "@register\n@dataclass(frozen=True)\nclass Carrier(Softmax):\n    carries = True\n"
    )
    return str(path)


def test_entries_are_names_patterns_and_labels():
    assert parse_entries("softmax, window,wide=window,window+softmax,here/strided.py") == {
        "softmax": "softmax",
        "window": "window",
        "wide": "window",
        "window+softmax": "window+softmax",
        "strided": "here/strided.py",
    }


@pytest.mark.parametrize(
    "text", ["", "softmax,", "=softmax", "a=", "softmax,softmax", "a=window,A=b"]
)
def test_entries_that_are_empty_or_share_a_name_are_refused(text):
    with pytest.raises(UserError, match="for example"):
        parse_entries(text)


@pytest.mark.parametrize("label", ["../up", "a/b", "heads:window:softmax", "a b", "window+softmax"])
def test_a_folder_is_one_plain_name(label):
    assert "/" not in folder_of(label)
    assert folder_of(label) not in (".", "..")


def test_every_mechanism_is_trained_under_the_same_config():
    config = tiny("optimizer.learning_rate=0.5", "seed=3")
    names = mechanisms.names()
    configs, _ = make_configs(config, parse_entries(",".join([*names, "window+softmax"])))
    assert differences(list(configs.values())) == []
    for label, each in configs.items():
        assert each.attention.name == label
        assert flat(each)["optimizer.learning_rate"] == 0.5
        assert from_json(to_json(each)) == each
    changed = tiny("optimizer.learning_rate=0.5", "seed=4", "model.width=8")
    assert sorted(differences([config, changed])) == ["model.width", "seed"]


def test_a_field_reaches_its_entry_and_the_patterns_it_is_part_of():
    entries = parse_entries("softmax,window,wide=window,mix=window+softmax")
    given = [
        ("attention.window.window", "8"),
        ("attention.wide.window", "16"),
        ("attention.wide.sinks", "1"),
        ("attention.mix.softmax.tile", "4"),
    ]
    configs, _ = make_configs(tiny(), entries, given)
    assert configs["window"].attention.window == 8
    assert (configs["wide"].attention.window, configs["wide"].attention.sinks) == (16, 1)
    assert configs["mix"].attention.window.window == 8
    assert configs["mix"].attention.softmax.tile == 4
    assert configs["softmax"].attention.tile is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("attention.windw.window", "did you mean 'window'"),
        ("attention.window.windw", "unknown config field"),
        ("attention.window", "write --config.attention.ENTRY.FIELD=VALUE"),
        ("attention.name", "write --config.attention.ENTRY.FIELD=VALUE"),
        ("attention", "write --config.attention.ENTRY.FIELD=VALUE"),
    ],
)
def test_a_field_of_no_entry_is_refused(path, message):
    with pytest.raises(UserError, match=message):
        make_configs(tiny(), parse_entries("softmax,window"), [(path, "1")])


def test_options_of_the_config_stay_with_their_mechanism():
    config = tiny("attention.window=4", attention="window")
    configs, _ = make_configs(config, parse_entries("softmax,window"))
    assert configs["window"].attention.window == 4
    assert config.attention.window == 4


def test_one_that_carries_state_sets_stream_for_all_and_says_so(carrier):
    configs, notes = make_configs(tiny(), parse_entries(f"softmax,{carrier}"))
    assert {each.task.packing for each in configs.values()} == {"stream"}
    assert differences(list(configs.values())) == []
    assert notes[0] == "task.packing is stream for every entry, because of carrier"
    assert "the state of carrier;" in notes[1]
    assert make_configs(tiny("task.packing=stream"), parse_entries(carrier))[1] == notes[1:]
    assert make_configs(tiny(), parse_entries("softmax,window"))[1] == []


def test_a_config_survives_being_written(carrier):
    configs, _ = make_configs(tiny(), parse_entries(f"window+softmax,{carrier}"))
    for each in configs.values():
        again = from_json(to_json(each))
        assert json.loads(to_json(again)) == json.loads(to_json(each))
        assert mechanisms_of(again) == mechanisms_of(each)
