"""Named, complete settings, each with its command, its cost and what to expect; and how one is chosen.

A recipe is data: `simclr recipes` prints it, `--recipe NAME` starts from it, every flag given beside it wins.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from simclr.config.pretrain import PretrainConfig, load_config
from simclr.errors import UserError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings with what they are for."""

    name: str
    summary: str
    command: str
    cost: str
    expect: str
    config: PretrainConfig
    min_steps: int = 0
    """With fewer images the epochs grow until training has this many steps."""


class ImageFacts(Protocol):
    """What the choice of a recipe looks at; `simclr.data.Images` has it."""

    @property
    def channels(self) -> int:
        """1 (gray) or 3 (RGB)."""

    @property
    def sizes(self) -> "np.ndarray":
        """(n, 2) heights and widths in pixels."""

    def __len__(self) -> int: ...


_SMALL = PretrainConfig(
    size=32,
    encoder="small",
    strength=0.5,
    crop_min=0.3,
    temperature=0.2,
    optimizer="adamw",
    lr=5e-3,
    lr_scaling="none",
    weight_decay=1e-4,
    warmup_epochs=1,
    loss_scale=1.0,
    batch_size=256,
    epochs=12,
    knn_every=3,
    log_every=50,
)

_V2 = PretrainConfig(  # SimCLR v2, without its memory, whose code the authors never released; --queue adds it
    size=224,
    encoder="resnet50",
    head_layers=3,
    temperature=0.1,
    lr=0.1,
    lr_scaling="sqrt",
    weight_decay=1e-4,
    batch_size=4096,
    epochs=800,
    warmup_epochs=40,
    workers=8,
    knn_every=0,
)

_CIFAR = PretrainConfig(  # what the recipes of the authors and of their papers have in common
    size=32,
    strength=0.5,
    encoder="resnet18",
    weight_decay=1e-4,
    epochs=1000,
    warmup_epochs=10,
    knn_every=20,
)

_MOCO = PretrainConfig(  # main_moco.py and moco/builder.py of facebookresearch/moco
    method="moco",
    size=224,
    augmentation="torchvision",
    strength=0.5,
    crop_min=0.2,
    encoder="torchvision/resnet50",
    head_norm=False,
    queue=65536,
    ema=0.999,
    temperature=0.2,
    loss_scale=1.0,
    optimizer="sgd",
    nesterov=False,
    lr=0.03,
    weight_decay=1e-4,
    decay_all=True,
    warmup_epochs=0,
    batch_size=256,
    epochs=200,
    global_bn=False,
    workers=8,
    knn_every=0,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="digits",
            summary="The digits inside scikit-learn: the whole path in two minutes on a laptop.",
            command="simclr pretrain digits --recipe digits --out runs/digits",
            cost="about a minute on two cores",
            expect="kNN near raw pixels (which are hard to beat on centred 8x8 digits), far above a random encoder",
            config=replace(
                _SMALL,
                lr=2e-3,
                size=8,
                flip=0.0,
                crop_min=0.4,
                epochs=150,
                warmup_epochs=5,
                knn_every=25,
                log_every=20,
            ),
        ),
        Recipe(
            name="cpu",
            summary="Any small images on a CPU: a 16-wide ResNet-10 with a strided stem, at 32 pixels and below, "
            "trained by Muon and read at all four stages.",
            command="simclr pretrain DATA --recipe cpu",
            cost="60,000 images of 28 pixels: less than a minute per epoch on two cores",
            min_steps=1500,
            expect="fashion-mnist after three epochs, held-out training images: 81 % linear accuracy from 500 labels, "
            "87 % from 5,000 (HOG features 81 and 85 %)",
            config=replace(
                _SMALL,
                stem="strided",
                feature="stages1-4",
                head_reads="h",
                scaling="standardised",
                optimizer="muon",
                lr=0.01,
                momentum=0.95,
            ),
        ),
        Recipe(
            name="cifar",
            summary="The authors' README command for CIFAR-10: ResNet-18, batch 512, 1,000 epochs.",
            command="simclr pretrain cifar10 --recipe cifar",
            cost="hours on one GPU; not for a CPU",
            expect="the authors' 91 % linear accuracy on CIFAR-10 (README of google-research/simclr), not reproduced "
            "here",
            config=replace(
                _CIFAR,
                head_layers=3,
                temperature=0.5,
                lr=1.0,
                batch_size=512,
            ),
        ),
        Recipe(
            name="cifar-r50",
            summary="The paper's CIFAR-10 (B.9): ResNet-50, batch 1024, 1,000 epochs, two-layer head.",
            command="simclr pretrain cifar10 --recipe cifar-r50",
            cost="about a day on one GPU",
            expect="the paper's 94.0 % linear accuracy on CIFAR-10 (B.9), not reproduced here",
            config=replace(
                _CIFAR,
                brightness="add",
                encoder="resnet50",
                temperature=0.5,
                lr=1.0,
                weight_decay=1e-6,
                batch_size=1024,
            ),
        ),
        Recipe(
            name="cifar-small-batch",
            summary="The authors' advice for CIFAR-10 with small batches (issue 166 of google-research/simclr): "
            "temperature 0.2, two-layer head of 64, rate 0.2 sqrt(batch); network, batch and length are ours.",
            command="simclr pretrain cifar10 --recipe cifar-small-batch",
            cost="as the recipe cifar; not for a CPU",
            expect="not measured here, and no figure of the authors is known for these settings",
            config=replace(
                _CIFAR,
                head_dim=64,
                temperature=0.2,
                lr=0.2,
                lr_scaling="sqrt",
                batch_size=256,
            ),
        ),
        Recipe(
            name="cifar-v2",
            summary="SimCLR v2's CIFAR-10 (appendix G, second-hand): ResNet-101 with selective kernels, two-layer "
            "head, temperature 0.2, batch 512, 800 epochs, no memory. Rate and weight decay are those of issue 166 and "
            "of v2 on ImageNet; the appendix's wider augmentations are not known here, and views are those of cifar.",
            command="simclr pretrain cifar10 --recipe cifar-v2",
            cost="days on one GPU",
            expect="the paper's 96.4 % linear accuracy on CIFAR-10 (second-hand), not reproduced here; it also "
            "fine-tunes on 250, 4,000 and 50,000 labels (`simclr finetune` with --labels 25/class, 400/class or none), "
            "by settings that are not known here",
            config=replace(
                _CIFAR,
                encoder="resnet101",
                sk=True,
                temperature=0.2,
                lr=0.2,
                lr_scaling="sqrt",
                batch_size=512,
                epochs=800,
                warmup_epochs=40,
            ),
        ),
        Recipe(
            name="cifar-fast",
            summary="CIFAR-10 in minutes on one GPU: dkobak/simclr-cifar10's settings, replayed from a CUDA graph.",
            command="simclr pretrain cifar10 --recipe cifar-fast",
            cost="20 million views; not measured yet on any GPU, and not for a CPU",
            expect="not measured yet; dkobak/simclr-cifar10 reports 83.2 % kNN and 85.6 % linear after 100 epochs, and "
            "90.3 % kNN after 500 (with --lr 0.03)",
            config=PretrainConfig(  # simclr-cifar10.py and README of dkobak/simclr-cifar10
                size=32,
                augmentation="torchvision",
                strength=0.5,
                crop_min=0.2,
                grayscale=0.1,
                encoder="torchvision/resnet18",
                stem="cifar",
                head_norm=False,
                temperature=0.5,
                loss_scale=1.0,
                optimizer="sgd",
                nesterov=False,
                lr=0.06,
                weight_decay=5e-4,
                decay_all=True,
                warmup_epochs=0,
                batch_size=512,
                epochs=200,
                cuda_graph=True,
                log_every=100,
                knn_every=0,
            ),
        ),
        Recipe(
            name="moco-v2",
            summary="MoCo v2 on ImageNet: ResNet-50, batch 256, 200 epochs, a queue of 65,536 keys.",
            command="torchrun --nproc-per-node 8 -m simclr pretrain IMAGENET/train --recipe moco-v2",
            cost="256 million images, two views each: the authors' 53 hours on 8 V100",
            expect="the authors' 67.5 % linear top-1 (README of facebookresearch/moco), not reproduced here",
            config=_MOCO,
        ),
        Recipe(
            name="moco-cifar",
            summary="MoCo's notebook for CIFAR-10: ResNet-18, linear head, batch 512, 200 epochs, 4,096 keys.",
            command="simclr pretrain cifar10 --recipe moco-cifar",
            cost="25 seconds per epoch on a V100 (the notebook); not for a CPU",
            expect="the notebook's 82.6 % kNN on CIFAR-10 after 200 epochs (k = 200), not reproduced here",
            config=replace(
                _MOCO,
                size=32,
                crop_min=0.08,
                blur=0.0,
                encoder="torchvision/resnet18",
                stem="cifar",
                head="linear",
                queue=4096,
                ema=0.99,
                temperature=0.1,
                lr=0.03,
                weight_decay=5e-4,
                batch_size=512,
                workers=2,
                knn_every=20,
            ),
        ),
        Recipe(
            name="moco-cpu",
            summary="MoCo v2 for small images on a CPU: the encoder, views and optimiser of the recipe cpu.",
            command="simclr pretrain DATA --recipe moco-cpu",
            cost="less per epoch than the recipe cpu, which trains on both views",
            min_steps=1500,
            expect="less than the recipe cpu in equal epochs; docs/moco.md has both on fashion-mnist",
            config=replace(
                _SMALL, stem="strided", method="moco", queue=4096, ema=0.99, head_norm=False, global_bn=False
            ),
        ),
        Recipe(
            name="photos",
            summary="A folder of photographs on one GPU: ResNet-50 at 224 pixels, batch 256, square-root scaling.",
            command="simclr pretrain FOLDER --recipe photos",
            cost="100,000 images: about a day on one GPU",
            expect="depends on the images: compare with `simclr evaluate`, and with features pretrained on ImageNet",
            config=PretrainConfig(
                size=224,
                encoder="resnet50",
                head_layers=3,
                temperature=0.1,
                lr=0.075,
                lr_scaling="sqrt",
                weight_decay=1e-6,
                batch_size=256,
                epochs=200,
                warmup_epochs=10,
                workers=8,
            ),
        ),
        Recipe(
            name="imagenet-v1",
            summary="SimCLR v1 on ImageNet: ResNet-50, batch 4096, 1,000 epochs, LARS.",
            command="torchrun --nproc-per-node 8 -m simclr pretrain IMAGENET/train --recipe imagenet-v1",
            cost="1.3 billion views forward and backward: days on eight GPUs; needs 512 images a GPU",
            expect="the paper's 69.3 % linear top-1 and 89.0 % top-5 (table 6), and 64.5 % top-1 after 100 epochs "
            "(table 1), not reproduced here",
            config=PretrainConfig(
                size=224,
                encoder="resnet50",
                brightness="add",
                temperature=0.1,
                lr=0.3,
                weight_decay=1e-6,
                batch_size=4096,
                epochs=1000,
                warmup_epochs=10,
                workers=8,
                knn_every=0,
            ),
        ),
        Recipe(
            name="v2-r50",
            summary="SimCLR v2 on ImageNet, its smallest network: ResNet-50, three-layer head, batch 4096, 800 epochs.",
            command="torchrun --nproc-per-node 8 -m simclr pretrain IMAGENET/train --recipe v2-r50",
            cost="5.0e19 operations: 18 hours on 8 GPUs if each does 100 TFLOP/s; 512 images a GPU",
            expect="the authors' 71.1 % linear top-1 (issue 77); with the memory, --queue 65536 --ema 0.999, 71.7 % "
            "and 57.9 / 68.4 % fine-tuned on 1 / 10 % of the labels (README of google-research/simclr); not reproduced "
            "here",
            config=_V2,
        ),
        Recipe(
            name="imagenet-small-batch",
            summary="The authors' advice for ImageNet with small batches (issue 166 of google-research/simclr, for "
            "arXiv:2011.02803): temperature 0.2 and rate 0.075 sqrt(batch), with the three-layer head of v2.",
            command="torchrun --nproc-per-node 8 -m simclr pretrain IMAGENET/train --recipe imagenet-small-batch",
            cost="the operations of v2-r50; 64 images a GPU",
            expect="the authors' 66.6 % linear top-1 after 100 epochs and 71.0 after 800, at batch 512 (table 2 of "
            "arXiv:2011.02803, second-hand), not reproduced here",
            config=replace(_V2, temperature=0.2, lr=0.075, batch_size=512),
        ),
        Recipe(
            name="v2-r101-2x-sk",
            summary="SimCLR v2 on ImageNet: ResNet-101 of double width with selective kernels, 257 million parameters.",
            command="torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST "
            "-m simclr pretrain IMAGENET/train --recipe v2-r101-2x-sk",
            cost="5.8e20 operations, 12 times v2-r50: 25 hours on 64 GPUs if each does 100 TFLOP/s; 64 images a GPU",
            expect="the authors' 79.0 % linear top-1, and 73.2 / 78.8 % fine-tuned on 1 / 10 % of the labels (README "
            "of google-research/simclr, with the memory, --queue 65536 --ema 0.999, worth about a point), not "
            "reproduced here",
            config=replace(_V2, encoder="resnet101", width=2.0, sk=True),
        ),
        Recipe(
            name="v2-r152-3x-sk",
            summary="SimCLR v2 on ImageNet, its largest network and teacher: ResNet-152 of triple width with selective "
            "kernels, 795 million parameters.",
            command="torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST "
            "-m simclr pretrain IMAGENET/train --recipe v2-r152-3x-sk",
            cost="1.9e21 operations, 39 times v2-r50: 42 hours on 128 GPUs if each does 100 TFLOP/s; 32 images a GPU",
            expect="the authors' 79.8 % linear top-1, and 74.9 / 80.1 % fine-tuned on 1 / 10 % of the labels (README "
            "of google-research/simclr, with the memory, --queue 65536 --ema 0.999, worth about a point), not "
            "reproduced here",
            config=replace(_V2, encoder="resnet152", width=3.0, sk=True),
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or one made of a settings file (a path that ends in .json)."""
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".json"):
        return Recipe(
            name=name,
            summary="Settings from a file.",
            command="",
            cost="",
            expect="",
            config=load_config(Path(name)),
        )
    raise UserError(f"There is no recipe {name!r}; there are {', '.join(RECIPES)}, or give the path of a config.json.")


def choose_recipe(images: ImageFacts, *, on_gpu: bool, method: str = "simclr") -> tuple[Recipe, str]:
    """A recipe for these images on this hardware, and the sentence that says why."""
    shorter = _typical_side(images)
    what = f"{len(images):,} images, shorter side typically {shorter} pixels"
    if method == "moco":
        name = "moco-cpu" if not on_gpu else "moco-cifar" if shorter <= 64 else "moco-v2"
        return RECIPES[name], f"{what}, {'a GPU' if on_gpu else 'no GPU'}"
    if shorter <= 12:
        return RECIPES["digits"], f"{what}: tiny images"
    if not on_gpu:
        return RECIPES["cpu"], f"{what}, no GPU"
    if shorter <= 64:
        return RECIPES["cifar"], f"{what}, a GPU"
    if len(images) >= 500_000:
        return RECIPES["imagenet-v1"], f"{what}, a GPU: ImageNet's scale"
    return RECIPES["photos"], f"{what}, a GPU"


def fit_recipe(recipe: Recipe, images: ImageFacts) -> tuple[PretrainConfig, dict[str, str]]:
    """Bend a recipe's own numbers to the images; what a user asks for by flag is not bent.

    Returns:
        The settings, and for each that was bent a sentence that says so.
    """
    config, said = recipe.config, {}
    shorter = _typical_side(images)
    if 4 <= shorter < config.size:
        said["size"] = f"Size {shorter} instead of {config.size}: most images have no more pixels a side."
        config = replace(config, size=shorter)
    if len(images) < config.batch_size and len(images) >= 2:
        batch = 1 << (len(images).bit_length() - 1)
        said["batch_size"] = f"Batch size {batch} instead of {config.batch_size}: there are {len(images)} images."
        config = replace(config, batch_size=batch)
    if config.queue + config.batch_size > len(images) >= 4:
        queue = fitting_queue(len(images))
        said["queue"] = f"A queue of {queue:,} keys instead of {config.queue:,}: there are {len(images):,} images."
        config = replace(config, queue=queue)
        if config.method == "moco" and queue + config.batch_size > len(images):
            said["batch_size"] = (
                f"Batch size {queue} instead of {recipe.config.batch_size}: batch and queue hold different images, and "
                f"there are {len(images):,}."
            )
            config = replace(config, batch_size=queue)
    if 2 <= len(images) * config.epochs < recipe.min_steps * config.batch_size:
        epochs = -(-recipe.min_steps * config.batch_size // len(images))
        longer = epochs / config.epochs
        said["epochs"] = f"{epochs} epochs instead of {config.epochs}: few images need more passes."
        config = replace(
            config, epochs=epochs, warmup_epochs=config.warmup_epochs * longer, knn_every=config.knn_every * longer
        )
    return config, said


def fitting_queue(num_images: int) -> int:
    """The largest power of two of keys that is at most half the images."""
    return 1 << max(num_images // 2, 1).bit_length() - 1


def settings_for(
    recipe: Recipe | None,
    images: ImageFacts,
    flags_over: Callable[[PretrainConfig], PretrainConfig],
    *,
    on_gpu: bool,
    say: Callable[[str], None],
) -> PretrainConfig:
    """The complete settings: recipe, bent to the images where no flag says otherwise, under the flags.

    Args:
        recipe: None: `choose_recipe` decides.
        flags_over: Settings -> those with what the user asks for on top.
        say: Told what was decided, and what seems odd.
    """
    if recipe is None:
        recipe, why = choose_recipe(images, on_gpu=on_gpu, method=flags_over(PretrainConfig()).method)
        say(f"Recipe {recipe.name} ({why}); --recipe chooses another.")
    if images.channels == 1 and flags_over(recipe.config).channels == "auto":
        say("Gray views: no hue, no saturation, no grayscale. --channels 3 makes three equal channels.")
    fitted, sentences = fit_recipe(recipe, images)
    config = flags_over(fitted)
    if config.encoder != fitted.encoder and fitted.feature != "h":  # which was chosen for the recipe's own encoder
        config = flags_over(replace(fitted, feature="h", head_reads=None))
    for name, sentence in sentences.items():
        if getattr(config, name) == getattr(fitted, name):
            say(sentence)
    if config.optimizer != fitted.optimizer and config.lr == fitted.lr:
        say(
            f"The rate of {config.lr:g} (scaling {config.lr_scaling}) was chosen for {fitted.optimizer}, not for "
            f"{config.optimizer}; give --lr and --lr-scaling."
        )
    longest = config.epochs / 10
    if config.epochs < fitted.epochs and config.warmup_epochs == fitted.warmup_epochs > longest:
        say(f"The warm-up takes {longest:g} epochs, a tenth of this run, which is shorter than the recipe's.")
        config = replace(config, warmup_epochs=longest)
    return config


def _typical_side(images: ImageFacts) -> int:
    """Median of the images' shorter sides, in pixels."""
    shorter_sides = images.sizes.min(axis=1)  # (n,)
    shorter_sides.sort()
    return int(shorter_sides[len(shorter_sides) // 2])
