"""`simclr export`: what is written was loaded and compared first, and how to load it is said."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simclr import __version__
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.files import writing
from simclr.models.classifier import Classifier
from simclr.tasks.opening import load_model, require_writable, start_encoder_folder
from simclr.tasks.push import CARD, PREPROCESSING, write_card, write_folder
from simclr.training.lock import hold
from simclr.training.progress import say
from simclr.weights.exporters.libraries import to_library
from simclr.weights.exporters.onnx_file import BATCHES, to_onnx
from simclr.weights.exporters.preprocessing import in_words, preprocessing_of
from simclr.weights.folder import Model
from simclr.weights.single_file import SUFFIXES, VERSION, description_of, write_described, write_state

if TYPE_CHECKING:
    from simclr.tasks.options.using import Export


def export(options: "Export") -> None:
    """The command.

    Raises:
        UserError: RUN is no run and no encoder's folder, the format cannot hold its network, or OUT cannot be written.
    """
    if options.run.is_file():
        raise UserError(
            f"{options.run} is a file that was exported already; give the folder of the run or the encoder."
        )
    if options.licence is not None and options.format != "hub-folder":
        raise UserError("--licence goes into the model card of --format hub-folder; leave it out, or take that format.")
    model = load_model(options.run)
    with writing(options.out):
        if options.format in ("safetensors", "hub-folder"):
            _folder(options, model)
        elif options.format == "onnx":
            _onnx(model, _file(options.out, "onnx"))
        else:
            _state(model, options.format, _file(options.out, options.format))


def _folder(options: "Export", model: Model) -> None:
    out = options.out
    if out.suffix == ".safetensors" or (out.exists() and not out.is_dir()):
        raise UserError(f"--format {options.format} writes a folder, and --out was {out}; give the name of a folder.")
    require_writable(out / "config.json")
    ours = {PREPROCESSING: '"preset"'} | ({CARD: "library_name: simclr"} if options.format == "hub-folder" else {})
    with hold(out, DistributedContext()):
        start_encoder_folder(out, ours=ours)
        if options.format == "hub-folder":
            write_card(options.run, model, out, licence=options.licence)
        write_folder(options.run, model, out)
    say(f'The encoder is in {out}: simclr.load("{out}"); {PREPROCESSING} says what it expects.')
    if options.format == "hub-folder":
        unstated = " No licence is stated (--licence)." if options.licence is None else ""
        say(f"The model card is {out / CARD}: read it, then `simclr push {out} USER/NAME`.{unstated}")


def _state(model: Model, library: Literal["torchvision", "timm"], out: Path) -> None:
    """A state dict of torchvision's or timm's."""
    classifier, note = model.classifier, None
    assert classifier is None or isinstance(classifier, Classifier)
    if classifier is not None and classifier.head is not None:
        note = (
            f"The classifier stands on layer {classifier.head_layer} of the projection head, which {library} has no "
            "place for: the encoder goes without it (onnx and safetensors take both)."
        )
        classifier = None
    exported = to_library(library, model.encoder, classifier)
    described = _described(model, normalised="before", classes=[] if classifier is None else model.classes)
    described |= {
        "library": library,
        "model": exported.model,
        "classifier": exported.classifier,
        "load": _loading(exported.code, out),
        "differs": exported.differs,
    }
    write_state(out, exported.state, described)
    for sentence in (note, exported.differs):
        if sentence:
            say(sentence)
    _say_where(out, described)


def _onnx(model: Model, out: Path) -> None:
    classifier = model.classifier
    assert classifier is None or isinstance(classifier, Classifier)
    described = _described(model, normalised="inside", classes=model.classes)
    described |= {
        "load": [
            "import onnxruntime",
            f'session = onnxruntime.InferenceSession("{out.name}")',
            'outputs = session.run(None, {"images": images})  # float32, (B, C, S, S) in [0, 1], any B: features'
            + (", logits" if classifier else ""),
        ]
    }
    content = to_onnx(model.encoder, classifier, described)
    write_described(out, content, described)
    say(f"onnxruntime gives our own {'features and logits' if classifier else 'features'} at batches of {BATCHES}.")
    _say_where(out, described)


def _described(model: Model, *, normalised: Literal["inside", "before"], classes: list[str]) -> dict[str, Any]:
    config = model.encoder.config
    return {
        "format": VERSION,
        "written_by": f"simclr {__version__}",
        "encoder": config.to_dict(),
        "num_features": model.encoder.num_features,
        "preprocessing": preprocessing_of(config, model.preprocessing, normalised=normalised),
        "classes": classes,
    } | ({} if model.progress is None else model.progress.to_dict())


def _file(out: Path, kind: str) -> Path:
    """`out`, with the usual ending if it has none."""
    allowed = SUFFIXES[kind]
    out = out if out.suffix else out.with_name(out.name + allowed[0])
    if out.suffix not in allowed:
        raise UserError(f"--format {kind} writes {' or '.join(allowed)} files, and --out was {out}; give such a name.")
    require_writable(out)
    require_writable(description_of(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _loading(code: list[str], out: Path) -> list[str]:
    """Lines of Python that end with `model`."""
    if out.suffix == ".pth":
        return [line.replace("{READ}", f'torch.load("{out.name}", weights_only=True)') for line in code]
    read = f'safetensors.torch.load_file("{out.name}")'
    return ["import safetensors.torch", *(line.replace("{READ}", read) for line in code)]


def _say_where(out: Path, described: dict[str, Any]) -> None:
    for line in described["load"]:
        print(line)
    say(f"Input: {in_words(described['preprocessing'])}")
    say(
        f"The weights are in {out}, what they expect in {description_of(out).name} beside it; the lines above load "
        f'them, and so does simclr.load("{out}").'
    )
