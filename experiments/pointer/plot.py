"""Draws results.json: hulls that were found beside the true ones.

python experiments/pointer/plot.py
"""

import json
from pathlib import Path

from attnlab.plots import plot_examples

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "pointer.png"

if __name__ == "__main__":
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    plot_examples(results["models"]["softmax, 5 to 10"]["examples"], PICTURE)
