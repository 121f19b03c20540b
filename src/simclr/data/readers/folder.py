"""A folder of images as `Images`: which files it holds, and labels from sub-folders or a label file.

`files.py` opens the files.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simclr.data.images import Images, Split, part_of
from simclr.data.labels import index_labels, read_label_file
from simclr.data.readers.files import FileList, Labelling, open_files
from simclr.data.readers.scan import FileEntry, scan_folder
from simclr.data.readers.store import Reading
from simclr.data.source import some
from simclr.errors import UserError

TEST_FOLDERS = ("test", "val")
"""Names of the sub-folder that, beside train/, holds the test part; the first that is there counts."""


def open_folder(
    root: Path,
    *,
    split: Split = "train",
    labels: Path | None = None,
    whole: bool = False,
    reading: Reading | None = None,
) -> Images:
    """Open the images of a folder, at any depth.

    With train/ and test/ (or val/) sub-folders the folder brings its own split. Labels are the names of the
    top-level sub-folders (of train/ and test/, where there are), if every image lies in one and there are
    two or more.

    Args:
        labels: CSV file of `path,label` lines instead of sub-folders.
        whole: Take every image, also where there are train/ and test/, and no labels from sub-folders.
        reading: How files become pixels.

    Raises:
        UserError: nothing usable, a label file that does not fit, a broken file where `reading` is strict, a pack among
            the images.
    """
    reading = reading or Reading()
    scan = scan_folder(root, besides=labels)
    if not scan.files and not scan.skipped:
        raise UserError(f"There are no images in {root}: give a folder with .jpg, .png or other image files in it.")
    parts = [] if whole else _parts(scan.files)
    part = part_of(split, len(parts) > 0, str(root))
    prefixes = {"train": parts[:1], "test": parts[1:], "all": parts}[part] or [""]
    files = [file for file in scan.files if file.key.startswith(tuple(prefixes))]
    outside = len(scan.files) - sum(file.key.startswith(tuple(parts)) for file in scan.files) if parts else 0
    given = None
    if labels is not None:  # before files are read, which may take long
        known = [item.key for item in (*scan.files, *scan.skipped)]
        given = index_labels(read_label_file(labels, root, [file.key for file in files], known))

    def label(rows: list[int]) -> Labelling:
        if whole:
            return Labelling()
        if given is None:
            return _labels_from_folders([files[row] for row in rows], scan.files, parts)
        known = given[0][rows]
        return Labelling(known, given[1]) if (known >= 0).any() else Labelling()

    return open_files(
        FileList(
            root=root,
            files=files,
            unreachable=[item for item in scan.skipped if item.key.startswith(tuple(prefixes))],
            every=scan.files,
            label=label,
            name=root.resolve().name or str(root),
            split=part,
            has_own_split=len(parts) > 0,
            notes=[*scan.notes, *([f"{outside:,} images outside {' and '.join(parts)} ignored."] if outside else [])],
        ),
        reading,
    )


def _parts(files: Sequence[FileEntry]) -> list[str]:
    """["train/", "test/"] where the folder brings its own split, else []."""
    tops = {file.key.partition("/")[0] for file in files if "/" in file.key}
    test = [name for name in TEST_FOLDERS if name in tops]
    return ["train/", f"{test[0]}/"] if "train" in tops and test else []


def _labels_from_folders(files: Sequence[FileEntry], all_files: Sequence[FileEntry], parts: Sequence[str]) -> Labelling:
    """Labels and classes; the classes are those of both parts, so that a number means one class."""
    prefixes = parts or [""]
    folder_of = [_class_folder(file.key, prefixes) for file in files]
    if not any(folder_of):
        return Labelling()
    if not all(folder_of):
        return Labelling(notes=["Images both in sub-folders and beside them: no labels taken from the folders."])
    everywhere = set(folder_of)
    if len(files) < len(all_files):
        everywhere |= {_class_folder(file.key, prefixes) for file in all_files if file.key.startswith(tuple(prefixes))}
    classes = sorted(name for name in everywhere if name)
    if len(classes) < 2:
        return Labelling(notes=[f"All images lie in one sub-folder, {some(classes)}: no labels."])
    index = {name: i for i, name in enumerate(classes)}
    return Labelling(np.array([index[name] for name in folder_of], dtype=np.int64), classes)


def _class_folder(key: str, prefixes: Sequence[str]) -> str:
    """Name of the top-level sub-folder that a file lies in, "" for none."""
    prefix = prefixes[0] if len(prefixes) == 1 else next(prefix for prefix in prefixes if key.startswith(prefix))
    top, slash, _ = key.removeprefix(prefix).partition("/")
    return top if slash else ""
