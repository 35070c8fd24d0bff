"""Sampling: greedy is the argmax of the full pass, cuts are exact, text streams as it is drawn."""

import io
import itertools
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny, trained

from attnlab import decode
from attnlab.config import model_of
from attnlab.core import MASK, mechanisms
from attnlab.data.tokenizers import ByteTokenizer
from attnlab.decode import draw, endless, extend, generate, sample_text, stream_tokens
from attnlab.errors import UserError
from attnlab.main import main
from attnlab.model import initial_memory
from attnlab.step import init_params

CONTEXT = 12
TAIL = str(Path(__file__).parent / "plugged" / "tail.py")
PROMPT = np.array([256, 104, 105])


@cache
def network(attention="softmax", *changes, position="rope"):
    model = model_of(tiny(*changes, attention=attention, position=position), 257)
    return model, jax.tree.map(lambda p: 3 * p, init_params(model, 0))


def sample(model, params, count, prompt=PROMPT, **options):
    options = {"context": CONTEXT, "temperature": 0.0} | options
    return list(itertools.islice(stream_tokens(model, params, prompt, **options), count))


@partial(jax.jit, static_argnums=0)
def full_pass(model, params, tokens, seg):
    """Logits [N V] of one whole sequence, without any memory."""
    pos = jnp.arange(tokens.shape[1])[None]
    return model.apply({"params": params}, tokens, pos, seg)[0][0]


def next_token(model, params, tokens, room=CONTEXT):
    """The likeliest token after ``tokens``."""
    row, seg = np.zeros((1, room), np.int32), np.full((1, room), -1, np.int32)
    row[0, : len(tokens)], seg[0, : len(tokens)] = tokens, 1
    return int(jnp.argmax(full_pass(model, params, row, seg)[len(tokens) - 1]))


@pytest.mark.parametrize(
    ("attention", "changes"),
    [("softmax", ()), ("window", ("attention.window=4", "attention.sinks=1"))],
)
def test_greedy_is_the_argmax_of_a_full_pass_also_past_the_context(attention, changes):
    model, params = network(attention, *changes)
    assert not endless(model)
    drawn = sample(model, params, 16)
    seen = list(PROMPT)
    for token in drawn:
        assert token == next_token(model, params, seen)
        # When the context is full, its newest half is read again as a new text.
        seen = [*(seen[-(CONTEXT // 2) :] if len(seen) == CONTEXT else seen), token]
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("position", ["absolute", "rope", "t5"])
def test_a_token_is_where_the_tokens_before_it_say(position):
    """Logits of a prompt and of tokens one by one are those of the whole, not only their argmax."""
    model, params = network(position=position)
    tokens = np.random.default_rng(0).integers(256, size=(1, 9)).astype(np.int32)
    wanted = full_pass(model, params, tokens, np.ones_like(tokens))
    memory = initial_memory(model.architecture, model.mechanisms, 1, 9)
    logits, memory = extend(model, params, tokens[:, :5], memory)
    np.testing.assert_allclose(logits[0], wanted[4], atol=1e-4)
    for i in range(5, 9):
        logits, memory = extend(model, params, tokens[:, i : i + 1], memory)
        np.testing.assert_allclose(logits[0], wanted[i], atol=1e-4)


@pytest.mark.parametrize("name", mechanisms.names())
def test_no_two_arrays_of_a_memory_are_one(name):
    """`extend` writes into the arrays that it is given."""
    architecture = model_of(tiny(), 257).architecture
    memory = initial_memory(architecture, (mechanisms.get(name)(),), 1, 8)
    places = [z.unsafe_buffer_pointer() for z in jax.tree.leaves(memory)]
    assert len(set(places)) == len(places)


def test_a_memory_of_matrices_can_be_sampled_from():
    model, params = network("infini", "attention.segment=4")
    assert len(sample(model, params, 6)) == 6


@pytest.mark.parametrize("attention", ["window", TAIL])
@pytest.mark.slow
def test_what_fits_into_compact_states_is_never_read_again(attention, monkeypatch):
    model, params = network(attention, "attention.window=4")
    assert endless(model)
    lengths = []

    def counting(model, params, tokens, memory):
        lengths.append(tokens.shape[1])
        return extend(model, params, tokens, memory)

    monkeypatch.setattr(decode, "extend", counting)
    drawn = sample(model, params, 2 * CONTEXT)
    seen = list(PROMPT)
    for token in drawn:
        assert token == next_token(model, params, seen, 3 * CONTEXT)
        seen.append(token)
    assert lengths == [len(PROMPT)] + [1] * (2 * CONTEXT - 1)


def test_a_text_outgrows_the_context_only_where_positions_allow_it():
    def allowed(attention, position="rope"):
        config = tiny("model.layers=2", attention=attention, position=position)
        return endless(model_of(config, 257))

    assert allowed("window", "alibi")
    assert not allowed("window", "absolute")
    assert allowed(TAIL, "absolute")  # trained on positions of whole documents
    assert not allowed(f"{TAIL}+softmax")
    assert not allowed("softmax")


def test_the_likeliest_token_is_what_temperature_0_top_k_1_and_a_small_top_p_draw():
    model, params = network()
    greedy = sample(model, params, 8)
    assert sample(model, params, 8, temperature=1.0, top_k=1) == greedy
    assert sample(model, params, 8, temperature=5.0, top_p=1e-6) == greedy
    assert sample(model, params, 8, temperature=1e-30) == greedy
    assert sample(model, params, 8, temperature=0.0, top_k=5, seed=3) == greedy


def distribution(logits, temperature, top_k, top_p):
    """What `draw` promises, stated another way: float64, one token after the other."""
    order = np.argsort(-logits, kind="stable")
    kept = order[: top_k or None]
    p = np.exp((logits[kept] - logits[kept].max()) / temperature)
    p /= p.sum()
    count = next((i + 1 for i in range(len(p)) if p[: i + 1].sum() >= top_p - 1e-9), len(p))
    result = np.zeros(len(logits))
    result[kept[:count]] = p[:count] / p[:count].sum()
    return result


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7), (4, 0.8), (99, 0.999)])
def test_draws_follow_the_distribution_that_the_cuts_leave(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=9) * 1.5
    expected, count = distribution(logits, temperature, top_k, top_p), 20_000
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, 9))
    settings = (jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    drawn = np.asarray(jax.jit(draw)(rows, jax.random.key(0), *settings))
    found = np.bincount(drawn, minlength=9) / count
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / count**0.5)


def test_masked_and_extreme_logits_are_never_nan():
    logits = jnp.asarray([[MASK, 0.0, 3e38, -3e38], [0.0, 0.0, -jnp.inf, 1e-30]])
    for temperature in (0.0, 1e-38, 1.0, 1e30):
        token = draw(
            logits, jax.random.key(1), jnp.float32(temperature), jnp.int32(2), jnp.float32(0.9)
        )
        assert bool(jnp.all((token >= 0) & (token < 4)))


def test_a_seed_gives_the_same_text_and_another_seed_another():
    model, params = network()
    a, b, c = (sample(model, params, 12, temperature=1.0, seed=s) for s in (7, 7, 8))
    assert a == b != c


@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT])
def test_a_prompt_may_fill_the_context(length):
    model, params = network()
    prompt = np.arange(length) + 97
    first, second = sample(model, params, 2, prompt)
    assert first == next_token(model, params, list(prompt))
    seen = list(prompt) if length < CONTEXT else list(prompt[-(CONTEXT // 2) :])
    assert second == next_token(model, params, [*seen, first])


def test_a_context_of_one_token_is_enough():
    model, params = network()
    drawn = sample(model, params, 4, np.array([97]), context=1)
    assert drawn[1] == next_token(model, params, [drawn[0]])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt has 0 tokens"),
        ([1] * (CONTEXT + 1), {}, "the prompt has 13 tokens .* trained on 12"),
        ([5, 257], {}, r"token id 257 in the prompt is outside the vocabulary 0\.\.256"),
        ([-1], {}, "token id -1"),
        ([1], {"temperature": -0.1}, "temperature=-0.1: must be >= 0"),
        ([1], {"temperature": float("nan")}, "temperature=nan"),
        ([1], {"top_k": -1}, "top_k=-1: must be >= 0"),
        ([1], {"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ([1], {"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_what_cannot_be_sampled_is_a_user_error(prompt, options, message):
    model, params = network()
    with pytest.raises(UserError, match=message):
        sample(model, params, 1, np.array(prompt, int), **options)


def say(monkeypatch, tokens):
    """Makes every model say these tokens, then nothing."""
    monkeypatch.setattr(decode, "stream_tokens", lambda *a, **o: iter(tokens))


@pytest.mark.slow
def test_a_letter_of_two_bytes_is_written_when_it_is_whole(monkeypatch):
    written = []

    class Stream(io.StringIO):
        def write(self, text):
            written.append(text)
            return len(text)

    path = trained()
    monkeypatch.setattr("sys.stdout", Stream())
    say(monkeypatch, [*"é".encode(), 0xFF, ord("a"), 0xC3])
    generate(path, prompt="ü", tokens=9)
    assert "".join(written) == "üé\N{REPLACEMENT CHARACTER}a\N{REPLACEMENT CHARACTER}\n"
    assert written[:3] == ["ü", "", "é"]


def test_the_end_mark_ends_the_text_early(monkeypatch, capsys):
    path = trained()
    capsys.readouterr()
    say(monkeypatch, [ord("a"), 256, ord("b")])
    generate(path, prompt="x", tokens=9)
    assert capsys.readouterr().out == "xa\n"
    settings = tiny("sample.prompt=x").sample
    assert sample_text(None, None, ByteTokenizer(), settings) == b"xa"


def test_bytes_of_a_prompt_that_are_no_text_reach_the_model_as_they_are(monkeypatch):
    say(monkeypatch, [ord("a")])
    typed = b"\xff\xfe".decode(errors="surrogateescape")  # as the shell's arguments arrive
    settings = tiny().sample
    with settings.unlocked():
        settings.prompt = typed
    assert sample_text(None, None, ByteTokenizer(), settings) == b"\xff\xfea"


@pytest.mark.parametrize("attention", ["softmax", "window"])
def test_the_command_continues_a_prompt_reproducibly(capsys, attention):
    path = trained(attention)
    capsys.readouterr()
    line = ["generate", f"--workdir={path}", "--prompt=the ", "--tokens=40", "--top_k=999"]
    outputs = []
    for _ in range(2):
        assert main(line) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("the ")
    line[3] = "--tokens=0"
    assert main(line) == 0
    assert capsys.readouterr().out == "the \n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=" + "x" * 32], "the prompt has 33 tokens"),
        (["--tokens=-1"], "tokens=-1 must be at least 0"),
        (["--temperature=-1"], "temperature=-1.0: must be >= 0"),
        (["--top_p=0"], "top_p=0.0: must be above 0"),
        (["--step=7"], "no checkpoint 7"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(capsys, flags, message):
    path = trained()
    capsys.readouterr()
    assert main(["generate", f"--workdir={path}", *flags]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err.splitlines()[-1]
    assert "Traceback" not in output.err
