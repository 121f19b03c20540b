"""Any number of images as evaluation views, a batch at a time: memory that does not grow with their number.

A folder's files are listed (their names are all that is kept of each), then decoded by threads that turn every image
into its view at once. So a few images of full size exist at a time, however large they are, and one batch of views.
Arrays and named sets are in memory already, and are taken in parts.

Shapes: B images of a batch, C channels, S x S pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from simclr.data.images import Images, require_no_colour, with_channels
from simclr.data.opening import open_data
from simclr.data.readers.decode import decode_file, in_order
from simclr.data.readers.files import Reading
from simclr.data.readers.named import NAMES
from simclr.data.readers.scan import Found, scan_folder
from simclr.data.source import Skipped
from simclr.errors import UserError
from simclr.views.policy import AugmentationPreset
from simclr.views.views import eval_images

LeaveOut = Callable[[Skipped], None]


class Batch(NamedTuple):
    """Some images, in the order of the keys of all."""

    keys: Sequence[str]
    views: Tensor
    """(B, C, S, S) float32 in [0, 1], on the CPU; not to be kept, the next batch lies in the same memory."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What an encoder expects to see."""

    channels: int
    size: int
    preset: AugmentationPreset


def stream_views(source: str, view: View, *, batch_size: int, how: Reading, leave_out: LeaveOut) -> Iterator[Batch]:
    """The evaluation views of all images of a folder (at any depth), an .npz file or a named set, of every split.

    Args:
        source: As `open_data` takes it.
        batch_size: Images in a batch; only the last one has fewer.
        how: Threads, largest side, and who is told of progress; nothing is packed.
        leave_out: Told of each file that cannot be read.

    Raises:
        UserError: There is nothing at `source`; or an image in colour for an encoder of gray ones, once it is met.
    """
    path = Path(source).expanduser()
    if source.partition(":")[0] in NAMES or not path.is_dir():
        yield from _in_memory(source, view, batch_size, how, leave_out)
        return
    scan = scan_folder(path)
    for note in scan.notes:
        how.say(note)
    for skipped in scan.skipped:
        leave_out(skipped)
    if not scan.files and not scan.skipped:
        raise UserError(f"There are no images in {path}: give a folder with .jpg, .png or other image files in it.")
    yield from _from_files(scan.files, view, batch_size, how, leave_out)


def _from_files(
    files: Sequence[Found], view: View, batch_size: int, how: Reading, leave_out: LeaveOut
) -> Iterator[Batch]:
    rows = min(batch_size, len(files))
    batch = torch.empty(rows, view.channels, view.size, view.size).to(memory_format=torch.channels_last)
    keys: list[str] = []
    made = in_order(partial(_view_of, view=view, side=how.side), (file.path for file in files), how.workers)
    for done, (file, result) in enumerate(zip(files, made, strict=True), start=1):
        if isinstance(result, str):
            leave_out(Skipped(file.key, result))
        else:
            batch[len(keys)] = result
            keys.append(file.key)
        if how.progress is not None:
            how.progress(done, len(files))
        if len(keys) == rows or (keys and done == len(files)):
            yield Batch(keys, batch[: len(keys)])
            keys = []


def _view_of(path: Path, view: View, side: int | None) -> Tensor | str:
    """(C, S, S) of a file, or why there is none."""
    pixels = decode_file(path, side)  # (H, W, 1 or 3)
    if isinstance(pixels, str):
        return pixels
    require_no_colour(pixels.shape[2], view.channels, str(path), who="The model")
    return eval_images([with_channels(pixels, view.channels)], view.size, view.preset)[0]


def _in_memory(source: str, view: View, batch_size: int, how: Reading, leave_out: LeaveOut) -> Iterator[Batch]:
    channels = "3" if view.channels == 3 else "auto"
    images: Images = open_data(
        source, split="all", channels=channels, workers=how.workers, progress=how.progress, side=how.side, say=how.say
    )
    for note in images.notes:
        how.say(note)
    for skipped in images.skipped:
        leave_out(skipped)
    require_no_colour(images.channels, view.channels, images.name, who="The model")
    for begin in range(0, len(images), batch_size):
        rows = range(begin, min(begin + batch_size, len(images)))
        fitted = [with_channels(pixels, view.channels) for pixels in images.read(rows, copy=False)]
        yield Batch([images.keys[row] for row in rows], eval_images(fitted, view.size, view.preset))
        if how.progress is not None:
            how.progress(rows.stop, len(images))
