"""Learning rates of two mechanisms: configs/quickstart.py with half its width, depth and steps.

attnlab sweep --config=configs/sweeps/learning_rate.py --workdir=runs/learning_rate

Six points of half a minute of one CPU core each. A window of 64 sees a fourth of a sequence.
"""

from pathlib import Path

from attnlab.overrides import load

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"


def get_config():
    points = []
    for attention in ("softmax", "window"):
        for learning_rate in (0.02, 0.08, 0.32):
            config = load(f"{QUICKSTART}:attention={attention}")
            config.optimizer.learning_rate = learning_rate
            config.model.width = 96
            config.model.layers = 2
            config.train.steps = 90
            config.sample.tokens = 100
            if attention == "window":
                config.attention.window = 64
            points.append(config)
    return points
