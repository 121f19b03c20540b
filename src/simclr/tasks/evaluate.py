"""`simclr evaluate RUN DATA`: how good is it? Protocols x what is compared x seeds -> a table, JSON, pictures."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from simclr import distributed
from simclr.config.encoder import TIMM, TORCHVISION, EncoderConfig
from simclr.config.finetune import FinetuneConfig
from simclr.config.recipes import choose_recipe, fit_recipe
from simclr.data.fingerprint import SCHEME, first_scheme
from simclr.data.images import Images
from simclr.data.presets import TransferSet, open_transfer_set
from simclr.data.readers.files import Reading
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.cache import FeatureCache, cache_of
from simclr.evaluation.finetune import Stopped
from simclr.evaluation.measure import TITLES, Measurement, Protocol, Settings, makes_sense, measure
from simclr.evaluation.metrics import BASELINES, SUPERVISED, mean_and_spread
from simclr.evaluation.results import ResultStore
from simclr.evaluation.split import Split, split_data
from simclr.evaluation.subjects import PIXELS, RANDOM, EvaluatedModel, open_subject, subject_of
from simclr.reports.table import Row, error_note, seeds_note, text_table
from simclr.tasks.asked import ACCURACIES, check_asked, protocols_of
from simclr.tasks.evaluate_reports import REPORTS, Report
from simclr.tasks.opening import open_parts, require_writable, side_of, write
from simclr.training.progress import counting, say
from simclr.training.run import RunFolder, open_run
from simclr.views.policy import AugmentationPreset
from simclr.weights.folder import load_quietly
from simclr.weights.training_progress import TrainingProgress

if TYPE_CHECKING:
    from simclr.tasks.options.labels import Evaluate

ENCODER = "encoder"
"""Name of the row of RUN itself."""
LONG = {"finetune", SUPERVISED, "curve", "probe", "transfer"}
"""Protocols that take minutes or more."""


def evaluate(args: "Evaluate", finetune_over: Callable[[FinetuneConfig], FinetuneConfig]) -> None:
    """The command: what can be checked is checked first, and each result is kept as soon as it is there.

    Args:
        finetune_over: Puts the flags that were given on top of a recipe for fine-tuning.
    """
    protocols = protocols_of(args.protocol)
    check_asked(args, protocols, finetune_over)
    with distributed.joined(args.device) as world:
        try:
            session = Session.open(args, protocols, world)
            session.check()
            settings = Settings(linear=args.linear, recipe=args.finetune_recipe, over=finetune_over, flip=session.flip)
            measured = session.measure([cast(Protocol, name) for name in protocols if name in ACCURACIES], settings)
            reports = {name: REPORTS[name](session) for name in protocols if name in REPORTS}
            picture = _picture(session, measured) if args.picture else None
            if world.is_main:
                _tell(session, measured, reports, picture)
            if session.failed:
                raise UserError(f"{len(session.failed)} of the results above are missing: {session.failed[0]}")
        except Stopped as stopped:
            folder = _folder(args)
            kept = (
                f"what is done is in {folder}: the same command goes on" if folder else "nothing is kept without --out"
            )
            say(f"Stopped; {kept}.", main=world.is_main)
            if world.size == 1:
                raise SystemExit(128 + (stopped.signal or 15)) from None


@dataclass(frozen=True, kw_only=True)
class Session:
    """The images and what is to be judged on them."""

    args: "Evaluate"
    protocols: list[str]
    train: Images
    test: Images | None
    """The data's own test part, if any."""
    like: EncoderConfig
    """The encoder that is judged, or its shape."""
    preprocessing: AugmentationPreset
    cache: FeatureCache
    ledger: ResultStore
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
    def open(cls, args: "Evaluate", protocols: list[str], world: DistributedContext) -> "Session":
        """Open everything that can be wrong."""
        run = Path(args.run)
        model = load_quietly(run) if _is_folder(args.run) else None
        first = None
        if protocols == ["transfer"]:
            first = _transfer_set(args, args.data[0], args.seed, world)
            train, test = first.learn, first.test
        else:
            source = args.data[0]
            side = side_of(run, source, args.pack_side)
            train, test = open_parts(source, world, labels=args.labels_file, pack=args.pack, side=side)
        cache, opened = cache_of(args.cache), {}
        if model is not None:
            like, preprocessing = model.encoder.config, model.preprocessing
            opened[args.run, None] = subject_of(model, args.run, cache=cache, world=world)
        else:
            like, preprocessing = _shape(args, train, world)
        if test is None:
            _warn_if_seen(run, train, world)
        folder = _folder(args)
        ledger = ResultStore(folder / "results.jsonl" if folder else None, world)
        if folder is not None and not world.broadcast(_can_be_made(folder, world)):
            say(f"{folder} cannot be written: nothing is kept there; --out names another folder.", main=world.is_main)
            folder = None
        return cls(
            args=args, protocols=protocols, train=train, test=test, like=like, preprocessing=preprocessing,
            cache=cache, ledger=ledger, world=world, folder=folder, _opened=opened, _first=first,
        )  # fmt: skip

    @property
    def seeds(self) -> range:
        return range(self.args.seed, self.args.seed + self.args.seeds)

    @property
    def flip(self) -> float | None:
        """Of training on labels: where mirror images mean something else in pretraining, they do so with labels too."""
        run = Path(self.args.run)
        return open_run(run).config.flip if (run / "run.json").is_file() else None

    def check(self) -> None:
        """Fail, or warn, before the work begins."""
        self.tell_unfinished()
        if self.protocols != ["transfer"]:
            subjects = self.subjects()
            for subject in subjects:
                subject.fitted(self.train)
            for protocol in self.protocols:
                if protocol in ACCURACIES and not any(makes_sense(protocol, one, subjects[0]) for one in subjects):
                    raise UserError(
                        f"The protocol {protocol} trains a network, and {self.args.run} brings none to train; give a "
                        "run's folder, timm/NAME or torchvision/NAME (supervised takes random too)."
                    )
        if self.folder is None and set(self.protocols) & LONG:
            self.tell("Results are kept for a second call only with --out FOLDER, or where RUN is a pretraining run.")

    def unfinished(self) -> dict[str, TrainingProgress]:
        """The subjects whose training had not reached its end, by name."""
        subjects = {subject.name: subject.progress for subject in self.subjects()}
        return {name: known for name, known in subjects.items() if known is not None and not known.finished}

    def tell_unfinished(self) -> None:
        """Say it of each subject whose training had not reached its end."""
        for name, progress in self.unfinished().items():
            self.tell(progress.warning(self.args.run if name == ENCODER else name))

    def tell(self, sentence: str) -> None:
        """Say it once, whatever the number of processes."""
        say(sentence, main=self.world.is_main)

    def split(self, seed: int, *, every: bool = False) -> Split:
        """The images of a seed; with `every`, all labels whatever --labels says."""
        labels = None if every else self.args.labels
        return split_data(self.train, self.test, seed=seed, labels=labels, leave_one_out=self.args.leave_one_out)

    def sets(self, seed: int) -> list[TransferSet]:
        """The sets to transfer to."""
        args = self.args
        known = [self._first] if self._first is not None and seed == args.seed else []
        found = known + [_transfer_set(args, source, seed, self.world) for source in args.data[len(known) :]]
        for one in found:
            self.tell(f"{one.name}: {one.how}.")
            for note in dict.fromkeys([*one.train.notes, *one.test.notes]):
                self.tell(f"{one.name}: {note}")
        return found

    def subjects(self, seed: int | None = None) -> list[EvaluatedModel]:
        """What is judged, and then what stands beside it; `random` has the weights of the seed."""
        seed = self.args.seed if seed is None else seed
        names = list(dict.fromkeys([self.args.run, *self.args.compare]))
        opened = [self._subject(name, seed) for name in names]
        return [replace(opened[0], name=ENCODER), *opened[1:]] if _is_folder(self.args.run) else opened

    def _subject(self, name: str, seed: int) -> EvaluatedModel:
        """Opened once; only random weights depend on the seed."""
        pretrained = self.protocols != [SUPERVISED]
        foreign = name.startswith((TIMM, TORCHVISION))
        key = name, seed if name == RANDOM or (foreign and not pretrained) else None
        if key not in self._opened:
            self._opened[key] = open_subject(
                name, like=self.like, preprocessing=self.preprocessing, seed=seed, cache=self.cache, world=self.world,
                size=self.args.size, pretrained=pretrained,
            )  # fmt: skip
        return self._opened[key]

    def measure(self, protocols: list[Protocol], settings: Settings) -> list[Measurement]:
        """The accuracies that are asked for, some of which an earlier call may have left."""

        def split_of(seed: int) -> Split:
            split = self.split(seed)
            self.tell(f"Evaluating on {self.train.name}: {split.how}.")
            return split

        if not protocols:
            return []

        def failed(what: str, error: UserError) -> None:
            if self.world.size > 1:  # the others may not have failed, and would wait
                raise error
            self.failed.append(error)
            self.tell(f"  {what} is left out: {error}")

        measured = list(
            measure(
                protocols, self.seeds, subjects_of=self.subjects, split_of=split_of, settings=settings,
                ledger=self.ledger, folder=self.folder, world=self.world, say=self.tell, failed=failed,
            )
        )  # fmt: skip
        if not measured:
            raise self.failed[0]
        if self.ledger.reused:
            self.tell(f"Taken from {self.ledger.file}: {self.ledger.reused}; without that file, all are measured.")
        return measured


def _picture(session: Session, measured: list[Measurement]) -> bytes:
    """An evaluation at a glance; all processes take part in making its features."""
    from simclr.reports.pictures import draw_evaluation

    run, split = Path(session.args.run), session.split(session.args.seed)
    metrics = RunFolder(run).read_metrics() if (run / "metrics.jsonl").is_file() else []
    return draw_evaluation(session.subjects()[0].features(split.test), split, _over_seeds(measured)[0], metrics)


def _tell(session: Session, measured: list[Measurement], reports: dict[str, Report], picture: bytes | None) -> None:
    """The tables, and the files that were asked for."""
    args = session.args
    if measured:
        rows, split = _rows(measured), session.split(args.seed)
        print(text_table(rows, corner="features"))
        _print_legend(measured, rows, len(split.test))
    for name, progress in session.unfinished().items():
        print(f"Unfinished training: {name}, {progress.text}.")
    for name, report in reports.items():
        print(f"{chr(10) * bool(measured)}{name}\n{report.text}")
        for file, picture in report.pictures.items():
            if session.folder is not None:
                write(session.folder / file, picture)
                say(f"A picture is in {session.folder / file}.")
    if args.json is not None:
        write(args.json, (json.dumps(_summary(session, measured, reports), indent=2) + "\n").encode())
    if args.picture is not None and picture is not None:
        write(args.picture, picture)
        say(f"The picture is in {args.picture}.")


def _rows(measured: list[Measurement]) -> list[Row]:
    columns = _top1_by(measured, lambda one: TITLES[one.protocol])
    return [Row(name, values, baseline=name in BASELINES) for name, values in columns.items()]


def _over_seeds(measured: list[Measurement]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float | None]]]:
    """Model -> protocol -> mean top-1 accuracy, in [0, 1]; and its sample standard deviation, None of one seed."""
    means: dict[str, dict[str, float]] = {}
    spreads: dict[str, dict[str, float | None]] = {}
    for name, row in _top1_by(measured, lambda one: one.protocol).items():
        means[name], spreads[name] = {}, {}
        for protocol, values in row.items():
            means[name][protocol], spreads[name][protocol] = mean_and_spread(values)
    return means, spreads


def _top1_by(measured: list[Measurement], column: Callable[[Measurement], str]) -> dict[str, dict[str, list[float]]]:
    """EvaluatedModel -> column -> top-1 accuracies, in [0, 1]."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in measured:
        found.setdefault(one.subject, {}).setdefault(column(one), []).append(one.figures["top1"])
    return found


def _print_legend(measured: list[Measurement], rows: list[Row], num_test: int) -> None:
    print(f"Top-1 accuracy in %, {seeds_note(rows)}.")
    for protocol in dict.fromkeys(one.protocol for one in measured):
        done: dict[str, dict[str, None]] = {}  # how -> whose
        for one in measured:
            if one.protocol == protocol:
                done.setdefault(one.how, {})[one.subject] = None
        for how, names in done.items():
            whose = f" of {', '.join(names)}" if len(done) > 1 else ""
            print(f"{protocol}{whose}: {how}.")
    print(f"Test images: {num_test:,}, so {error_note(num_test)}.")


def _summary(session: Session, measured: list[Measurement], reports: dict[str, Report]) -> dict[str, Any]:
    """What the JSON file holds: mean and spread of each accuracy by name, every single result, the reports."""
    args = session.args
    split = session.split(args.seed) if measured else None
    means, spreads = _over_seeds(measured)
    return {
        **means,
        "spread": spreads,
        "protocol": {
            "run": args.run,
            "data": args.data,
            "split": None if split is None else split.how,
            "labels": args.labels,
            "seeds": list(session.seeds),
            "test_images": None if split is None else len(split.test),
        },
        "results": [
            {"features": one.subject, "protocol": one.protocol, "seed": one.seed, **one.figures, "how": one.how}
            for one in measured
        ],
        "unfinished": {name: progress.to_dict() for name, progress in session.unfinished().items()},
        "reports": {name: report.figures for name, report in reports.items()},
    }


def _transfer_set(args: "Evaluate", source: str, seed: int, world: DistributedContext) -> TransferSet:
    side = side_of(Path(args.run), source, args.pack_side)
    with counting("Reading images", main=world.is_main) as progress:
        how = Reading(
            workers=os.cpu_count() or 1, progress=progress, pack=args.pack, side=side,
            say=partial(say, main=world.is_main),
        )  # fmt: skip
        return open_transfer_set(source, seed=seed, labels=args.labels_file, how=how)


def _is_folder(run: str) -> bool:
    return run not in (RANDOM, PIXELS) and not run.startswith((TIMM, TORCHVISION))


def _folder(args: "Evaluate") -> Path | None:
    """Where results are kept for a second call."""
    if args.out is not None:
        return args.out
    return Path(args.run) / "evaluation" if (Path(args.run) / "run.json").is_file() else None


def _can_be_made(folder: Path, world: DistributedContext) -> bool:
    """Whether files can be made there; the main process looks."""
    try:
        if world.is_main:
            require_writable(folder / "results.jsonl")
    except UserError:
        return False
    return True


def _shape(args: "Evaluate", images: Images, world: DistributedContext) -> tuple[EncoderConfig, AugmentationPreset]:
    """The shape of the network that a name stands for: the recipe's for `random` and `pixels`."""
    if args.run in (RANDOM, PIXELS):
        recipe, _ = choose_recipe(images, on_gpu=world.device.type == "cuda")
        config, _ = fit_recipe(recipe, images)
        shape = EncoderConfig(
            name=config.encoder, width=config.width, stem=config.stem, sk=config.sk, channels=images.channels,
            size=config.size,
        )  # fmt: skip
        return shape, config.augmentation
    return EncoderConfig(name=args.run, channels=3, size=args.size), "torchvision"


def _warn_if_seen(run: Path, images: Images, world: DistributedContext) -> None:
    """Say so where images that are about to be split took part, unlabelled, in pretraining."""
    if not (run / "run.json").is_file():
        return
    began = open_run(run).origin["data"]
    seen = replace(images, channels=began.get("channels", images.channels))
    is_first = not str(began["fingerprint"]).startswith(SCHEME)
    if began["fingerprint"] == (first_scheme(seen) if is_first else seen.fingerprint):
        say(
            "The encoder saw these test images, without labels, while it was pretrained; new images may do worse.",
            main=world.is_main,
        )
