"""Data: a name or a path in, a `Source` out.

`open_data("digits")`, `open_data("photos/")` and `open_data("set.npz")` all give `Images`: uint8 pixels in batches,
labels where there are any, and notes for the user. Nothing here imports torch, except torchvision inside the one
function that reads its sets, and `forms.py`, which takes tensors.

Shapes: n images, B of them in a batch, H x W pixels, C = 1 (gray) or 3 (RGB) channels.
"""

from simclr.data.images import Images
from simclr.data.opening import NAMES, open_data
from simclr.data.source import Skipped, Source
from simclr.data.splits import label_subset, split_indices

__all__ = ["NAMES", "Images", "Skipped", "Source", "label_subset", "open_data", "split_indices"]
