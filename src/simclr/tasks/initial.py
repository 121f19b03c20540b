"""Weights that pretraining begins from (`--init`): opened, compared with the settings, and kept in RUN/init.

RUN/init is the encoder at step 0, with the projection head if that goes on too. It makes a run independent of the place
that the weights came from: `simclr resume` begins from it, and `simclr evaluate --compare init` measures it.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simclr.config.encoder import TIMM, TORCHVISION, EncoderConfig, Feature
from simclr.config.overrides import Overrides
from simclr.config.pretrain import PretrainConfig
from simclr.errors import UserError
from simclr.evaluation.subjects import EXTERNAL_SIZE
from simclr.methods.method import Method, reads_beside
from simclr.models.encoder import Encoder, build_encoder, read_as, with_config
from simclr.models.heads import ProjectionHead
from simclr.tasks.opening import load_model
from simclr.training.run import RunFolder
from simclr.views.policy import AugmentationPreset
from simclr.weights.folder import Model, digest_of, load_quietly, save_encoder
from simclr.weights.training_progress import TrainingProgress

PARTS_OF_RUNS = ("encoder", "key_encoder", "init")
"""Folders in a run that hold an encoder, whose names alone say nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialWeights:
    """An encoder, perhaps with its projection head, as training begins with it; on the CPU, and not trained itself."""

    name: str
    """timm/NAME, torchvision/NAME, or the name of a folder without its path."""
    encoder: Encoder
    """With the size and the features that the settings ask for."""
    head: ProjectionHead | None
    """None: there was none."""
    progress: TrainingProgress | None
    """How far the training of these weights had come; None: unknown."""

    def new_encoder(self, feature: Feature) -> Encoder:
        """A copy to train, with the features that the projection head reads."""
        return deepcopy(read_as(self.encoder, feature)).train()

    def head_for(self, method: Method) -> ProjectionHead | None:
        """The head, if the method publishes one of this shape that reads the same; None: the method's new one stays."""
        own = method.published().get("head")
        if self.head is None or not isinstance(own, ProjectionHead):
            return None
        shapes = [{name: tensor.shape for name, tensor in head.state_dict().items()} for head in (self.head, own)]
        return self.head if self.head.to_dict() == own.to_dict() and shapes[0] == shapes[1] else None

    def put_head(self, method: Method) -> None:
        """Give the head, if it fits, to a method that was built on `new_encoder`, and to its momentum encoder's."""
        head = self.head_for(method)
        if head is None:
            return
        networks = method.published()
        for network in (networks.get("head"), networks.get("key_head")):
            if network is not None:
                network.load_state_dict(head.state_dict())

    def record(self, method: Method) -> dict[str, Any]:
        """What run.json states of them: what they are, whatever their place."""
        return _record(self.name, self.encoder, self.head_for(method))

    def save(self, folder: Path, method: Method, preprocessing: AugmentationPreset) -> None:
        """Write the folder that `kept_weights` reads."""
        save_encoder(
            self.encoder, folder, preprocessing=preprocessing, origin={"initial weights": self.name},
            head=self.head_for(method), progress=self.progress,
        )  # fmt: skip

    def sentence(self, method: Method) -> str:
        """Where training begins, for the middle of a sentence."""
        if self.head_for(method) is not None:
            return f", from the weights of {self.name} and their projection head"
        reason = "they have none" if self.head is None else "theirs has another shape"
        return f", from the weights of {self.name} with a new projection head ({reason})"


def open_initial(
    settings: PretrainConfig, overrides: Overrides, *, main: bool = True, pretrained: bool = True
) -> tuple[InitialWeights | None, Overrides]:
    """The weights that the settings name, and the user's settings with what follows from the weights.

    Args:
        settings: Those of the recipe with the user's on top.
        overrides: The user's alone.
        main: Whether this process prints messages.
        pretrained: Whether models of timm and torchvision bring their weights, which are downloaded on first use; else
            they have random ones, which is enough to count memory and time.

    Returns:
        None without `settings.init`.

    Raises:
        UserError: There are no such weights, they cannot be trained, or a setting contradicts them.
    """
    if settings.init is None:
        return None, overrides
    given = set(overrides.values)
    if "init" not in given:  # a config.json of a run that was begun from weights: its size and features are part of it
        given |= {"size", "feature", "head_reads"}
    size = settings.size if "size" in given else None
    feature = settings.feature if "feature" in given else None
    place = settings.init
    if place.startswith((TIMM, TORCHVISION)):
        model = _external(place, settings, size, feature, pretrained=pretrained)
    else:
        path = Path(place).expanduser()
        if not path.exists():
            raise UserError(
                f"There are no weights {place!r} to begin from; give --init the folder of a run or of an encoder, "
                f"{TIMM}NAME or {TORCHVISION}NAME."
            )
        model = load_model(path, main=main)
        place = str(path.resolve())
    encoder = _with_settings(model.encoder, settings.init, size, feature)
    _refuse_contradictions(encoder.config, settings, given)
    head_reads = None
    if model.head is not None:  # it reads what it has read so far, whatever the encoder is to return
        reads = model.head.reads or model.encoder.config.feature
        head_reads = None if reads == encoder.config.feature else reads
        model.head.reads = reads_beside(reads, encoder.config.feature, settings.scaling)
    decided = {"init": place, **_settings_of(encoder.config, settings)}
    if "head_reads" not in given:
        decided["head_reads"] = head_reads
    initial = InitialWeights(name=_short(place), encoder=encoder, head=model.head, progress=model.progress)
    return initial, Overrides({**overrides.values, **decided})


def kept_weights(run: RunFolder) -> InitialWeights | None:
    """The initial weights of a run that has begun, from RUN/init; the place that they came from is not read.

    Returns:
        None for a run that began from random weights.

    Raises:
        UserError: They are gone or damaged, or are not those that the run began with.
    """
    config = run.config
    if config.init is None:
        return None
    remedy = f"restore {run.init}, or start a new run"
    began = run.origin.get("inputs", {}).get("init")
    try:
        model = load_quietly(run.init)
    except UserError as error:
        raise UserError(f"The weights that {run.path} began from cannot be read ({error}); {remedy}.") from None
    name = _short(config.init)
    if _record(name, model.encoder, model.head) != began:
        raise UserError(f"{run.init} no longer holds the weights that {run.path} began from; {remedy}.")
    return InitialWeights(name=name, encoder=model.encoder, head=model.head, progress=model.progress)


def _external(
    name: str, settings: PretrainConfig, size: int | None, feature: Feature | None, *, pretrained: bool
) -> Model:
    """A model of timm or torchvision. Gray images are shown to it in colour, unless --channels 1 asks timm to adapt."""
    config = EncoderConfig(
        name=name, channels=1 if settings.channels == "1" else 3, size=size or EXTERNAL_SIZE, feature=feature or "h"
    )
    return Model(build_encoder(config, pretrained=pretrained), "torchvision")


def _with_settings(encoder: Encoder, name: str, size: int | None, feature: Feature | None) -> Encoder:
    """The encoder for images of this size, with these features; the stem is the one that its weights are of."""
    own = encoder.config
    if not any(True for _ in encoder.parameters()):
        raise UserError(f"{name} can only be computed, not trained; give --init the folder that it was exported from.")
    if own.channels not in (1, 3):
        raise UserError(f"{name} takes images of {own.channels} channels, and pretraining has gray or colour ones.")
    config = replace(
        own,
        size=size or own.size,
        feature=feature or own.feature,
        scaling="none",
        stem=own.stem if own.is_external else own.resolved_stem,
    )
    try:
        return with_config(encoder, config)
    except RuntimeError:  # torch's list of shapes
        raise UserError(
            f"--size was {size}, and the weights of {name} are for images of {own.size} pixels alone; leave it out."
        ) from None


def _settings_of(config: EncoderConfig, settings: PretrainConfig) -> dict[str, Any]:
    """The settings that an encoder decides."""
    channels = settings.channels
    if config.channels == 3 or channels == "3":
        channels = "3" if config.channels == 3 else "auto"
    return {
        "encoder": config.name, "width": config.width, "stem": config.stem, "sk": config.sk, "size": config.size,
        "feature": config.feature, "channels": channels,
    }  # fmt: skip


def _refuse_contradictions(config: EncoderConfig, settings: PretrainConfig, given: set[str]) -> None:
    """Reject flags of the architecture that the weights do not have."""
    own = {
        "encoder": config.name, "width": config.width, "stem": config.stem, "sk": config.sk,
        "channels": str(config.channels),
    }  # fmt: skip
    for name, value in own.items():
        asked = getattr(settings, name)
        if name in given and asked not in (value, "auto"):
            raise UserError(
                f"--{name} was {asked}, and the encoder of --init {settings.init} has {value}, which its weights are "
                f"for; leave --{name} out, or begin from other weights."
            )


def _short(place: str) -> str:
    """How messages, tables and records name the weights: no path of this machine is in it."""
    if place.startswith((TIMM, TORCHVISION)):
        return place
    parts = Path(place).parts
    return "/".join(parts[-2:] if parts[-1] in PARTS_OF_RUNS else parts[-1:])


def _record(name: str, encoder: Encoder, head: ProjectionHead | None) -> dict[str, Any]:
    return {
        "name": name,
        "weights": digest_of(encoder),
        "network": encoder.config.to_dict(),
        "head": None if head is None else digest_of(head),
    }
