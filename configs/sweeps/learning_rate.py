"""Learning rates of two mechanisms: the model of configs/quickstart.py, for half as many steps.

attnlab sweep --config=configs/sweeps/learning_rate.py --workdir=runs/learning_rate

Six points of about two minutes each on 2 CPU cores. A window of 64 sees a fourth of a sequence.
"""

from pathlib import Path

from attnlab.overrides import load

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"


def get_config():
    points = []
    for attention in ("softmax", "window"):
        for learning_rate in (0.005, 0.02, 0.08):
            config = load(f"{QUICKSTART}:attention={attention}")
            config.optimizer.learning_rate = learning_rate
            config.train.steps = 90
            if attention == "window":
                config.attention.window = 64
            points.append(config)
    return points
