"""`simclr embed MODEL DATA --out FILE.npz`: the features of images, with their keys and labels."""

import io
from typing import TYPE_CHECKING

import numpy as np

from simclr.data.images import fit_channels
from simclr.distributed import DistributedContext
from simclr.models.inference import extract
from simclr.tasks.opening import load_model, open_aloud, require_writable, side_of, tell_if_replaced, write
from simclr.training.progress import counting, say

if TYPE_CHECKING:
    from simclr.tasks.options.using import Embed


def embed(args: "Embed") -> None:
    """`simclr embed RUN DATA --out FILE.npz`: features, keys and labels of every image of every split."""
    require_writable(args.out)
    tell_if_replaced(args.out)
    model = load_model(args.run, device=args.device)
    side = side_of(args.run, args.data, args.pack_side)
    labels = str(args.labels_file) if args.labels_file else None
    images = open_aloud(args.data, DistributedContext(), split="all", labels=labels, pack=args.pack, side=side)
    images = fit_channels(images, model.encoder.config.channels)
    with counting("Embedding") as progress:
        features = extract(model.encoder, images, preset=model.preprocessing, progress=progress)
    arrays: dict[str, np.ndarray] = {"features": features, "keys": np.array(list(images.keys))}
    if images.labels is not None:
        arrays["labels"] = images.labels  # -1: no label
        if images.classes is not None:
            arrays["classes"] = np.array(images.classes)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write(args.out, buffer.getvalue())
    say(f"{len(images):,} features of width {features.shape[1]} are in {args.out}.")
