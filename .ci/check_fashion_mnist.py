"""A few minutes on real images: the encoder's kNN must beat its own random initialisation by MARGIN.

Takes the folder to work in. Run by .ci/run; where fashion-mnist is not installed it fails and says how to get it.
"""

import json
import subprocess
import sys
from pathlib import Path

MARGIN = 0.05  # of accuracy; random 16-wide encoders stand near 0.72, pretrained ones after this minute near 0.80

work = Path(sys.argv[1])
run, result = work / "run", work / "result.json"
for command in (
    ["simclr", "pretrain", "fashion-mnist", "--recipe", "cpu", "--epochs", "1", "--knn-every", "0", "--out", str(run)],
    ["simclr", "evaluate", str(run), "fashion-mnist", "--labels", "10%", "--json", str(result)],
):
    subprocess.run(command, check=True)
accuracies = json.loads(result.read_text())
encoder, random = accuracies["encoder"]["knn"], accuracies["random"]["knn"]
print(f"kNN with 10 % of the labels: encoder {encoder:.4f}, random initialisation {random:.4f}, margin asked {MARGIN}")
sys.exit(0 if encoder >= random + MARGIN else 1)
