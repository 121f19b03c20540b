"""`simclr embed MODEL DATA --out FILE.npz`: the features of images, with their keys and labels.

Features are written batch by batch, so that a million images need the memory of a thousand, but for their names.
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.lib import format as npy

from simclr.data.images import Images, fit_channels
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.files import replacing, writing
from simclr.models.encoder import Encoder
from simclr.models.inference import device_of, inference, require_finite
from simclr.models.layers import LayerOutput, require_layer
from simclr.tasks.opening import (
    DataOptions,
    LeftOut,
    load_model,
    open_aloud,
    require_writable,
    side_of,
    tell_if_replaced,
)
from simclr.training.progress import counting, say
from simclr.views.policy import AugmentationPreset
from simclr.views.stream import stream_views

if TYPE_CHECKING:
    from simclr.tasks.options.using import Embed

MAX_COPY_ROWS = 4096  # rows in memory at a time while a file is copied
_FEATURES = "features.npy"


def embed(options: "Embed") -> None:
    """`simclr embed RUN DATA --out FILE.npz`: features, keys and labels of every image of every split."""
    require_writable(options.out)
    if options.layer is not None:
        require_layer(options.layer)
    tell_if_replaced(options.out)
    model = load_model(options.run, device=options.device)
    network: Encoder | LayerOutput = model.encoder
    if options.layer is not None:
        network = LayerOutput(model.encoder, model.head, options.layer, who=str(options.run)).eval()
    world, opened = DistributedContext(), DataOptions.of(options)
    opened = replace(opened, side=side_of(options.run, options.data, options.pack_side))
    reading = replace(opened.reading(world), memory_budget=0)  # each image is read once
    images = open_aloud(options.data, world, reading, split="all", labels=opened.labels)
    images = fit_channels(images, model.encoder.config.channels)
    bad = LeftOut()
    with writing(options.out):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(options.out) as temporary:
            kept = _write(temporary, network, model.preprocessing, images, bad)
    bad.tell(len(kept))
    of_layer = f" of {network.name}" if isinstance(network, LayerOutput) else ""
    say(f"{len(kept):,} features{of_layer} of width {network.num_features} are in {options.out}.")


def _write(
    path: Path, network: Encoder | LayerOutput, preprocessing: AugmentationPreset, images: Images, bad: LeftOut
) -> np.ndarray:
    """Write the archive; which images have features in it.

    The shape of an array stands before its numbers, and how many images can be decoded is known behind them: where
    some are damaged, the rows of the others are copied to a second archive that takes the place of the first.
    """
    width, parts = network.num_features, []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive, counting("Embedding") as progress:
        with _member(archive, _FEATURES, (len(images), width), np.dtype("<f4")) as file:
            batches = stream_views(
                images, size=network.config.size, preset=preprocessing, leave_out=bad.add,
                device=device_of(network), progress=progress,
            )  # fmt: skip
            with inference(network):
                for batch in batches:
                    features = network(batch.views).float().cpu().numpy()  # (B, F)
                    require_finite(features, "network's", first=int(batch.indices[0]))
                    parts.append(batch.indices)
                    file.write(np.ascontiguousarray(features, "<f4").data)
            kept = np.concatenate([*parts, np.zeros(0, np.int64)])
            if not len(kept):
                raise UserError(f"None of the {len(images):,} images can be decoded: {bad.named()}.")
            for _ in range(len(images) - len(kept)):  # to the shape that was stated
                file.write(bytes(4 * width))
        if len(kept) == len(images):
            _write_rest(archive, images, kept)
            return kept
    _copy_rows(path, images, kept, width)
    return kept


def _copy_rows(path: Path, images: Images, kept: np.ndarray, width: int) -> None:
    """Replace the archive by one whose features are the first rows alone, those of the images at `kept`."""
    with (
        replacing(path) as second,
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(second, "w", zipfile.ZIP_STORED) as new,
    ):
        with old.open(_FEATURES) as source, _member(new, _FEATURES, (len(kept), width), np.dtype("<f4")) as file:
            npy.read_magic(source)
            npy.read_array_header_1_0(source)
            for begin in range(0, len(kept), MAX_COPY_ROWS):
                file.write(source.read(4 * width * min(MAX_COPY_ROWS, len(kept) - begin)))
        _write_rest(new, images, kept)


def _write_rest(archive: zipfile.ZipFile, images: Images, kept: np.ndarray) -> None:
    """Keys and, where there are any, labels and classes of the images at `kept`."""
    names = images.keys if len(kept) == len(images) else [images.keys[i] for i in kept.tolist()]
    longest = max(map(len, names), default=1)
    with _member(archive, "keys.npy", (len(names),), np.dtype(f"<U{max(1, longest)}")) as file:
        for begin in range(0, len(names), MAX_COPY_ROWS):
            file.write(np.array(names[begin : begin + MAX_COPY_ROWS], f"<U{max(1, longest)}").tobytes())
    if images.labels is None:
        return
    arrays = {"labels": images.labels[kept]}  # -1: no label
    if images.classes is not None:
        arrays["classes"] = np.array(images.classes)
    for name, array in arrays.items():
        with _member(archive, f"{name}.npy", array.shape, array.dtype) as file:
            file.write(array.tobytes())


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[IO[bytes]]:
    """A member of an .npz file to which the bytes of an array in C order are written, as numpy.savez writes it."""
    with archive.open(name, "w", force_zip64=True) as file:
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        yield file
