"""The `entmax` package, values and gradients: `pip install -e '.[peers]' && pytest -m peers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.normalisers.entmax import Entmax
from attnlab.normalisers.sparsemax import Sparsemax

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (Sparsemax(), "sparsemax", {}),
        (Entmax(1.5), "entmax15", {}),
        (Entmax(1.25), "entmax_bisect", {"alpha": 1.25}),
    ],
    ids=lambda z: z if isinstance(z, str) else "",
)
def test_weights_and_gradients_are_those_of_the_entmax_package(ours, theirs, options, ties):
    torch, entmax = pytest.importorskip("torch"), pytest.importorskip("entmax")
    draw = np.random.default_rng(0)
    z = draw.standard_normal((16, 200)).astype(np.float32) * 2
    z = np.round(z) if ties else z
    cotangent = draw.standard_normal(z.shape).astype(np.float32)

    given = torch.tensor(z, requires_grad=True)
    wanted = getattr(entmax, theirs)(given, dim=-1, **options)
    (wanted * torch.tensor(cotangent)).sum().backward()

    def loss(z):
        p = ours.weights({}, z[None], jnp.ones_like(z, bool)[None])[0]
        return jnp.sum(p * cotangent), p

    gradient, p = jax.jit(jax.grad(loss, has_aux=True))(z)
    np.testing.assert_allclose(p, wanted.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(gradient, given.grad.numpy(), atol=1e-5)
