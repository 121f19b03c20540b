"""Labels of any kind as indices into a list of classes, and the label file of a folder.

A label file is CSV: one `path,label` a line, paths below the data's folder, an empty label for "not known". A label
list is one file name a line: the images that keep their label.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simclr.data.images import Images
from simclr.data.source import some
from simclr.data.splits import label_subset
from simclr.errors import UserError

UNLABELLED = -1


def index_labels(names: Sequence[str | None]) -> tuple[np.ndarray, list[str]]:
    """Class names as indices.

    Args:
        names: n class names, None for an image without one.

    Returns:
        (n,) int64 indices into the classes, -1 for None; and the classes, sorted: by value if all are whole
        numbers.
    """
    known = {name for name in names if name is not None}
    whole = all(_is_whole(name) for name in known)
    classes = sorted(known, key=lambda name: (int(name) if whole else 0, name))
    index = {name: i for i, name in enumerate(classes)}
    return np.array([UNLABELLED if name is None else index[name] for name in names], dtype=np.int64), classes


def labelled(images: Images) -> Images:
    """The images that have a label.

    Raises:
        UserError: None has.
    """
    if images.labels is None or not (images.labels >= 0).any():
        raise UserError(
            f"{images.name} has no labels, and they are needed here; give a folder with one sub-folder per class "
            "(or --labels-file with path,label lines), or an .npz file with y. Only `simclr evaluate --protocol "
            "label-free` needs none."
        )
    return images.subset(np.flatnonzero(images.labels >= 0))


def require_classes(learn: Images, test: Images) -> None:
    """Reject training images of a single class, or without a class that the test images have."""
    assert learn.labels is not None and test.labels is not None
    known = np.unique(learn.labels)
    if len(known) < 2:
        raise UserError(f"{learn.name} has a single class among the images to learn from; two are needed.")
    unknown = np.setdiff1d(test.labels, known)
    if len(unknown):
        names = some(test.label_names(unknown))
        raise UserError(
            f"{test.name} has test images of {len(unknown)} classes of which none is there to learn from ({names}); "
            "give labelled training images of each class, or more --labels."
        )


def chosen_by(labels: str, images: Images, *, seed: int) -> np.ndarray:
    """Rows of the images that --labels names: a share, a number a class, or a file of their names."""
    if Path(labels).is_file():
        return read_label_list(Path(labels), images)
    assert images.labels is not None
    return label_subset(images.labels, labels, seed=seed)


def read_label_file(file: Path, folder: Path, wanted: Sequence[str], known: Sequence[str]) -> list[str | None]:
    """Labels of images from a CSV file.

    Args:
        file: Lines `path,label`; a first line that says just that is skipped. A path is below `folder`, or
            absolute.
        folder: The folder of the images, for the sentences.
        wanted: n keys of the images to label.
        known: Keys of all files in the folder, of both parts, readable or not.

    Returns:
        n labels, None where the file leaves the label empty.

    Raises:
        UserError: no such file, not CSV, lines that are not `path,label`, paths that are not in the folder,
            a path with two labels, images that are not named.
    """
    given: dict[str, str | None] = {}
    known_keys = set(known)
    unknown: list[str] = []
    for line, path, label in _rows(file):
        key = path if path in known_keys else _normal(path, folder)
        if key not in known_keys:
            unknown.append(path)
            continue
        if given.setdefault(key, label) != label:
            raise UserError(f"{file}, line {line}: {some([path])} has two labels, {given[key]!r} and {label!r}.")
    if unknown:
        raise UserError(
            f"{file} names {len(unknown):,} files that are not images in {folder}: {some(unknown)}; "
            "paths are to be relative to that folder."
        )
    missing = [key for key in wanted if key not in given]
    if missing:
        raise UserError(
            f"{file} labels {len(wanted) - len(missing):,} of {len(wanted):,} images in {folder}, it lacks "
            f"{some(missing)}; an image without a label is written with an empty one ('path,')."
        )
    return [given[key] for key in wanted]


def read_label_list(file: Path, images: Images, *, need_labels: bool = True) -> np.ndarray:
    """Which images a list names, for the semi-supervised protocol: those that keep their label.

    The lists that the authors published (google-research/simclr, imagenet_subsets/) work as they are.

    Args:
        file: One file name a line, such as n01440764_10026.JPEG, or the end of a path, such as cats/001.png.
        images: Each name is to be the end of one image's key.
        need_labels: Whether an image without a label is an error.

    Returns:
        (m,) int64 indices into `images`, sorted.

    Raises:
        UserError: no such file, none or several images of a name, a name that is there twice, an image without
            a label.
    """
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The list of labelled images {file} cannot be read: {error}.") from None
    names = [name.replace("\\", "/").removeprefix("./") for name in names if name]
    if not names:
        raise UserError(f"The list {file} is empty: give the file name of one labelled image per line.")
    with_name: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(images.keys):
        with_name[key.rpartition("/")[2]].append(i)
    missing: list[str] = []
    ambiguous: list[str] = []
    chosen: list[int] = []
    for name in names:
        matches = [i for i in with_name[name.rpartition("/")[2]] if f"/{images.keys[i]}".endswith(f"/{name}")]
        if len(matches) == 1:
            chosen.append(matches[0])
        else:
            (ambiguous if matches else missing).append(name)
    without = [images.keys[i] for i in chosen if images.labels is None or images.labels[i] < 0] if need_labels else []
    wrong = [
        f"{len(group):,} {what} ({some(group, max_named=3)})"
        for what, group in (
            ("are no image's name", missing),
            ("fit several images", ambiguous),
            ("are there more than once", [images.keys[i] for i, count in Counter(chosen).items() if count > 1]),
            ("have no label", without),
        )
        if group
    ]
    if wrong:
        raise UserError(
            f"{file} does not fit the {len(images):,} images of {images.name}: of its {len(names):,} names "
            f"{'; '.join(wrong)}. A name is the end of one image's path, and each is to be there once."
        )
    return np.sort(np.array(chosen, dtype=np.int64))


def _rows(file: Path) -> list[tuple[int, str, str | None]]:
    if not file.is_file():
        raise UserError(f"There is no label file {file}: give a CSV file with a line 'path,label' for each image.")
    rows = []
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines)
            for row in reader:
                cells = [cell.strip() for cell in row]
                if not any(cells) or (not rows and [cell.lower() for cell in cells] == ["path", "label"]):
                    continue
                if len(cells) != 2 or not cells[0]:
                    raise UserError(
                        f"{file}, line {reader.line_num}: expected 'path,label', found {','.join(row)!r:.80}."
                    )
                rows.append((reader.line_num, cells[0], cells[1] or None))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} cannot be read as a CSV file of 'path,label' lines: {error}.") from error
    return rows


def _normal(path: str, folder: Path) -> str:
    r"""A path as people write it (./a.png, a\b.png, /data/a.png) as a key."""
    candidate = Path(path.replace("\\", "/"))
    if candidate.is_absolute() and candidate.is_relative_to(folder.resolve()):
        candidate = candidate.relative_to(folder.resolve())
    return candidate.as_posix()


def _is_whole(name: str) -> bool:
    return name.isascii() and name.removeprefix("-").isdigit()
