"""An encoder's folder as others shall get it, with or without a model card; and `simclr push`, the one way to the hub.

Facts about the origin go along, but for the folders of this machine, of which only the last name is kept.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr.errors import UserError, first_line
from simclr.models.classifier import Classifier
from simclr.reports.card import model_card, read_json
from simclr.reports.run_results import results_of
from simclr.tasks.opening import load_model, write
from simclr.training.progress import say
from simclr.training.run import RunFolder
from simclr.weights.exporters.preprocessing import as_json, preprocessing_of
from simclr.weights.folder import FORMAT, Model, save_classifier, save_encoder

if TYPE_CHECKING:
    from simclr.tasks.options.using import Push

PREPROCESSING, CARD = "preprocessing.json", "README.md"
FILES = ("config.json", "model.safetensors", PREPROCESSING, CARD)
_PLACES = ("run", "imported_from")  # facts of the origin that are paths


def write_folder(source: Path, model: Model, out: Path) -> None:
    """config.json, model.safetensors and preprocessing.json: what `simclr.load(out)` reads, and what others need."""
    encoder = model.encoder
    origin = _public(origin_of(source))
    write(out / PREPROCESSING, as_json(preprocessing_of(encoder.config, model.preprocessing, normalised="inside")))
    if model.classifier is None:
        save_encoder(
            encoder, out,
            preprocessing=model.preprocessing, origin=origin, head=model.head, progress=model.progress,
        )  # fmt: skip
    else:
        assert isinstance(model.classifier, Classifier)
        save_classifier(
            model.classifier, out,
            classes=model.classes, preprocessing=model.preprocessing, origin=origin, head=model.head,
            progress=model.progress,
        )  # fmt: skip


def write_card(source: Path, model: Model, out: Path, *, licence: str | None) -> None:
    """README.md, from what the run or, of a fine-tuned network, the run behind it has recorded."""
    run = source if RunFolder(source).is_pretraining else source.parent.parent  # RUN/evaluation/finetune-...
    described, config = read_json(run / "run.json"), read_json(run / "config.json")
    mine = described is not None and config is not None and (run == source or source.parent.name == "evaluation")
    tables = results_of(source, model)
    card = model_card(
        out.resolve().name, model,
        preprocessing=preprocessing_of(model.encoder.config, model.preprocessing, normalised="inside"),
        origin=_public(origin_of(source)), run=described if mine else None, config=config if mine else None,
        tables=tables, licence=licence,
    )  # fmt: skip
    write(out / CARD, card)
    if mine and not tables and (run / "evaluation" / "results.jsonl").is_file():
        say("The run's results are of other weights, or of another version's; `simclr evaluate` measures these.")


def origin_of(source: Path) -> dict[str, Any]:
    """What the encoder's config.json says of where the weights come from."""
    for folder in (source / "encoder", source):
        described = read_json(folder / "config.json")
        if described is not None and described.get("format") == FORMAT:
            return described.get("origin", {})
    return {}


def push(options: "Push") -> None:
    """Upload a hub folder, into a repository that is made if there is none.

    Raises:
        UserError: FOLDER is no hub folder, huggingface_hub is missing, or the hub refused.
    """
    missing = [name for name in FILES if not (options.folder / name).is_file()]
    if missing:
        raise UserError(
            f"{options.folder} has no {', '.join(missing)}; make it with `simclr export RUN --format hub-folder --out "
            f"{options.folder}`, and read its {CARD} before the world does."
        )
    load_model(options.folder)  # what cannot be loaded here cannot be loaded there
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError(
            "Pushing needs the package huggingface_hub; install it with pip install 'simclr-torch[hub]'."
        ) from None
    api = HfApi()
    try:
        api.create_repo(options.repo_id, private=options.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=options.repo_id,
            folder_path=options.folder,
            allow_patterns=list(FILES),
            commit_message=options.message,
        )
    except Exception as error:  # refused, not reached, not logged in, no such name: of several libraries, by version
        raise UserError(
            f"Nothing was pushed: the hub was not reached or refused ({first_line(error)}); look at the network, the "
            f"name {options.repo_id!r}, which is USER/NAME, and log in with `hf auth login`."
        ) from None
    say(f"Pushed {', '.join(FILES)} to {options.repo_id}: {commit.commit_url}")


def _public(origin: dict[str, Any]) -> dict[str, Any]:
    return {key: Path(value).name if key in _PLACES else value for key, value in origin.items()}
