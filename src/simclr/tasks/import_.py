"""`simclr import`: somebody else's checkpoint becomes an encoder's folder, and what was inferred is said."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.files import MAX_RECORD_BYTES, read_regular, reason_of, writing
from simclr.models.classifier import Classifier, usual_names
from simclr.tasks.opening import require_writable, start_encoder_folder
from simclr.training.lock import hold
from simclr.training.progress import say
from simclr.weights.folder import save_classifier, save_encoder
from simclr.weights.importers.import_tf import EMA, Imported, import_tf
from simclr.weights.importers.import_torch import import_torch

if TYPE_CHECKING:
    from simclr.tasks.options.using import Import


def import_checkpoint(options: "Import") -> None:
    """Read, write, and say what was found and what was left out.

    Raises:
        UserError: The checkpoint is damaged or of another network, or OUT holds something or cannot be written.
    """
    require_writable(options.out / "config.json")
    if options.format not in ("auto", "tensorflow") and not options.checkpoint.is_file():
        raise UserError(f"There is no file {options.checkpoint}; check the path.")
    tensorflow = options.format == "tensorflow" or (options.format == "auto" and not _is_torch(options.checkpoint))
    with hold(options.out, DistributedContext()), writing(options.out, hint="give another folder"):
        start_encoder_folder(options.out, ours={})
        (_import_tf if tensorflow else _import_torch)(options)
    say(f'The encoder is in {options.out}: `simclr evaluate {options.out} DATA`, or simclr.load("{options.out}").')


def _is_torch(path: Path) -> bool:
    return path.is_file() and path.suffix != ".index" and not path.suffix.startswith(".data-")


def _import_torch(options: "Import") -> None:
    if options.ema or options.classes or options.head_layer is not None:
        raise UserError("--ema, --classes and --head-layer are about TensorFlow checkpoints; leave them out.")
    if (options.mean is None) != (options.std is None):
        raise UserError("Only one of --mean and --std was given; give both, or neither.")
    format = None if options.format in ("auto", "tensorflow") else options.format
    imported = import_torch(options.checkpoint, format=format, size=options.size, mean=options.mean, std=options.std)
    origin = {
        "imported_from": str(options.checkpoint),
        "format": f"PyTorch checkpoint of {imported.format}",
        "left_out": list(imported.left_out),
    }
    save_encoder(imported.encoder, options.out, preprocessing="torchvision", origin=origin)
    config = imported.encoder.config
    relu = "" if config.stem_relu else " and without a ReLU, as in lightly's example"
    stem = f"3x3 stem padded by {config.stem_padding}, without max-pool{relu}" if config.stem == "cifar" else "7x7 stem"
    say(
        f"Found, in the names of {imported.format}: {config.name}, width {config.width:g}, {stem}, "
        f"{imported.encoder.num_features} features; images of {config.size} x {config.size} pixels (--size changes it)."
    )
    say(
        f"Pixels in [0, 1] are normalised by mean {_numbers(config.mean)} and std {_numbers(config.std)}, "
        f"{'as asked' if options.mean else 'the usual ones of that library (--mean, --std change them)'}; evaluation "
        "images are resized and cropped as torchvision does."
    )
    parts = Counter(name.removeprefix("module.").partition(".")[0] for name in imported.left_out)
    if parts:
        say(f"Left out: {', '.join(f'{part} ({_tensors(count)})' for part, count in parts.items())}.")


def _numbers(values: tuple[float, ...] | None) -> str:
    return ", ".join(f"{value:g}" for value in values or ())


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


def _import_tf(options: "Import") -> None:
    if options.mean is not None or options.std is not None:
        raise UserError(
            "--mean and --std are about PyTorch's checkpoints; the authors' networks take pixels in [0, 1]."
        )
    imported = import_tf(options.checkpoint, size=options.size, ema=options.ema, head_layer=options.head_layer)
    classifier, origin = imported.classifier, _origin(options, imported)
    if classifier is None and (options.classes or options.head_layer is not None):
        raise UserError("--classes and --head-layer are about the supervised head, and none was taken; leave them out.")
    classes, description = ([], "") if classifier is None else _classes(options.classes, classifier.linear.out_features)
    if classifier is None:
        save_encoder(imported.encoder, options.out, preprocessing="google", origin=origin, head=imported.head)
    else:
        save_classifier(
            classifier, options.out, classes=classes, preprocessing="google", origin=origin, head=imported.head
        )
    _say_what_is_there(imported)
    if classifier is not None:
        _say_how_it_classifies(classifier, imported, description, layer_given=options.head_layer is not None)
    for sentence in _left_out(imported):
        say(sentence)


def _origin(options: "Import", imported: Imported) -> dict[str, Any]:
    return {
        "imported_from": str(options.checkpoint),
        "format": f"TensorFlow {imported.version} checkpoint",
        "step": imported.step,
        "ema": options.ema,
        "left_out": list(imported.left_out),
    }


def _classes(file: Path | None, count: int) -> tuple[list[str], str]:
    """Names in the order of the logits, and where they come from."""
    if file is not None:
        try:
            names = read_regular(file, MAX_RECORD_BYTES).decode().splitlines()
        except OSError as error:
            raise UserError(f"The classes cannot be read from {file}: {reason_of(error, file)}.") from None
        except UnicodeDecodeError:
            raise UserError(f"The classes cannot be read from {file}: it is no text in UTF-8.") from None
        names = [name.strip() for name in names if name.strip()]
        if len(names) != count:
            raise UserError(f"{file} names {len(names)} classes, and the supervised head has {count}.")
        return names, f"named by {file}"
    names, imagenet = usual_names(count)
    if imagenet:
        return names, "taken for ImageNet's, named by their WordNet identifiers"
    return names, "named by their numbers; --classes FILE names them"


def _say_what_is_there(imported: Imported) -> None:
    config, head = imported.encoder.config, imported.head
    kernels = " with selective kernels" if config.sk else ""
    step = "" if imported.step is None else f" at step {imported.step:,}"
    say(
        f"Found{step}: {config.name}{kernels}, width {config.width:g}, {config.stem} stem, {config.channels} channels, "
        f"{imported.encoder.num_features} features; images of {config.size} x {config.size} pixels (--size changes it)."
    )
    if head is None:
        say("No projection head.")
    else:
        say(f"Projection head: {head.kind}, {len(head.layers)} layers, {head.dim} wide.")


def _say_how_it_classifies(classifier: Classifier, imported: Imported, description: str, *, layer_given: bool) -> None:
    layer = classifier.head_layer
    where = "the encoder's output" if layer == 0 else f"layer {layer} of the projection head"
    doubt = "" if layer_given or imported.head is None else " (--head-layer says otherwise)"
    say(f"Supervised head on {where}{doubt}: {classifier.linear.out_features:,} classes, {description}.")


def _left_out(imported: Imported) -> Iterator[str]:
    """A sentence for each kind of variables that were not used, and the names of those of no kind."""
    if imported.slots:
        yield f"Left out: {len(imported.slots)} variables of the optimiser."
    average = [name for name in imported.left_out if name.startswith(EMA)]
    others = [name for name in imported.left_out if name not in set(average)]
    if average:
        yield f"Left out: the moving average, {len(average)} variables under {EMA} (--ema takes it)."
    if others:
        yield f"Left out: {', '.join(others)}."
