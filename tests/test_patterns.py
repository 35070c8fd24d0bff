"""Names, parts and layers of an attention, from a command line to mechanisms and back."""

import pytest

from attnlab.config import base, from_json, kinds, mechanisms_of, to_json
from attnlab.core import mechanisms
from attnlab.entries import parse_entries
from attnlab.errors import UserError
from attnlab.listing import show
from attnlab.overrides import override


def made(name, *parts, **fields):
    return mechanisms.get(name)(parts=tuple(mechanisms.get(p)() for p in parts), **fields)


@pytest.mark.parametrize(
    ("attention", "wanted"),
    [
        ("heads", made("heads", "window", "softmax")),
        ("heads:window:lsh", made("heads", "window", "lsh")),
        ("heads:window:window:softmax", made("heads", "window", "window", "softmax")),
        ("paths:window:routing:infini", made("paths", "window", "routing", "infini")),
    ],
)
def test_parts_stand_after_colons_and_survive_the_file(attention, wanted):
    config = base(attention)
    assert mechanisms_of(config) == (wanted,) * config.model.layers
    assert from_json(to_json(config)) == config
    assert hash(mechanisms_of(from_json(to_json(config)))) == hash(mechanisms_of(config))


def test_options_of_whole_and_parts_are_typed_after_their_names():
    config = base("heads:window:softmax")
    override(config, "attention.sizes", "1,3")
    override(config, "attention.window.window", "9")
    window, softmax = mechanisms.get("window")(9), mechanisms.get("softmax")()
    wanted = mechanisms.get("heads")((window, softmax), sizes=(1, 3))
    assert mechanisms_of(config)[0] == wanted
    assert mechanisms_of(from_json(to_json(config)))[0] == wanted
    assert kinds(config)["attention.softmax.tile"] == int | None


def test_combinations_are_layers_of_a_pattern_like_others():
    config = base("heads:window:routing+transformer_xl")
    assert set(config.attention) == {"name", "heads", "window", "routing", "transformer_xl"}
    override(config, "attention.heads.sizes", "3,1")
    first, second = mechanisms_of(config)[:2]
    assert first == made("heads", "window", "routing", sizes=(3, 1))
    assert second == mechanisms.get("transformer_xl")()
    assert config.task.packing == "stream"
    assert base("paths:window:infini").task.packing == "stream"


def test_comparisons_take_combinations():
    entries = parse_entries("softmax,half=heads:window:softmax,heads:here/own.py:lsh+window")
    assert list(entries) == ["softmax", "half", "heads:own:lsh+window"]
    assert entries["half"] == "heads:window:softmax"


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("window:softmax", "window is not made of parts; write heads:window:softmax"),
        ("heads:paths:window", "paths may not itself be a part"),
        ("heads:windw", "did you mean 'window'"),
        ("heads:", "a name is missing"),
        ("window+", "a name is missing"),
    ],
)
def test_what_is_no_attention_is_refused_in_one_line(attention, message):
    with pytest.raises(UserError, match=message) as error:
        base(attention)
    assert "\n" not in str(error.value)


def test_a_part_may_not_be_called_like_an_option(tmp_path):
    own = tmp_path / "sizes.py"
    own.write_text(
        "from attnlab.mechanisms.softmax import Softmax\n"
        "from attnlab.registry import register\n\n"
        "@register\nclass Sizes(Softmax):\n    pass\n"
    )
    with pytest.raises(UserError, match="'sizes' is both a part and an option"):
        base(f"heads:{own}:softmax")


def test_the_card_explains_the_colons(capsys):
    show("heads")
    card = capsys.readouterr().out
    assert "attention=heads:window:lsh" in card
    assert "--config.attention.sizes=" in card
    assert "attention.parts" not in card
