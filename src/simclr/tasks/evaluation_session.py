"""What an evaluation works on: opened images, models under test, caches and stores.

`simclr evaluate` measures on it; `simclr finetune` opens its images and its encoder in the same way.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from simclr.config.encoder import TIMM, TORCHVISION, EncoderConfig
from simclr.config.recipes import choose_recipe, fit_recipe
from simclr.data.fingerprint import SCHEME, first_scheme
from simclr.data.images import Images
from simclr.data.presets import TransferSet, open_transfer_set
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.cache import FeatureCache, open_cache
from simclr.evaluation.hog import MIN_SIZE
from simclr.evaluation.measure import ACCURACIES, EvaluationContext, Protocol, Settings, makes_sense, measure
from simclr.evaluation.metrics import SUPERVISED
from simclr.evaluation.results import Result, ResultStore
from simclr.evaluation.split import Split, split_data
from simclr.evaluation.subjects import (
    BASELINE_NAMES,
    EXTERNAL_SIZE,
    HOG,
    INIT,
    PATCHES,
    RANDOM,
    EvaluatedModel,
    initial_subject_name,
    open_subject,
    require_model,
    subject_of,
)
from simclr.models.encoder import encoder_of, with_config
from simclr.models.heads import ProjectionHead
from simclr.models.layers import reads_head
from simclr.tasks.initial import kept_weights
from simclr.tasks.opening import DataOptions, open_parts, require_writable, side_of
from simclr.training.progress import say
from simclr.training.run import RunFolder
from simclr.views.policy import AugmentationPreset
from simclr.weights.folder import Model, load_quietly
from simclr.weights.training_progress import TrainingProgress

if TYPE_CHECKING:
    from simclr.tasks.options.labels import Evaluate, Finetune

ENCODER = "encoder"
"""Name of the row of RUN itself."""
LONG = {"finetune", SUPERVISED, "curve", "probe", "transfer"}
"""Protocols that take minutes or more."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """The opened images, and the models that are evaluated on them."""

    options: "Evaluate"
    protocols: list[str]
    train: Images
    test: Images | None
    """The data's own test part, if any."""
    like: EncoderConfig
    """Configuration of the encoder under test, or of the network that its name stands for."""
    like_head: ProjectionHead | None = None
    """Projection head of the model under test where features are read from it; `random` has one of its shape."""
    preprocessing: AugmentationPreset
    cache: FeatureCache
    store: ResultStore
    world: DistributedContext
    folder: Path | None = None
    """Where results are kept for a second call."""
    _opened: dict[tuple[str, int | None], EvaluatedModel] = field(default_factory=dict)
    """By name and, where the weights depend on it, seed."""
    _first: TransferSet | None = None
    """The first set to transfer to, split by the first seed."""
    failed: list[UserError] = field(default_factory=list)
    """Why results are missing."""

    @classmethod
    def open(cls, options: "Evaluate", protocols: list[str], world: DistributedContext) -> "Session":
        """Open images and model.

        Raises:
            UserError: One of them cannot be opened, or has no labels where it needs them.
        """
        run = Path(options.run)
        for name in (options.run, *_compared(options)):
            require_model(name)
        model = load_quietly(run) if _is_folder(options.run) else None
        first = None
        if protocols == ["transfer"]:
            first = _transfer_set(options, options.data[0], options.seed, world)
            train, test = first.learn, first.test
        else:
            source = options.data[0]
            train, test = open_parts(source, world, _data_options(options, source))
        cache, opened, head = open_cache(options.cache), {}, None
        if model is not None:
            subject = subject_of(model, options.run, cache=cache, world=world)
            if options.feature != "auto":
                subject = subject.read_as(options.feature)
            if options.layer is not None:
                subject = subject.at_layer(options.layer)
                head = model.head if reads_head(options.layer) else None
            assert subject.encoder is not None
            like, preprocessing = subject.encoder.config, model.preprocessing
            opened[options.run, None] = subject
        else:
            like, preprocessing = _shape(options, train, world)
            if options.feature != "auto":
                like = replace(like, feature=options.feature, scaling="none")
        if options.compare == type(options).compare:
            options = _fitting_compare(options, like, world)
        elif INIT in _compared(options):
            _begun_run(run)
        if test is None:
            _warn_if_seen(run, train, world)
            if {"curve", *ACCURACIES} & set(protocols):
                _refuse_if_trained_on(run, train, range(options.seed, options.seed + options.seeds))
        folder = results_folder(options)
        store = ResultStore(folder / "results.jsonl" if folder else None, world)
        if folder is not None and not world.broadcast(_can_be_made(folder, world)):
            say(f"{folder} cannot be written: no results are stored; --out names another folder.", main=world.is_main)
            folder = None
        return cls(
            options=options, protocols=protocols, train=train, test=test, like=like, preprocessing=preprocessing,
            like_head=head, cache=cache, store=store, world=world, folder=folder, _opened=opened, _first=first,
        )  # fmt: skip

    @property
    def seeds(self) -> range:
        """`--seeds` seeds from `--seed` on."""
        return range(self.options.seed, self.options.seed + self.options.seeds)

    @property
    def flip(self) -> float | None:
        """Probability of a left-right flip in training on labels: that of pretraining; None: RUN is no run."""
        run = RunFolder(Path(self.options.run))
        return run.config.flip if run.is_pretraining else None

    def check(self) -> None:
        """Raise, or warn, before the work begins.

        Raises:
            UserError: The images do not fit a subject, or a protocol trains a network and there is none.
        """
        self.tell_unfinished()
        if self.protocols != ["transfer"]:
            subjects = self.subjects()
            for subject in subjects:
                subject.fitted(self.train)
            for protocol in self.protocols:
                if protocol in ACCURACIES and not any(
                    makes_sense(protocol, subject, subjects[0]) for subject in subjects
                ):
                    raise UserError(
                        f"The protocol {protocol} trains a network, and {self.options.run} has none to train; give "
                        "a run's folder, timm/NAME or torchvision/NAME (supervised takes random too)."
                    )
        if self.folder is None and set(self.protocols) & LONG:
            self.tell("Results are stored for later calls only with --out FOLDER, or if RUN is a pretraining run.")

    def unfinished(self) -> dict[str, TrainingProgress]:
        """The subjects whose training had not reached its end, by name."""
        subjects = {subject.name: subject.progress for subject in self.subjects()}
        return {name: known for name, known in subjects.items() if known is not None and not known.finished}

    def tell_unfinished(self) -> None:
        """Warn about each subject whose training had not reached its end."""
        for name, progress in self.unfinished().items():
            self.tell(progress.warning(self.options.run if name == ENCODER else name))

    def tell_reused(self) -> None:
        """Print how many results came from the file."""
        if self.store.reused:
            self.tell(f"Taken from {self.store.file}: {self.store.reused}; without that file, all are measured.")

    def tell(self, sentence: str) -> None:
        """Print a sentence once, whatever the number of processes."""
        say(sentence, main=self.world.is_main)

    def split(self, seed: int, *, every: bool = False) -> Split:
        """The images of a seed; with `every`, all labels whatever --labels says."""
        labels = None if every else self.options.labels
        return split_data(self.train, self.test, seed=seed, labels=labels, leave_one_out=self.options.leave_one_out)

    def sets(self, seed: int) -> list[TransferSet]:
        """The sets to transfer to."""
        options = self.options
        known = [self._first] if self._first is not None and seed == options.seed else []
        sets = known + [_transfer_set(options, source, seed, self.world) for source in options.data[len(known) :]]
        for data in sets:
            self.tell(f"{data.name}: {data.how}.")
            for note in dict.fromkeys([*data.train.notes, *data.test.notes]):
                self.tell(f"{data.name}: {note}")
        return sets

    def subjects(self, seed: int | None = None) -> list[EvaluatedModel]:
        """The model under test, then those of --compare; random weights and k-means patches are those of the seed."""
        seed = self.options.seed if seed is None else seed
        names = list(dict.fromkeys([self.options.run, *_compared(self.options)]))
        opened = [self._subject(name, seed) for name in names]
        return [replace(opened[0], name=ENCODER), *opened[1:]] if _is_folder(self.options.run) else opened

    def _subject(self, name: str, seed: int) -> EvaluatedModel:
        """Opened once; only random weights and patches depend on the seed."""
        pretrained = self.protocols != [SUPERVISED]
        foreign = name.startswith((TIMM, TORCHVISION))
        key = name, seed if name in (RANDOM, PATCHES) or (foreign and not pretrained) else None
        if key not in self._opened and name == INIT:
            self._opened[key] = self._initial()
        if key not in self._opened:
            subject = open_subject(
                name, like=self.like, preprocessing=self.preprocessing, seed=seed, cache=self.cache, world=self.world,
                size=self.options.size or EXTERNAL_SIZE, pretrained=pretrained,
            )  # fmt: skip
            if name == RANDOM and self.like_head is not None:
                subject = subject.with_random_head(self.like_head, seed=seed)
            if self.options.layer is not None:
                subject = subject.at_layer(self.options.layer)
            if name in (PATCHES, RANDOM):
                subject = subject.learnt_from(self._training_images(seed), seed=seed)
            self._opened[key] = subject
        return self._opened[key]

    def _initial(self) -> EvaluatedModel:
        """What the run began from, with the features that are read of RUN."""
        run = _begun_run(Path(self.options.run))
        kept = kept_weights(run)
        assert kept is not None, run
        model = Model(kept.encoder, run.config.augmentation, head=kept.head, progress=kept.progress)
        subject = subject_of(model, initial_subject_name(kept.name), cache=self.cache, world=self.world)
        if self.options.feature != "auto":
            return subject.read_as(self.options.feature)
        if self.options.layer is not None:
            return subject.at_layer(self.options.layer)
        encoder = with_config(kept.encoder, replace(kept.encoder.config, scaling=self.like.scaling))
        return replace(subject, encoder=encoder).learnt_from(
            self._training_images(self.options.seed), seed=self.options.seed
        )

    def _training_images(self, seed: int) -> Images:
        """Images that features may be learnt from without labels: all that are not to be tested on."""
        if self.test is not None or self.train.labels is None:
            return self.train
        return self.split(seed, every=True).train

    @property
    def context(self) -> EvaluationContext:
        """What every protocol is given."""
        return EvaluationContext(store=self.store, world=self.world, folder=self.folder, say=self.tell)

    def measure(self, protocols: list[Protocol], settings: Settings) -> list[Result]:
        """The accuracies of these protocols, some of which an earlier call may have left.

        Raises:
            UserError: None of them could be measured.
        """

        def split_of(seed: int) -> Split:
            split = self.split(seed)
            self.tell(f"Evaluating on {self.train.name}: {split.description}.")
            return split

        if not protocols:
            return []

        def failed(what: str, error: UserError) -> None:
            if self.world.size > 1:  # the others may not have failed, and would wait
                raise error
            self.failed.append(error)
            self.tell(f"  {what} is left out: {error}")

        results = list(
            measure(
                protocols, self.seeds, subjects_of=self.subjects, split_of=split_of, settings=settings,
                context=self.context, failed=failed,
            )
        )  # fmt: skip
        if not results:
            raise self.failed[0]
        return results


def _transfer_set(options: "Evaluate", source: str, seed: int, world: DistributedContext) -> TransferSet:
    reading = _data_options(options, source).reading(world)
    return open_transfer_set(source, seed=seed, labels=options.labels_file, reading=reading)


def _data_options(options: "Evaluate", source: str) -> DataOptions:
    """Images of a folder are shrunk as the run's were."""
    return replace(DataOptions.of(options), side=side_of(Path(options.run), source, options.pack_side))


def _compared(options: "Evaluate") -> list[str]:
    """The models of --compare, which may be given with spaces or commas between."""
    return [
        name for given in options.compare for name in ([given] if os.path.lexists(given) else given.split(",")) if name
    ]


def _fitting_compare(options: "Evaluate", like: EncoderConfig, world: DistributedContext) -> "Evaluate":
    """The default models of --compare: with what the run began from, without hog for images that are too small."""
    compare = options.compare
    if like.size < MIN_SIZE:
        compare = tuple(name for name in compare if name != HOG)
        say(f"hog is left out: it needs images of {MIN_SIZE} pixels a side.", main=world.is_main)
    run = _pretraining_of(Path(options.run))
    if run.init.is_dir():
        kept = kept_weights(run) if options.layer is not None and reads_head(options.layer) else None
        if kept is not None and kept.head is None:
            say(
                f"{INIT} is left out: the weights that the run began from have no projection head, and --layer is "
                f"{options.layer}.",
                main=world.is_main,
            )
        else:
            compare = (INIT, *compare)
    return replace(options, compare=compare)


def _begun_run(run: Path) -> RunFolder:
    """The run of a model under test that was pretrained from given weights.

    Raises:
        UserError: It is no such run, or began from random weights.
    """
    pretraining = _pretraining_of(run)
    if not pretraining.is_pretraining or pretraining.config.init is None:
        raise UserError(
            f"--compare has {INIT}, and {run} was not pretrained from given weights (`simclr pretrain --init`); leave "
            f"{INIT} out."
        )
    return pretraining


def _pretraining_of(run: Path) -> RunFolder:
    """The run's folder, where its own or one of its encoders' is given."""
    around = RunFolder(run.resolve().parent)
    return around if run.resolve() in (around.encoder, around.key_encoder) else RunFolder(run)


def _is_folder(run: str) -> bool:
    return run not in BASELINE_NAMES and not run.startswith((TIMM, TORCHVISION))


def results_folder(options: "Evaluate") -> Path | None:
    """Where results are kept for a second call; None: nowhere."""
    if options.out is not None:
        return options.out
    return Path(options.run) / "evaluation" if RunFolder(Path(options.run)).is_pretraining else None


def _can_be_made(folder: Path, world: DistributedContext) -> bool:
    """Whether files can be made there; the main process looks."""
    try:
        if world.is_main:
            require_writable(folder / "results.jsonl")
    except UserError:
        return False
    return True


def _shape(options: "Evaluate", images: Images, world: DistributedContext) -> tuple[EncoderConfig, AugmentationPreset]:
    """The shape of the network that a name stands for: --encoder, else the recipe's, for the baselines."""
    if options.run not in BASELINE_NAMES:
        return EncoderConfig(name=options.run, channels=3, size=options.size or EXTERNAL_SIZE), "torchvision"
    recipe, _ = choose_recipe(images, on_gpu=world.device.type == "cuda")
    config, _ = fit_recipe(recipe, images)
    if options.encoder is None:
        return encoder_of(config, images.channels), config.augmentation
    shape = _named_network(options, channels=images.channels, size=config.size)
    return shape, "torchvision" if shape.is_external else config.augmentation


def check_network(options: "Evaluate | Finetune") -> None:
    """Reject flags about a network that RUN is not, or that there is not, before any image is opened.

    Raises:
        UserError: One sentence about the first of them.
    """
    if options.encoder is not None:
        if options.run != RANDOM:
            raise UserError(
                f"--encoder was {options.encoder}, and RUN is {options.run}, which is a model already; leave it out, "
                f"or give {RANDOM} as RUN for a new network."
            )
        _named_network(options, channels=3, size=EXTERNAL_SIZE)
        return
    given = {"--width": options.width != 1.0, "--stem": options.stem != "auto", "--sk": options.sk}
    if unused := [flag for flag, is_given in given.items() if is_given]:
        raise UserError(f"{', '.join(unused)} is about the network that --encoder names; name one.")


def _named_network(options: "Evaluate | Finetune", *, channels: int, size: int) -> EncoderConfig:
    """The network of --encoder and the flags beside it.

    Args:
        size: Of the images where no flag says so and it is no model of timm or torchvision, in pixels.
    """
    assert options.encoder is not None
    is_external = options.encoder.startswith((TIMM, TORCHVISION))
    return EncoderConfig(
        name=options.encoder, width=options.width, stem=options.stem, sk=options.sk,
        channels=3 if is_external else channels, size=options.size or (EXTERNAL_SIZE if is_external else size),
    )  # fmt: skip


def _warn_if_seen(run: Path, images: Images, world: DistributedContext) -> None:
    """Warn where the images that are about to be split were part of pretraining, without labels."""
    pretraining = _pretraining_of(run)
    if not pretraining.is_pretraining:
        return
    if _are_those_of(pretraining, images):
        say(
            "The encoder saw these test images, without labels, while it was pretrained; new images may do worse.",
            main=world.is_main,
        )


def _refuse_if_trained_on(folder: Path, images: Images, seeds: range) -> None:
    """Refuse seeds that split the images otherwise than a fine-tuning or distillation did.

    Raises:
        UserError: Test images of a seed were trained on with their labels.
    """
    run = RunFolder(folder)
    if not run.exists or run.is_pretraining or "task" not in run.origin or not _are_those_of(run, images):
        return
    seed = run.origin["task"]["options"]["seed"]
    if set(seeds) != {seed}:
        raise UserError(
            f"{folder} was trained on labels of {images.name}, split by --seed {seed}; with another seed, images that "
            f"it was trained on would be test images. Give --seed {seed} and one seed."
        )


def _are_those_of(run: RunFolder, images: Images) -> bool:
    """Whether the run was trained on these images."""
    began = run.origin.get("data")
    if began is None:
        return False
    seen = replace(images, channels=began.get("channels", images.channels))
    is_first = not str(began["fingerprint"]).startswith(SCHEME)
    return began["fingerprint"] == (first_scheme(seen) if is_first else seen.fingerprint)
