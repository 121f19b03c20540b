"""How a process uses its device: which kernels, in which precision, and whether the images lie there."""

import os
from typing import Literal

import torch

from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.training.malloc import keep_freed_memory
from simclr.training.progress import say
from simclr.views.device_images import DeviceImages, decoded_bytes

RESIDENT_SHARE = 0.25  # of a GPU's free memory that the decoded images may take for good


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        UserError: torch knows no such device, or sees no such GPU here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"The device was {name!r}; it must be auto, cpu, cuda, or one GPU such as cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"The device was {name!r}, and torch sees {torch.cuda.device_count()} GPUs here; use cpu or auto."
        )
    return device


def choose_kernels(world: DistributedContext, *, deterministic: bool) -> None:
    """On a GPU: the fastest kernels, or, if asked for, only those that give the same bits each time."""
    if world.device.type == "cpu":
        keep_freed_memory()
    if world.device.type == "cuda":
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = not deterministic


def same_threads(began: int, world: DistributedContext) -> None:
    """Sums on a CPU depend on the number of threads: take the number that a run began with."""
    if world.device.type == "cpu" and torch.get_num_threads() != began:
        say(f"Using {began} CPU threads, as the run did when it began.", main=world.is_main)
        torch.set_num_threads(began)


def precision_of(precision: Literal["auto", "fp32", "bf16"], world: DistributedContext) -> torch.dtype:
    """Of the forward pass, as torch.autocast takes it.

    Raises:
        UserError: bf16 on a CPU.
    """
    on_gpu = world.device.type == "cuda"
    if precision == "bf16" and not on_gpu:
        raise UserError(
            "--precision was bf16 on a CPU, where it is up to hundreds of times slower than fp32; leave it at auto."
        )
    if precision == "fp32" or not on_gpu:
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32


def keep_on_gpu(images: Images, world: DistributedContext) -> tuple[DeviceImages | None, str]:
    """All images decoded on the GPU, so that none crosses the bus again, or None where they do not fit; and a sentence.

    Only for a device that makes views of images that lie there (`augment.views.has_kernels`).
    """
    free, _ = torch.cuda.mem_get_info(world.device)
    taken = f"The images take {decoded_bytes(images) / 1e9:.2f} GB decoded, of {free / 1e9:.1f} GB free on the GPU"
    if decoded_bytes(images) > RESIDENT_SHARE * free:
        return None, f"{taken}: more than {RESIDENT_SHARE:.0%}, so each batch is sent there."
    return DeviceImages.of(images, world.device), f"{taken}: they stay there."
