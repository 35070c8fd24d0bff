"""Draws docs/images/dilution.png from results.json.

python experiments/dilution/plot.py
"""

import json
from pathlib import Path

from attnlab.analysis.charts import plot_margins

HERE = Path(__file__).parent

if __name__ == "__main__":
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    plot_margins(results["rows"], HERE.parents[1] / "docs" / "images" / "dilution.png")
