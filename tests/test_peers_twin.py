"""The model in torch that a training step is measured beside is the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from attnlab.bench import twin
from attnlab.bench.subjects import BYTES
from attnlab.config import model_of
from attnlab.errors import UserError
from attnlab.step import init_params, token_losses

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("mlp", "qk_norm"), [("swiglu", "true"), ("gelu", "false")])
def test_loss_and_gradient_are_ours(mlp, qk_norm):
    torch = pytest.importorskip("torch")
    config = tiny("model.layers=2", f"model.mlp={mlp}", f"model.qk_norm={qk_norm}", position="none")
    model = model_of(config, BYTES)
    params = init_params(model, 0)
    tokens, targets = np.random.default_rng(0).integers(BYTES, size=(2, 2, 19))
    pos = np.tile(np.arange(19), (2, 1))
    batch = {"tokens": tokens, "targets": targets, "pos": pos, "seg": 0 * pos}

    def ours(params):
        return jnp.mean(token_losses(model, params, batch).nll)

    loss, slope = jax.value_and_grad(ours)(params)
    weights = as_torch(torch, params)
    a = model.architecture
    theirs = twin.nll(weights, torch.as_tensor(tokens), torch.as_tensor(targets), a.heads, a.mlp)
    theirs.backward()
    np.testing.assert_allclose(theirs.item(), loss, rtol=1e-5)
    for name, layer in as_torch(torch, slope).items():
        for part, expected in layer.items():
            found, wanted = weights[name][part].grad.numpy(), expected.detach().numpy()
            assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max(), (name, part)
    drawn = twin.draw(a)
    assert {n: {p: w.shape for p, w in layer.items()} for n, layer in drawn.items()} == {
        n: {p: w.shape for p, w in layer.items()} for n, layer in weights.items()
    }


def as_torch(torch, params):
    """Our parameters, or their gradient, as the twin's."""

    def leaf(*parts):
        z = np.concatenate([np.asarray(part).T for part in parts])
        return torch.tensor(z).requires_grad_()

    backbone, found = params["backbone"], {}
    for name in sorted(name for name in backbone if name.startswith("layer_")):
        layer = backbone[name]
        parts = {**layer["attention"], **layer["mlp"]}
        kernel = {name: part["kernel"] for name, part in parts.items() if "kernel" in part}
        scale = {name: leaf(part["scale"]) for name, part in parts.items() if "scale" in part}
        found[name] = {
            **scale,
            "attention_norm": leaf(layer["attention_norm"]["scale"]),
            "qkv": leaf(kernel["query"], kernel["key"], kernel["value"]),
            "out": leaf(kernel["out"]),
            "mlp_norm": leaf(layer["mlp_norm"]["scale"]),
            "gate_up": leaf(*(kernel[k] for k in ("gate", "up") if k in kernel)),
            "down": leaf(kernel["down"]),
        }
    embedding = np.asarray(backbone["embedding"]["embedding"]).T
    return {
        **found,
        "ends": {"embedding": leaf(embedding), "norm": leaf(backbone["norm"]["scale"])},
    }


def test_what_the_twin_has_not_is_refused():
    plain = "optimizer.name=adamw", "optimizer.ema=0"
    twin.check(tiny(*plain, position="none"))
    with pytest.raises(UserError, match=r"no position.name=rope"):
        twin.check(tiny(*plain, position="rope"))
