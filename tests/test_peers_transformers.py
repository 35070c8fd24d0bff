"""YaRN of the `transformers` package: `pip install -e '.[peers]' && pytest -m peers`."""

from types import SimpleNamespace

import numpy as np
import pytest

from attnlab.positions.yarn import Yarn

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("factor", [1.0, 4.0, 32.0])
@pytest.mark.parametrize(("original", "base"), [(512, 1e4), (8192, 5e5)])
def test_phases_and_magnitude_are_theirs(size, factor, original, base):
    pytest.importorskip("torch")
    peer = pytest.importorskip("transformers.modeling_rope_utils")
    scaling = {
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    config = SimpleNamespace(
        rope_parameters=scaling,
        head_dim=size,
        hidden_size=size,
        num_attention_heads=1,
        standardize_rope_params=lambda: None,
    )
    phases, magnitude = peer.ROPE_INIT_FUNCTIONS["yarn"](config)
    yarn = Yarn(factor, original, base)
    np.testing.assert_allclose(yarn.frequencies(size), phases.numpy(), rtol=1e-5)
    z = np.eye(size, dtype=np.float32)[None, :1, None]
    turned = yarn.rotate({}, z, np.zeros((1, 1), np.int32), "query")
    np.testing.assert_allclose(turned, z * magnitude, rtol=1e-6)
