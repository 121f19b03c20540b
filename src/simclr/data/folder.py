"""A folder of images as `Images`: labels from sub-folders or a label file, broken files found at opening.

Every file is decoded once, here or when its pack (`pack.py`) was made, so that a broken one is met now and not in the
night. Pixels come from the pack's memory map, if there is one. Else they stay in memory where all of them fit a
budget; else only the sizes are kept and each batch decodes its files again.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simclr.data.decode import decode_files
from simclr.data.images import Channels, Images, Skipped, Split, choose_channels, part_of
from simclr.data.labels import index_labels, read_label_file
from simclr.data.pack import Pack, Spot, open_pack, say_if_stale
from simclr.data.place import pack_place
from simclr.data.scan import Found, scan_folder, some
from simclr.errors import UserError

MEMORY_SHARE = 0.25
"""Share of the physical memory (or of the container's limit) that decoded pixels may take."""
MEMORY_MOST = 8 << 30
"""Bytes of decoded pixels kept at most, on machines with more than 32 GiB; other programs run there too."""
SMALLEST_SIDE = 16
"""Images shrunk further than this show nothing."""
TEST_FOLDERS = ("test", "val")
"""Names of the sub-folder that, beside train/, holds the test part; the first that is there counts."""


def open_folder(
    root: Path,
    *,
    split: Split = "train",
    labels: Path | None = None,
    strict: bool = False,
    channels: Channels = "auto",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    memory_budget: int | None = None,
    pack: str = "off",
    side: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Images:
    """Open the images of a folder, at any depth.

    With train/ and test/ (or val/) sub-folders the folder brings its own split. Labels are the names of the
    top-level sub-folders (of train/ and test/, where there are), if every image lies in one and there are
    two or more.

    Args:
        labels: CSV file of `path,label` lines instead of sub-folders.
        strict: A broken file is an error, not left out.
        workers: Decoding threads, here and in `Images.batch`; 0 decodes in the calling thread.
        progress: Called with (files done, files in all).
        memory_budget: Bytes of decoded pixels to keep; by default MEMORY_SHARE and MEMORY_MOST decide.
        pack: "off"; "auto": where decoding takes long, pixels are kept in the user's cache folder for all
            processes and runs; or the folder to keep them in. It changes no pixel.
        side: Images whose shorter side is longer are shrunk to it (`decode.shrink`), with a pack or without.
        say: Told at once what takes long or has gone wrong, while `notes` wait until the images are open.

    Raises:
        UserError: nothing usable, a label file that does not fit, with `strict` a broken file, a `side` too
            small, a pack among the images.
    """
    if side is not None and side < SMALLEST_SIDE:
        raise UserError(f"--pack-side was {side}; it must be at least {SMALLEST_SIDE} pixels.")
    scan = scan_folder(root, besides=labels)
    if not scan.files and not scan.skipped:
        raise UserError(f"There are no images in {root}: give a folder with .jpg, .png or other image files in it.")
    parts = _parts(scan.files)
    part = part_of(split, len(parts) > 0, str(root))
    prefixes = {"train": parts[:1], "test": parts[1:], "all": parts}[part] or [""]
    files = [file for file in scan.files if file.key.startswith(tuple(prefixes))]
    outside = len(scan.files) - sum(file.key.startswith(tuple(parts)) for file in scan.files) if parts else 0
    notes = [
        *scan.notes,
        *([f"{outside:,} images outside {' and '.join(parts)} ignored."] if outside else []),
        *([f"Images with a shorter side above {side} pixels are shrunk to {side} (--pack-side)."] if side else []),
    ]
    given = None
    if labels is not None:  # before the decoding, which may take long
        known = [item.key for item in (*scan.files, *scan.skipped)]
        given = index_labels(read_label_file(labels, root, [file.key for file in files], known))

    budget = _default_budget() if memory_budget is None else memory_budget
    packed = None
    place = pack_place(pack, root, scan.files, side)
    if place is not None:
        packed, said = open_pack(place, files, side=side, workers=workers, progress=progress, say=say)
        notes += said + say_if_stale(packed, scan.files)
    decoded = _decode_all(files, packed, side, workers, budget, progress)
    unreachable = [item for item in scan.skipped if item.key.startswith(tuple(prefixes))]
    skipped = sorted([*unreachable, *decoded.skipped])
    total = len(files) + len(unreachable)
    if skipped and (strict or not decoded.rows):
        _refuse(root, skipped, total, strict and len(decoded.rows) > 0)
    num_channels, said = choose_channels(channels, np.array(decoded.gray))
    notes += said
    if skipped:
        named = some([f"{item.key} ({item.reason})" for item in skipped], most=10)
        notes.append(f"{len(skipped):,} of {total:,} files left out: {named}.")
    if decoded.num_bytes > budget:
        notes.append(
            f"The decoded pixels{' of the others' if packed else ''} take {decoded.num_bytes / 2**30:.1f} GiB, and "
            f"{budget / 2**30:.1f} GiB may stay in memory: files are decoded again for each batch."
        )
    kept = [files[row] for row in decoded.rows]
    sizes = np.array(decoded.sizes, dtype=np.int64)
    if given is not None:
        image_labels, classes = given[0][decoded.rows], given[1]
        if (image_labels < 0).all():
            image_labels, classes = None, None
    else:
        image_labels, classes, said = _labels_from_folders(kept, scan.files, parts)
        notes += said
    return Images(
        name=root.resolve().name or str(root),
        split=part,
        has_own_split=len(parts) > 0,
        channels=num_channels,
        keys=[file.key for file in kept],
        sizes=sizes,
        labels=image_labels,
        classes=classes,
        fingerprint=_fingerprint(kept, sizes, image_labels),
        read=_Store(kept, sizes, decoded.lies, packed, side, workers),
        rows=np.arange(len(kept)),
        skipped=skipped,
        notes=notes,
    )


def _parts(files: Sequence[Found]) -> list[str]:
    """["train/", "test/"] where the folder brings its own split, else []."""
    tops = {file.key.partition("/")[0] for file in files if "/" in file.key}
    test = [name for name in TEST_FOLDERS if name in tops]
    return ["train/", f"{test[0]}/"] if "train" in tops and test else []


def _labels_from_folders(
    files: Sequence[Found], all_files: Sequence[Found], parts: Sequence[str]
) -> tuple[np.ndarray | None, list[str] | None, list[str]]:
    """Labels, classes and notes; the classes are those of both parts, so that a number means one class."""
    prefixes = parts or [""]
    folder_of = [_class_folder(file.key, prefixes) for file in files]
    if not any(folder_of):
        return None, None, []
    if not all(folder_of):
        return None, None, ["Images both in sub-folders and beside them: no labels taken from the folders."]
    everywhere = {_class_folder(file.key, prefixes) for file in all_files if file.key.startswith(tuple(prefixes))}
    classes = sorted(name for name in everywhere if name)
    if len(classes) < 2:
        return None, None, [f"All images lie in one sub-folder, {some(classes)}: no labels."]
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name] for name in folder_of], dtype=np.int64), classes, []


def _class_folder(key: str, prefixes: Sequence[str]) -> str:
    """Name of the top-level sub-folder that a file lies in, "" for none."""
    prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
    top, slash, _ = key.removeprefix(prefix).partition("/")
    return top if slash else ""


_Lies = Spot | np.ndarray | None
"""Where an image's pixels lie: in the pack, in memory, or nowhere, so that its file is decoded for each batch."""


class _Decoded(NamedTuple):
    rows: list[int]
    """Positions of the good files."""
    sizes: list[tuple[int, int]]
    gray: list[bool]
    lies: list[_Lies]
    skipped: list[Skipped]
    num_bytes: int
    """Pixels that are not in the pack; more than the budget are not kept."""


def _decode_all(
    files: Sequence[Found],
    pack: Pack | None,
    side: int | None,
    workers: int,
    budget: int,
    progress: Callable[[int, int], None] | None,
) -> _Decoded:
    """What the files hold: those that the pack knows without looking at them, the others decoded."""
    rows, sizes, gray, skipped = [], [], [], []
    lies: list[_Lies] = []
    num_bytes = done = 0
    known = [None if pack is None else pack.find(file) for file in files]
    new = [file.path for file, found in zip(files, known, strict=True) if found is None]
    decoded = decode_files(new, workers, side)
    for row, found in enumerate(known):
        result = next(decoded) if found is None else found
        if isinstance(result, str):
            skipped.append(Skipped(files[row].key, result))
        else:
            height, width, channels = result.shape
            rows.append(row)
            sizes.append((height, width))
            gray.append(channels == 1)
            if isinstance(result, np.ndarray):
                if num_bytes <= budget < num_bytes + result.nbytes:  # from here on none is kept
                    lies = [spot if isinstance(spot, Spot) else None for spot in lies]
                num_bytes += result.nbytes
            lies.append(result if isinstance(result, Spot) or num_bytes <= budget else None)
        if found is None:
            done += 1
            if progress is not None:
                progress(done, len(new))
    return _Decoded(rows, sizes, gray, lies, skipped, num_bytes)


def _refuse(root: Path, skipped: Sequence[Skipped], total: int, some_good: bool) -> None:
    first = f"{some([skipped[0].key])} ({skipped[0].reason})"
    if some_good:
        raise UserError(
            f"{len(skipped):,} of {total:,} files in {root} cannot be used, the first is {first}: mend or "
            "remove them, or open the folder without --strict, which leaves them out."
        )
    raise UserError(f"None of the {total:,} image files in {root} can be used, the first is {first}.")


@dataclass(frozen=True)
class _Store:
    """Rows -> pixels of the good files, wherever they lie."""

    files: Sequence[Found]
    sizes: np.ndarray
    lies: Sequence[_Lies]
    pack: Pack | None
    side: int | None
    workers: int

    def __call__(self, rows: np.ndarray) -> list[np.ndarray]:
        lies = [self.lies[row] for row in rows]
        for spot in lies:
            if isinstance(spot, Spot):
                spot.shard.expect(spot.row)
        ready = [self.pack.read(spot) if self.pack and isinstance(spot, Spot) else spot for spot in lies]
        again = self._decode([row for row, pixels in zip(rows, ready, strict=True) if pixels is None])
        return [next(again) if pixels is None else pixels for pixels in ready]

    def _decode(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        results = decode_files([self.files[row].path for row in rows], self.workers, self.side)
        for row, result in zip(rows, results, strict=True):
            height, width = self.sizes[row]
            if isinstance(result, str) or result.shape[:2] != (height, width):
                now = result if isinstance(result, str) else f"{result.shape[0]} x {result.shape[1]} pixels"
                raise UserError(
                    f"{self.files[row].path} has changed since the data was opened: it was {height} x {width} pixels "
                    f"and is now {now}."
                )
            yield result


def _fingerprint(files: Iterable[Found], sizes: np.ndarray, labels: np.ndarray | None) -> str:
    digest = sha256()
    for file in files:
        digest.update(f"{file.key}\0{file.num_bytes}\0".encode())
    digest.update(sizes.astype("<i8").tobytes())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _default_budget() -> int:
    """Bytes of pixels to keep: MEMORY_SHARE of what this process may have, at most MEMORY_MOST."""
    limits = [4 * MEMORY_MOST]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # no such limit, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(MEMORY_MOST, int(MEMORY_SHARE * min(limits)))
