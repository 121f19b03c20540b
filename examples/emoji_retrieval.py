"""Does an encoder know the same emoji when another vendor drew it? Retrieval between Google's and Twitter's pictures.

    python examples/emoji.py --out data/emoji
    simclr pretrain data/emoji/train --out runs/emoji
    python examples/emoji_retrieval.py runs/emoji data/emoji

Each picture of one vendor asks for its partner among all pictures of the other one, by cosine: the files
`google-CODE.png` and `twitter-CODE.png` are a pair. No label and no pair takes part in pretraining. Skin tones are left
out: they are nearly the same picture six times. `--part test` takes the emoji that the encoder never saw; the default
takes all 1,906.

Every source of features is asked twice: as it is, and "standardised", each number having mean 0 and deviation 1 over
each vendor's pictures, which takes away what distinguishes the vendors' styles on the whole (and needs no pair).
Pixels are those at 16 x 16, antialiased: no other side did better (docs/lab-notes.md), 38.6 % top-1 as the mean of both
directions, standardised.
"""

import argparse
import sys
from pathlib import Path, PurePosixPath

import numpy as np
from emoji import SKIN_TONES

import simclr
from simclr.data.images import Images
from simclr.data.opening import open_data
from simclr.errors import UserError
from simclr.evaluation.retrieval import retrieval
from simclr.evaluation.subjects import random_encoder
from simclr.models.inference import extract, pixels_of
from simclr.reports.table import Row, text_table

VENDORS = ("google", "twitter")
PIXELS_SIDE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, or of an encoder")
    parser.add_argument("folder", type=Path, help="folder that examples/emoji.py prepared")
    parser.add_argument("--part", choices=("all", "test"), default="all")
    parser.add_argument("--seed", type=int, default=0, help="of the random encoder's weights")
    args = parser.parse_args()
    model = simclr.load(args.run)
    images = open_data(args.folder, split=args.part, channels="3")
    vendors = [pictures_by(vendor, images) for vendor in VENDORS]
    random = random_encoder(model.encoder.config, seed=args.seed)
    sources = {
        "pixels": lambda part: pixels_of(part, size=PIXELS_SIDE, preset="torchvision"),
        "random": lambda part: extract(random, part, preset=model.preprocessing),
        "encoder": lambda part: extract(model.encoder, part, preset=model.preprocessing),
    }
    codes = [[code_of(key) for key in part.keys] for part in vendors]
    rows = []
    for name, features_of in sources.items():
        features = [features_of(part) for part in vendors]
        rows.append(Row(name, both_ways(features, codes)))
        rows.append(Row(f"{name}, standardised", both_ways([standardised(f) for f in features], codes)))
    pairs = len(set(codes[0]) & set(codes[1]))
    print(text_table(rows, corner="%"))
    print(f"\n{pairs:,} pairs ({args.part}); arrows lead from the vendor that asks to the one that is searched.")


def pictures_by(vendor: str, images: Images) -> Images:
    """One vendor's pictures, without skin tones."""
    chosen = [
        i
        for i, key in enumerate(images.keys)
        if PurePosixPath(key).name.startswith(f"{vendor}-") and not SKIN_TONES & set(code_of(key).upper().split("-"))
    ]
    if not chosen:
        raise UserError(f"{images.name} has no file {vendor}-CODE.png; give the folder that examples/emoji.py made.")
    return images.subset(chosen)


def code_of(key: str) -> str:
    """train/flags/google-1f1e6-1f1f2.png -> 1f1e6-1f1f2: what the two pictures of an emoji share."""
    return PurePosixPath(key).stem.split("-", 1)[1]


def both_ways(features: list[np.ndarray], codes: list[list[str]]) -> dict[str, list[float]]:
    """Top-1, top-5 and mean reciprocal rank, from the first vendor to the second and back."""
    figures = {}
    for asks, searched in ((0, 1), (1, 0)):
        found = retrieval(features[asks], codes[asks], features[searched], codes[searched])
        for figure in ("top1", "top5", "mrr"):
            figures[f"{VENDORS[asks][0]}>{VENDORS[searched][0]} {figure}"] = [found[figure]]
    return figures


def standardised(features: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 over the pictures, for each number that varies."""
    return (features - features.mean(0)) / features.std(0).clip(1e-6)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
