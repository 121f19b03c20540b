"""A small colour set with labels: every emoji of Google (Noto) and Twitter (Twemoji), 64 x 64 pixels, nine categories.

    python examples/emoji.py --out data/emoji
    simclr pretrain data/emoji/train --out runs/emoji
    python benchmarks/time_to_accuracy.py --data data/emoji
    python examples/emoji_retrieval.py runs/emoji data/emoji

Fetches two npm packages once (136 MB together; they hold other sizes too), checks them against the SHA-512 that npm
publishes, and writes `train/CATEGORY/VENDOR-CODE.png` and `test/CATEGORY/VENDOR-CODE.png`, RGB on white. `--archives
FOLDER` takes the packages from a folder (as `npm pack` leaves them) and needs no network. Files of the same CODE show
the same emoji.

The split is by base emoji, about 80/20 in each category: all skin tones, genders and directions of an emoji, flags that
share one picture, and the pictures of both vendors are on the same side. Skin tones are in the training part alone: in
the test part they would make six of ten images people. The category Component (skin-tone swatches) is left out.

Licences: packages MIT (https://github.com/iamcal/emoji-data), Noto Emoji images Apache 2.0, Twemoji images CC-BY 4.0.
"""

import argparse
import base64
import hashlib
import io
import json
import random
import re
import sys
import tarfile
import tempfile
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

VERSION = "16.0.0"
SHA512 = {
    "google": "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "twitter": "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
}
"""Of the packages, as `npm view PACKAGE dist.integrity` prints it."""

TEST_SHARE = 0.2
SKIN_TONES = {f"1F3F{digit}" for digit in "BCDEF"}
NO_MEANING = SKIN_TONES | {"FE0F", "200D", "2640", "2642", "27A1"}
"""Code points that make a variant: skin tones, joiners, gender signs, "facing right"."""
SAME_FLAG = {"BV": "NO", "CP": "FR", "CQ": "SA", "DG": "IO", "EA": "ES", "HM": "AU", "MF": "FR", "SJ": "NO", "UM": "US"}
"""Regions whose flag has the very pixels of another's, in one package or both."""
ADULTS, CHILDREN = {"1F468", "1F469", "1F9D1"}, {"1F466", "1F467", "1F9D2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    parser.add_argument("--archives", type=Path, help="folder that holds the two .tgz files, or where to keep them")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"{args.out} is not empty; give another --out, or remove it first.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.archives or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        packages = {vendor: package(vendor, folder) for vendor in SHA512}
    with tarfile.open(fileobj=io.BytesIO(packages["google"])) as archive:
        emoji = json.load(archive.extractfile("package/emoji.json"))
    side_of = split(emoji, args.seed)
    counts: Counter[tuple[str, str]] = Counter()
    for vendor, content in packages.items():
        for image, pixels in pictures(vendor, content):
            if image in side_of:
                side, category = side_of[image]
                target = args.out / side / category / f"{vendor}-{image}"
                target.parent.mkdir(parents=True, exist_ok=True)
                on_white(pixels).save(target)
                counts[side, category] += 1
    for category in sorted({category for _, category in counts}):
        print(f"{category:24} {counts['train', category]:5} train {counts['test', category]:5} test")
    total = {side: sum(n for (s, _), n in counts.items() if s == side) for side in ("train", "test")}
    print(f"{args.out}: {total['train']} training and {total['test']} test images, split by seed {args.seed}.")


def package(vendor: str, folder: Path) -> bytes:
    """The npm package, from the folder or the registry, with its checksum verified."""
    name = f"emoji-datasource-{vendor}-{VERSION}.tgz"
    path = folder / name
    if not path.exists():
        url = f"https://registry.npmjs.org/emoji-datasource-{vendor}/-/{name}"
        print(f"Fetching {url}", flush=True)
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                path.write_bytes(response.read())
        except OSError as error:
            sys.exit(
                f"{url} could not be fetched ({error}); where there is a network run `npm pack "
                f"emoji-datasource-{vendor}@{VERSION}`, bring the .tgz file here, and give its folder as --archives."
            )
    content = path.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != SHA512[vendor]:
        sys.exit(f"{path} is not the package that npm publishes (SHA-512 differs); remove it and fetch it again.")
    return content


def split(emoji: list[dict[str, Any]], seed: int) -> dict[str, tuple[str, str]]:
    """File name of each picture -> ("train" or "test", category folder)."""
    same = {base_of(e["unified"]): base_of(e["obsoletes"]) for e in emoji if "obsoletes" in e}
    same |= {flag_of(region): flag_of(other) for region, other in SAME_FLAG.items()}
    groups: dict[str, dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for e in emoji:
        if e["category"] == "Component":
            continue
        base = base_of(e["unified"])
        files = [e["image"], *(variant["image"] for variant in e.get("skin_variations", {}).values())]
        groups[folder_of(e["category"])][same.get(base, base)] += files
    side_of = {}
    for category, bases in sorted(groups.items()):
        order = sorted(bases)
        random.Random(f"{seed} {category}").shuffle(order)
        room = TEST_SHARE * sum(map(len, bases.values()))
        for base in order:
            side = "test" if len(bases[base]) <= room else "train"
            room -= len(bases[base]) * (side == "test")
            images = [
                i for i in bases[base] if side == "train" or not SKIN_TONES & set(Path(i.upper()).stem.split("-"))
            ]
            side_of |= dict.fromkeys(images, (side, category))
    return side_of


def base_of(unified: str) -> tuple[str, ...]:
    """What all variants of an emoji share: its code points without those that only vary it, adults being one."""
    points = [point for point in unified.split("-") if point not in NO_MEANING]
    if len(points) > 1:
        points = ["adult" if p in ADULTS else "child" if p in CHILDREN else p for p in points]
    return tuple(dict.fromkeys(points))


def flag_of(region: str) -> tuple[str, ...]:
    """The base of a flag: its two letters as regional indicators."""
    return base_of("-".join(f"{ord(letter) - ord('A') + 0x1F1E6:X}" for letter in region))


def folder_of(category: str) -> str:
    return re.sub(r"[^a-z]+", "-", category.lower())


def pictures(vendor: str, content: bytes) -> list[tuple[str, Image.Image]]:
    """(file name, picture) of every 64-pixel picture in the package."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            if member.name.startswith(f"package/img/{vendor}/64/") and member.name.endswith(".png"):
                file = archive.extractfile(member)
                found.append((Path(member.name).name, Image.open(io.BytesIO(file.read())).convert("RGBA")))
    return sorted(found, key=lambda item: item[0])


def on_white(picture: Image.Image) -> Image.Image:
    """RGB without alpha."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


if __name__ == "__main__":
    main()
