"""A few minutes on real images: the encoder's kNN must beat its own random initialisation by MARGIN.

Takes the folder to work in. Run by .ci/run; where fashion-mnist is not installed it fails and says how to get it.
"""

import json
import subprocess
import sys
from pathlib import Path

MARGIN = 0.03  # of accuracy; with so many labels a random 16-wide encoder stands near 0.735, one trained so near 0.79

work = Path(sys.argv[1])
run, result = work / "run", work / "result.json"
for command in (
    ["simclr", "pretrain", "fashion-mnist", "--recipe", "cpu", "--epochs", "2", "--knn-every", "0", "--out", str(run)],
    ["simclr", "evaluate", str(run), "fashion-mnist", "--labels", "10%", "--json", str(result)],
):
    subprocess.run(command, check=True)
accuracies = json.loads(result.read_text())
encoder, random = accuracies["encoder"]["knn"], accuracies["random"]["knn"]
print(f"kNN with 10 % of the labels: encoder {encoder:.4f}, random initialisation {random:.4f}, margin asked {MARGIN}")
sys.exit(0 if encoder >= random + MARGIN else 1)
