"""The configs of published runs say what they say, and their small twins run."""

import jax
import numpy as np
import pytest
from tiny import corpus

from attnlab import tasks
from attnlab.config import flat, mechanisms_of
from attnlab.errors import UserError
from attnlab.kinds import kind_of
from attnlab.limits import validate
from attnlab.main import main
from attnlab.optimizer import make_optimizer
from attnlab.overrides import load, override
from attnlab.plan import describe, estimate_cost
from attnlab.statistics import split
from attnlab.step import init_params, init_state, make_step

FOLDER = "configs/papers"
PUBLISHED = (
    "transformer_xl.py:data=enwik8,model=base",
    "transformer_xl.py:data=enwik8,model=large",
    "transformer_xl.py:data=wikitext103,model=base",
    "transformer_xl.py:data=wikitext103,model=large",
    "compressive_transformer.py:data=pg19",
    "compressive_transformer.py:data=enwik8",
    "compressive_transformer.py:data=wikitext103",
    "routing_transformer.py:data=pg19",
    "routing_transformer.py:data=wikitext103",
    "routing_transformer.py:data=enwik8",
    "reformer.py:",
    "longformer.py:data=text8,model=small",
    "longformer.py:data=enwik8,model=large",
)
TWINS = tuple(
    f"{spec},size=scaled".replace(":,", ":") for spec in PUBLISHED if "model=large" not in spec
)
SHRUNK = {
    "model.width": 32,
    "model.mlp_width": 32,
    "task.length": 32,
    "task.batch": 2,
    "evaluate.stride": 0,
    "optimizer.warmup": 1,
    "train.steps": 2,
    "attention.segment": 12,
    "attention.memory": 12,
    "attention.compressed": 12,
    "attention.window": 8,
    "attention.window.window": 8,
    "attention.routing.clusters": 4,
    "attention.routing.length": 8,
    "attention.lsh.buckets": 4,
    "attention.lsh.length": 8,
    "position.max_distance": 32,
}


def paper(spec, **changes):
    config = load(f"{FOLDER}/{spec}")
    for path, value in changes.items():
        override(config, path.replace("__", "."), str(value))
    return config


def few(config):
    """So many layers that each mechanism has one."""
    names = config.attention.name.split("+")
    return max(names.index(name) for name in names) + 1


def planned(config):
    """The plan of a config whose data are missing, as text."""
    validate(config)
    estimate = estimate_cost(config, kind_of(config).make_model(config, None))
    return describe(config, estimate, None, 10**15, "no data")


@pytest.mark.parametrize("spec", PUBLISHED)
def test_a_published_config_is_valid_and_names_data_that_no_index_has(spec):
    config = paper(spec)
    validate(config)
    assert config.task.corpus in ("enwik8", "text8", "wikitext103", "tfds:pg19")
    assert (config.task.tokenizer == "bytes") == (config.task.corpus in ("enwik8", "text8"))
    assert len(mechanisms_of(config)) == config.model.layers


@pytest.mark.parametrize("spec", TWINS)
def test_a_twin_is_bytes_of_a_corpus_that_installs_by_name(spec):
    config, whole = paper(spec), paper(spec.replace("size=scaled", "size=published"))
    validate(config)
    assert (config.task.corpus, config.task.tokenizer) == ("kjv", "bytes")
    assert config.attention.name.split("+")[-1] == whole.attention.name.split("+")[-1]
    assert config.position.name == whole.position.name
    assert config.model.width < whole.model.width


@pytest.mark.parametrize("spec", [spec for spec in PUBLISHED if "routing" not in spec])
def test_a_published_config_is_planned_without_its_data(spec):
    config = paper(spec)
    config.model.layers = few(config)
    text = planned(config)
    assert "data        missing: no data" in text
    assert f"{config.train.steps:,} of {config.task.batch} x {config.task.length:,}" in text


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*PUBLISHED, *TWINS])
def test_every_config_is_planned_whole(spec):
    assert "FLOPs" in planned(paper(spec))


@pytest.mark.parametrize(
    ("spec", "millions"),
    [
        ("transformer_xl.py:data=enwik8,model=base", 41),
        ("longformer.py:data=text8,model=small", 41),
        pytest.param("transformer_xl.py:data=enwik8,model=large", 277, marks=pytest.mark.slow),
        pytest.param("longformer.py:data=enwik8,model=large", 102, marks=pytest.mark.slow),
        pytest.param("compressive_transformer.py:data=enwik8", 277, marks=pytest.mark.slow),
    ],
)
def test_byte_level_models_are_as_large_as_published(spec, millions):
    config = paper(spec)
    model = kind_of(config).make_model(config, None)
    learned = split(jax.eval_shape(lambda: init_params(model, 0)))[0]
    assert sum(z.size for z in jax.tree.leaves(learned)) == pytest.approx(1e6 * millions, rel=0.08)


def test_missing_data_are_one_line_that_says_how_to_get_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    for spec, words in (
        ("reformer.py", "download http://mattmahoney.net/dc/enwik8.zip and unpack it into"),
        ("transformer_xl.py:data=wikitext103", "wikitext-103-v1.zip and unpack it into"),
        ("compressive_transformer.py", "tfds.builder('pg19', file_format='array_record')"),
    ):
        line = [f"--config={FOLDER}/{spec}", f"--workdir={tmp_path / 'run'}"]
        assert main(["train", *line, "--config.task.batch=64"]) == 3  # divides among the devices
        said = capsys.readouterr().err.splitlines()
        assert words in said[-1]
    small = ["--config.model.layers=1", "--config.task.batch=8", "--config.model.width=64"]
    assert main(["plan", f"--config={FOLDER}/longformer.py", *small]) == 0
    assert "data        missing: corpus text8 is on no package index" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spec",
    [
        "transformer_xl.py:size=scaled",
        "routing_transformer.py:data=enwik8,size=scaled",
        pytest.param("reformer.py:size=scaled", marks=pytest.mark.slow),
        pytest.param("routing_transformer.py:data=pg19,size=scaled", marks=pytest.mark.slow),
        pytest.param("compressive_transformer.py:size=scaled", marks=pytest.mark.slow),
        pytest.param("longformer.py:size=scaled", marks=pytest.mark.slow),
    ],
)
def test_a_twin_takes_two_steps(spec):
    config = load(f"{FOLDER}/{spec}")
    heads = config.model.heads
    known = flat(config)
    for path, value in {**SHRUNK, "task.corpus": corpus(), "model.head_dim": 8}.items():
        if path in known:
            override(config, path, str(value))
    config.model.layers = few(config)
    assert config.model.heads == heads
    validate(config)
    task = tasks.build(config.task, seed=0)
    model = kind_of(config).make_model(config, task)
    optimizer = make_optimizer(config.optimizer, 2)
    state = init_state(model, optimizer, config)
    step = jax.jit(make_step(model, optimizer, config))
    for number in range(2):
        state, metrics = step(state, task.batch(number))
        assert metrics["finite"]
        assert 3 < float(metrics["loss"]) < 8
    assert int(state.step) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("transformer_xl.py:data=enwik9", "config argument data=enwik9: did you mean 'enwik8'"),
        ("longformer.py:size=scale", "did you mean 'scaled'"),
        ("transformer_xl.py:model=huge", "known: base, large"),
    ],
)
def test_a_wrong_argument_names_the_right_ones(spec, message):
    with pytest.raises(UserError, match=message):
        load(f"{FOLDER}/{spec}")


def test_last_of_a_pattern_is_where_books_are_routed():
    layers = mechanisms_of(paper("routing_transformer.py:data=pg19"))
    names = [type(layer).__name__ for layer in layers]
    assert names == ["Window"] * 21 + ["Heads"]
    assert np.sum(layers[-1].sizes) == 8  # pyright: ignore[reportAttributeAccessIssue]
