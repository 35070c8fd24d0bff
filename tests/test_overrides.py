"""What the user typed: config files and overrides; each mistake one line with the right thing."""

import pytest

from attnlab.config import base, to_json
from attnlab.errors import UserError
from attnlab.overrides import ALIASES, load, override, unknown


def failure(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_overrides_are_read_by_the_type_of_the_field():
    config = base("window")
    override(config, "optimizer.learning_rate", "3")
    override(config, "attention.sinks", "4")
    override(config, "model.tied", "no")
    override(config, "seed", "7")
    assert config.optimizer.learning_rate == 3.0
    assert (config.attention.sinks, config.model.tied, config.seed) == (4, False, 7)


@pytest.mark.parametrize("path", ["attention", "attention.name"])
def test_a_new_mechanism_replaces_its_section(path):
    config = base()
    override(config, path, "window")
    override(config, "attention.window", "32")
    assert config.attention.to_dict() == {"name": "window", "window": 32, "sinks": 0}


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("optimizer.lr", "'optimizer.learning_rate'?"),
        ("lr", "'optimizer.learning_rate'?"),
        ("n_heads", "'model.heads'?"),
        ("batch_size", "'task.batch'?"),
        ("width", "'model.width'?"),
        ("optimzer.warmup", "'optimizer.warmup'"),
        ("model.widht", "'model.width'"),
        ("attention.windw", "'attention.window'"),
        ("attention.tile", "'attention.window'"),
        ("qqqq", "sections: attention, evaluate, mesh"),
        ("model", "config.model is a section; set one of its fields: model."),
    ],
)
def test_an_unknown_field_names_the_path_and_the_nearest(path, nearest):
    message = failure(override, base("window"), path, "1")
    assert path in message
    assert nearest in message


def test_every_alias_leads_to_a_field():
    for alias, path in ALIASES.items():
        assert f"did you mean {path!r}" in unknown(base(), alias)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("model.heads", "2.5", "--config.model.heads=2.5: expected an integer, such as 4"),
        ("optimizer.learning_rate", "abc", "expected a number"),
        ("model.tied", "2", "expected true or false"),
        ("attention.window", "none", "expected an integer"),
        ("model.mlp", "relu", "--config.model.mlp=relu: not one of swiglu, gelu, none"),
        ("train.on_nan", "stop", "abort, skip, rewind"),
        ("task.name", "txt", "did you mean 'text'"),
        ("attention", "windw", "unknown mechanism 'windw'; did you mean 'window'?"),
        ("position.name", "rop", "unknown position 'rop'; did you mean 'rope' or 'cope'?"),
    ],
)
def test_a_wrong_value_is_refused_and_changes_nothing(path, text, message):
    config = base("window")
    before = config.copy_and_resolve_references()
    assert message in failure(override, config, path, text)
    assert config == before


def test_a_missing_config_file_names_the_nearest():
    assert "did you mean 'configs/lm.py'" in failure(load, "configs/ml.py")
    assert "configs/lm.py" in failure(load, "elsewhere/nothing.py:length=3")
    assert "configs/lm.py" in failure(load, "lm")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = (\n", "bad.py:1: '(' was never closed"),
        ("x = 1\n", "defines no get_config"),
        ("def get_config():\n    return 3\n", "returned int, not a config"),
        ("def get_config(arg):\n    x = 1\n    return x / 0\n", "bad.py:3: ZeroDivisionError"),
        ("import nothing_like_it\n", "bad.py:1: ModuleNotFoundError"),
        (
            "from attnlab.config import base\n"
            "def get_config():\n"
            "    config = base()\n"
            "    config.optimizer.lr = 1.0\n"
            "    return config\n",
            'bad.py:4: AttributeError: \'Key "lr" does not exist',
        ),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config():\n    return ConfigDict({'width': 3})\n",
            "not a config made from base()",
        ),
        (
            "from attnlab.config import base\n"
            "def get_config():\n"
            "    config = base()\n"
            "    with config.unlocked():\n"
            "        config.lr = 1.0\n"
            "    return config\n",
            "unknown config field 'lr'; did you mean 'optimizer.learning_rate'",
        ),
    ],
)
def test_a_bad_config_file_is_one_line_with_its_place(tmp_path, source, message):
    (tmp_path / "bad.py").write_text(source)
    line = failure(load, str(tmp_path / "bad.py"))
    assert "bad.py" in line
    assert message in line


def test_an_argument_to_a_config_that_takes_none_is_refused(tmp_path):
    (tmp_path / "plain.py").write_text("def get_config():\n    pass\n")
    assert "takes no argument" in failure(load, f"{tmp_path}/plain.py:a=1")


def test_a_resolved_config_can_be_run_again(tmp_path):
    (tmp_path / "config.json").write_text(to_json(base("window")))
    assert load(str(tmp_path / "config.json")) == base("window")
