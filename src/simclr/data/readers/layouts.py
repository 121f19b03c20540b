"""Data sets of image files by name, in the on-disk layout that torchvision's loaders expect: `flowers102:FOLDER`.

Only lists are read here, with the sets' official splits; `files.py` opens the images. torchvision's own loaders keep
their lists of files in private attributes and know no split of SUN397 and Caltech-101, so the lists are read here; a
test holds them to torchvision's. Nothing is downloaded.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np

from simclr.data.images import Images, Split
from simclr.data.readers.decode import ENDINGS
from simclr.data.readers.files import FileList, Labelling, open_files
from simclr.data.readers.scan import FileEntry
from simclr.data.readers.store import Reading
from simclr.data.source import Skipped
from simclr.data.splits import label_subset
from simclr.errors import UserError
from simclr.files import stamp_of

Part = Literal["train", "validation", "test"]
Row = tuple[Part, str, Any]
"""Part, path below the place, and what the image shows: a class, or K numbers, those of `Images.targets`."""
SIDES: tuple[Part, Part] = ("train", "test")
LISTS: tuple[tuple[Part, str], ...] = (("train", "train"), ("validation", "val"), ("test", "test"))
"""Parts, as lists of files name them."""

CALTECH_MARK = "BACKGROUND_Google"
CALTECH_TRAIN, CALTECH_SEED = "30/class", 0
"""Fei-Fei et al. 2004 draw 30 training images of each class anew for each trial; no list is official."""


class Listing(NamedTuple):
    """What a set consists of, before any image is opened."""

    rows: list[Row]
    classes: list[str]


class Layout(NamedTuple):
    """Where a set's files lie and how its lists are read."""

    places: tuple[str, ...]
    """Below the folder that the user names; the first that has `mark` counts."""
    mark: str
    listing: Callable[[Path], Listing]
    laid_out: str = "the files are to lie as torchvision lays them out"


def open_layout(name: str, folder: Path | None, *, split: Split = "train", reading: Reading | None = None) -> Images:
    """Open a set by its name; its validation images, where it has an official list of them, are part of "train".

    Args:
        name: One of LAYOUTS.

    Raises:
        UserError: no folder given, a folder that does not hold the set, a damaged list, no image that can be read.
    """
    return open_parts(name, folder, split=split, reading=reading)[0]


def open_parts(
    name: str, folder: Path | None, *, split: Split = "all", reading: Reading | None = None
) -> tuple[Images, np.ndarray]:
    """As `open_layout`, and the part ("train", "validation" or "test") of each image, (n,) text."""
    layout = LAYOUTS[name]
    place = _place(name, folder, layout)
    rows, classes = _listing(name, place, layout)
    files = [_found(place, path) for _, path, _ in rows]
    every = [file for file in files if isinstance(file, FileEntry)]
    wanted = [split == "all" or (part == "test") == (split == "test") for part, _, _ in rows]
    rows_of_split = [(row, file) for row, file, is_wanted in zip(rows, files, wanted, strict=True) if is_wanted]
    chosen = [(row, file) for row, file in rows_of_split if isinstance(file, FileEntry)]
    parts: list[Part] = []

    def label(kept: list[int]) -> Labelling:
        parts.extend(chosen[i][0][0] for i in kept)
        shown = np.array([chosen[i][0][2] for i in kept])  # (n,) classes, or (n, K)
        if shown.ndim == 2:
            return Labelling(classes=classes, targets=shown.astype(np.int8))
        return Labelling(shown.astype(np.int64), classes)

    images = open_files(
        FileList(
            root=place,
            files=[file for _, file in chosen],
            unreachable=[file for _, file in rows_of_split if isinstance(file, Skipped)],
            every=every,
            label=label,
            name=name,
            split=split,
            has_own_split=True,
        ),
        reading or Reading(),
    )
    return images, np.array(parts)


def _listing(name: str, place: Path, layout: Layout) -> Listing:
    try:
        listing = layout.listing(place)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ElementTree.ParseError) as error:
        # what the readers of JSON, XML, MATLAB and text raise on a list that is missing, cut short or something else
        raise UserError(
            f"The lists of {name} in {place} cannot be read ({type(error).__name__}: {error!s:.200}): unpack its "
            "archives again."
        ) from error
    lacking = {"train", "test"} - {part for part, _, _ in listing.rows}
    if lacking:
        raise UserError(f"{place} names no {' and no '.join(sorted(lacking))} image of {name}: {layout.laid_out}.")
    return listing


def _place(name: str, folder: Path | None, layout: Layout) -> Path:
    if folder is None:
        raise UserError(
            f"{name} is read from a local folder and not downloaded: write {name}:FOLDER; {layout.laid_out}."
        )
    places = [folder / place for place in layout.places]
    for place in places:
        if (place / layout.mark).exists():
            return place
    raise UserError(f"{folder} does not hold {name}: there is no {places[0] / layout.mark}; {layout.laid_out}.")


def _found(place: Path, path: str) -> FileEntry | Skipped:
    try:
        status = os.stat(place / path)
    except OSError as error:
        return Skipped(path, f"cannot be reached: {(error.strerror or str(error)).lower()}")
    if not stat.S_ISREG(status.st_mode):
        return Skipped(path, "not a regular file")
    return FileEntry(path, place, path, stamp_of(status))


def _food101(place: Path) -> Listing:
    """meta/train.json: {class: ["class/number", ...]}."""
    lists = {part: json.loads((place / f"meta/{part}.json").read_bytes()) for part in SIDES}
    classes = sorted(lists["train"])
    return Listing(
        [
            (part, f"images/{image}.jpg", classes.index(label))
            for part, of_class in lists.items()
            for label, images in of_class.items()
            for image in images
        ],
        classes,
    )


def _sun397(place: Path) -> Listing:
    """The first of the ten splits. ClassName.txt: "/a/abbey" a line; Training_01.txt: "/a/abbey/sun_....jpg"."""
    where = next((w for w in (place, place / "Partitions", place.parent) if (w / "Training_01.txt").exists()), None)
    if where is None:
        raise UserError(
            f"SUN397's first split is not in {place}: put Training_01.txt and Testing_01.txt of the authors' "
            "Partitions.zip there; torchvision does not bring them."
        )
    names = _lines(place / "ClassName.txt")
    index = {name: i for i, name in enumerate(names)}
    return Listing(
        [
            (part, line.removeprefix("/"), index[line.rpartition("/")[0]])
            for part, file in zip(SIDES, ("Training_01.txt", "Testing_01.txt"), strict=True)
            for line in _lines(where / file)
        ],
        [name[3:] for name in names],  # without "/a/"
    )


def _cars(place: Path) -> Listing:
    """Two MATLAB files of annotations: `fname`, and `class` from 1."""
    rows: list[Row] = [
        (part, f"cars_{part}/{annotation['fname']}", int(annotation["class"]) - 1)
        for part, file in zip(SIDES, ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"), strict=True)
        for annotation in np.atleast_1d(_matlab(place / file)["annotations"])
    ]
    return Listing(rows, [str(name) for name in _matlab(place / "devkit/cars_meta.mat")["class_names"]])


def _aircraft(place: Path) -> Listing:
    """data/images_variant_train.txt: "1025794 707-320" a line; the classes are the 100 variants."""
    classes = _lines(place / "data/variants.txt")
    return Listing(
        [
            (part, f"data/images/{line.split(' ', 1)[0]}.jpg", classes.index(line.split(" ", 1)[1]))
            for part, word in LISTS
            for line in _lines(place / f"data/images_variant_{word}.txt")
        ],
        classes,
    )


def _voc2007(place: Path) -> Listing:
    """ImageSets/Main/train.txt: a name a line; Annotations/NAME.xml: its objects.

    As in the challenge, an image whose objects of a class are all marked difficult counts neither for nor against it.
    """
    rows: list[Row] = []
    for part, word in LISTS:
        for name in _lines(place / f"ImageSets/Main/{word}.txt"):
            shown = [0] * len(VOC_CLASSES)
            for item in ElementTree.parse(place / f"Annotations/{name}.xml").getroot().iter("object"):
                column = VOC_CLASSES.index(item.findtext("name", "").strip())
                difficult = item.findtext("difficult", "0").strip() == "1"
                shown[column] = shown[column] if difficult and shown[column] == 1 else (-1 if difficult else 1)
            rows.append((part, f"JPEGImages/{name}.jpg", shown))
    return Listing(rows, list(VOC_CLASSES))


def _dtd(place: Path) -> Listing:
    """The first of the ten splits. labels/train1.txt: "banded/banded_0002.jpg" a line."""
    listed = [(part, line) for part, word in LISTS for line in _lines(place / f"labels/{word}1.txt")]
    classes = sorted({line.split("/")[0] for _, line in listed})
    return Listing([(part, f"images/{line}", classes.index(line.split("/")[0])) for part, line in listed], classes)


def _pets(place: Path) -> Listing:
    """annotations/trainval.txt: "Abyssinian_100 1 1 1" a line: image, class from 1, species, breed."""
    rows: list[Row] = []
    names: dict[int, str] = {}
    for part, word in zip(SIDES, ("trainval", "test"), strict=True):
        for line in _lines(place / f"annotations/{word}.txt"):
            image, label = line.split()[:2]
            rows.append((part, f"images/{image}.jpg", int(label) - 1))
            names[int(label) - 1] = image.rpartition("_")[0].replace("_", " ")
    return Listing(rows, [names[i] for i in range(len(names))])


def _caltech101(place: Path) -> Listing:
    """A folder for each class. The background is one of 102, which gives the papers' 3,060 and 6,084 images."""
    rows = _in_class_folders(place, "train")
    classes = sorted({label for _, _, label in rows})
    labels = np.array([classes.index(label) for _, _, label in rows])
    trained = set(label_subset(labels, CALTECH_TRAIN, seed=CALTECH_SEED).tolist())
    return Listing([(SIDES[i not in trained], path, int(labels[i])) for i, (_, path, _) in enumerate(rows)], classes)


def _flowers102(place: Path) -> Listing:
    """setid.mat: numbers of images; imagelabels.mat: a class from 1 for each number, which count from 1."""
    from torchvision.datasets import Flowers102

    sets, labels = _matlab(place / "setid.mat"), _matlab(place / "imagelabels.mat")["labels"]
    return Listing(
        [
            (part, f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1)
            for part, word in (("train", "trnid"), ("validation", "valid"), ("test", "tstid"))
            for number in np.atleast_1d(sets[word]).tolist()
        ],
        list(Flowers102.classes),
    )


def _birdsnap(place: Path) -> Listing:
    """train/, test/ and maybe validation/, with a folder for each class. torchvision does not know the set."""
    parts: list[Part] = ["train", "validation", "test"]
    there = [part for part in parts if (place / part).is_dir()]
    rows = [row for part in there for row in _in_class_folders(place, part, below=part)]
    classes = sorted({label for _, _, label in rows})
    index = {label: i for i, label in enumerate(classes)}
    return Listing([(part, path, index[label]) for part, path, label in rows], classes)


def _in_class_folders(place: Path, part: Part, below: str = "") -> list[tuple[Part, str, str]]:
    """Images in the sub-folders of `place / below`, sorted, with the sub-folder's name."""
    rows: list[tuple[Part, str, str]] = []
    for folder in sorted(entry for entry in (place / below).iterdir() if entry.is_dir()):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in ENDINGS:
                rows.append((part, file.relative_to(place).as_posix(), folder.name))
    return rows


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _matlab(file: Path) -> Any:
    from scipy.io import loadmat

    try:
        return loadmat(file, squeeze_me=True)
    except Exception as error:  # its reader raises nearly every kind of error on damaged bytes
        raise ValueError(f"{file.name} is no MATLAB file: {error}") from error


VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

LAYOUTS = {
    "food101": Layout(("food-101", "."), "meta/train.json", _food101),
    "birdsnap": Layout((".",), "train", _birdsnap, "the files are to lie in train/CLASS/ and test/CLASS/"),
    "sun397": Layout(("SUN397", "."), "ClassName.txt", _sun397),
    "cars": Layout(("stanford_cars", "."), "devkit/cars_train_annos.mat", _cars),
    "aircraft": Layout(("fgvc-aircraft-2013b", "."), "data/variants.txt", _aircraft),
    "voc2007": Layout(("VOCdevkit/VOC2007", "VOC2007", "."), "ImageSets/Main/test.txt", _voc2007),
    "dtd": Layout(("dtd/dtd", "dtd", "."), "labels/train1.txt", _dtd),
    "pets": Layout(("oxford-iiit-pet", "."), "annotations/trainval.txt", _pets),
    "caltech101": Layout(("caltech101/101_ObjectCategories", "101_ObjectCategories", "."), CALTECH_MARK, _caltech101),
    "flowers102": Layout(("flowers-102", "."), "setid.mat", _flowers102),
}
