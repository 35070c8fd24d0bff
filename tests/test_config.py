"""The config: sections from dataclasses, patterns over layers, JSON, fairness."""

import json
import textwrap

import pytest

from attnlab import config as configs
from attnlab.config import (
    architecture_of,
    base,
    diff,
    from_json,
    kinds,
    mechanisms_of,
    model_of,
    normaliser_of,
    parse_arg,
    position_of,
    section,
    to_json,
)
from attnlab.core import mechanisms, normalisers, positions
from attnlab.errors import UserError
from attnlab.limits import validate
from attnlab.overrides import load, override


@pytest.fixture
def mine(tmp_path):
    """A mechanism of the user's own with a field of every type a config knows."""
    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent("""
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import Literal
        from attnlab.core import Mechanism
        from attnlab.registry import register

        @register
        @dataclass(frozen=True)
        class Mine(Mechanism):
            hashes: int = 4
            share: float = 0.5
            exact: bool = False
            kernel: Literal["elu", "relu"] = "elu"
            chunk: int | None = None
            ratio: int | float = 2
            sizes: tuple[int, ...] = ()
        """)
    )
    return str(path)


def test_the_base_is_locked_and_builds_one_mechanism_per_layer():
    config = base()
    with pytest.raises(AttributeError):
        config.optimizer.lr = 1.0
    built = mechanisms_of(config)
    assert len(built) == config.model.layers
    assert set(built) == {mechanisms.get("softmax")()}
    assert position_of(config) == positions.get("rope")()


def test_zeros_in_the_model_section_are_resolved():
    config = base()
    assert architecture_of(config).head_dim == config.model.width // config.model.heads
    assert architecture_of(config).mlp_width == 704
    config.model.mlp = "gelu"
    assert architecture_of(config).mlp_width == 4 * config.model.width
    config.model.mlp_width, config.model.head_dim = 96, 24
    assert architecture_of(config).mlp_width == 96
    assert architecture_of(config).dims.key_dim == 24


def test_every_field_of_the_architecture_is_a_field_of_the_config():
    assert set(base().model) == set(vars(architecture_of(base())))


def test_the_attention_section_is_the_fields_of_the_dataclass():
    window = section(mechanisms, "window")
    assert window.to_dict() == {"name": "window", "window": 256, "sinks": 0}


def test_a_pattern_has_a_section_per_part_and_cycles_over_the_layers():
    config = base("window+window+softmax")
    assert set(config.attention) == {"name", "window", "softmax"}
    override(config, "attention.window.window", "64")
    window, softmax = mechanisms.get("window")(window=64), mechanisms.get("softmax")()
    assert mechanisms_of(config) == (window, window, softmax) * 2
    config.model.layers = 2
    assert mechanisms_of(config) == (window, window)


def test_a_pattern_may_repeat_one_mechanism():
    assert set(base("window+window").attention) == {"name", "window"}
    assert len(mechanisms_of(base("window+window"))) == base().model.layers


def test_positions_make_no_pattern():
    with pytest.raises(UserError, match="only attention may be a pattern"):
        base(position="rope+alibi")


def test_a_mechanism_file_of_the_users_own_takes_part(mine):
    assert base(mine).attention.hashes == 4
    assert base(f"{mine}+softmax").attention.mine.hashes == 4
    config = base(mine)
    texts = {"hashes": "8", "share": "1", "exact": "true", "kernel": "relu", "chunk": "16"}
    for field, text in {**texts, "ratio": "2.5", "sizes": "1,2"}.items():
        override(config, f"attention.{field}", text)
    made = mechanisms_of(config)[0]
    assert made == mechanisms.get(mine)(8, 1.0, True, "relu", 16, 2.5, (1, 2))
    assert hash(made) == hash(mechanisms_of(from_json(to_json(config)))[0])
    assert mechanisms_of(from_json(to_json(config)))[0] == made


def test_two_files_of_one_name_make_no_pattern(mine, tmp_path):
    (tmp_path / "softmax.py").write_text("")
    with pytest.raises(UserError, match="share the name 'softmax'"):
        base(f"{tmp_path}/softmax.py+softmax")


def test_a_field_called_name_is_refused(monkeypatch):
    class Registry:
        kind = "thing"

        def get(self, _):
            import dataclasses

            return dataclasses.make_dataclass("Named", [("name", str, "x")])

    with pytest.raises(TypeError, match="'name'"):
        section(Registry(), "x")  # pyright: ignore[reportArgumentType]


def test_kinds_come_from_annotations_where_values_cannot_tell():
    assert kinds(base())["attention.tile"] == int | None
    assert kinds(base("window+softmax"))["attention.softmax.tile"] == int | None
    assert kinds(base())["optimizer.learning_rate"] is float


def test_parse_arg_reads_typed_values_over_defaults():
    got = parse_arg("length=1024,attention=lsh", attention="softmax", length=512, tied=True)
    assert got.to_dict() == {"attention": "lsh", "length": 1024, "tied": True}
    assert parse_arg(None, length=512).length == 512
    assert parse_arg("corpus=text:/a/*.txt", corpus="kjv").corpus == "text:/a/*.txt"


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("lenght=3", "unknown config argument 'lenght'; did you mean 'length'"),
        ("length=long", "config argument length=long: expected an integer"),
        ("length", "not of the form key=value"),
    ],
)
def test_parse_arg_names_what_is_wrong(arg, message):
    with pytest.raises(UserError, match=message):
        parse_arg(arg, length=512)


@pytest.mark.parametrize("attention", ["softmax", "window+softmax"])
def test_json_returns_the_same_config(attention):
    config = base(attention, "alibi")
    config.train.steps = 7
    assert from_json(to_json(config)) == config
    assert diff(from_json(to_json(config)), config) == []


def test_a_stored_config_of_another_version_names_the_fields():
    stored = json.loads(to_json(base()))
    stored["model"]["experts"] = 8
    del stored["train"]["keep"]
    with pytest.raises(UserError, match="another version") as error:
        from_json(json.dumps(stored), "runs/a/config.json")
    for part in ("runs/a/config.json", "unknown model.experts", "missing train.keep (now 3)"):
        assert part in str(error.value)


def test_a_stored_config_from_before_there_were_normalisers_means_softmax():
    stored = json.loads(to_json(base("window")))
    del stored["normaliser"]
    assert from_json(json.dumps(stored)) == base("window")


def test_the_normaliser_is_chosen_like_the_rest():
    lm = load("configs/lm.py:normaliser=top_k")
    override(lm, "normaliser.k", "8")
    assert normaliser_of(lm) == normalisers.get("top_k")(k=8)
    assert model_of(lm, 17).normaliser == normaliser_of(lm)
    assert from_json(to_json(lm)) == lm
    override(lm, "normaliser", "ssmax")
    assert lm.normaliser.to_dict() == {"name": "ssmax", "length": 512}
    with pytest.raises(UserError, match="did you mean 'ssmax'"):
        base(normaliser="ssmx")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a config"),
        ("[]", "not a config"),
        ("{}", "not a config"),
        ('{"attention": {"name": "windw"}, "position": {"name": "rope"}}', "did you mean 'window'"),
        (
            to_json(base()).replace('"width": 256', '"width": "wide"'),
            r"model\.width=wide: expected",
        ),
    ],
)
def test_a_damaged_stored_config_is_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        from_json(text)
    assert "\n" not in str(error.value)


def test_diff_lists_dotted_changes():
    new = base("window")
    new.model.width = 128
    assert sorted(diff(base(), new)) == [
        "attention.name: 'softmax' -> 'window'",
        "attention.sinks: absent -> 0",
        "attention.tile: None -> absent",
        "attention.window: absent -> 256",
        "model.width: 256 -> 128",
    ]


@pytest.mark.parametrize("name", mechanisms.names())
def test_fairness_a_mechanism_changes_only_the_attention_section(name):
    plain, other = (load(f"configs/lm.py:attention={n}") for n in ("softmax", name))
    changes = [change for change in diff(plain, other) if not change.startswith("attention.")]
    # Memory that is handed on needs rows that read on; nothing else may differ.
    stream = ["task.packing: 'packed' -> 'stream'"]
    assert changes == (stream if mechanisms.get(name).carries else [])


@pytest.mark.parametrize("name", mechanisms.names())
def test_every_mechanism_has_fields_a_config_can_hold(name):
    config = base(name)
    assert mechanisms_of(config)[0] == mechanisms.get(name)()
    assert from_json(to_json(config)) == config
    hash(mechanisms_of(config)[0])


def test_config_files_hold_their_promises():
    assert load("configs/quickstart.py").task.fallback == "pysource"
    lm = load("configs/lm.py:attention=window,position=alibi,length=64,corpus=sympy")
    assert (lm.attention.name, lm.position.name) == ("window", "alibi")
    assert (lm.task.length, lm.task.corpus) == (64, "sympy")
    assert load("configs/laptop.py:attention=window").attention.name == "window"
    assert configs.CHOICES.keys() <= kinds(base()).keys()


@pytest.mark.parametrize("length", [1024 * 2**n for n in range(7)])
def test_books_are_read_at_many_lengths_with_as_many_bytes_a_step(length):
    config = load(f"configs/books.py:length={length},attention=window+softmax")
    validate(config)
    assert config.task.length * config.task.batch == 65_536
    assert config.task.length == length
    assert load("configs/books.py:attention=transformer_xl").task.packing == "stream"
