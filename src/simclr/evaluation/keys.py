"""Keys of cached features and of results: all that determines a value, one function for each kind of value.

A key is a JSON object with the fields of a `Result` that `KEY_FIELDS` names: protocol, version of the computation,
model (digest of the weights, preprocessing, kind of device), data (digests of the images and labels that take part),
settings, seed. What determines nothing stays out: where files lie and how a path is spelled, batch sizes of inference,
threads, workers.

Versions are numbers that stand beside each computation (FEATURES_VERSION, KNN_VERSION, ...): a release of the package
keeps the results, a change of an algorithm does not. Versions of torch, NumPy and other libraries are recorded with a
result, and are no part of its key: between them numbers agree to rounding.
"""

from hashlib import sha256
from typing import TYPE_CHECKING, Any

from torch import nn

from simclr.config.encoder import EncoderConfig
from simclr.config.finetune import FinetuneConfig
from simclr.data.images import Images
from simclr.evaluation.curve import CURVE_VERSION
from simclr.evaluation.finetune import TRAINING_VERSION
from simclr.evaluation.knn import KNN_K, KNN_TEMPERATURE, KNN_VERSION
from simclr.evaluation.label_free import LABEL_FREE_VERSION
from simclr.evaluation.logistic import L2_PATH, LINEAR_L2_VALUES, LOGISTIC_VERSION, TOL, VALIDATION_ROWS
from simclr.evaluation.metrics import METRICS_VERSION
from simclr.evaluation.probe import PROBE_VERSION, probe_settings
from simclr.evaluation.propagation import PROPAGATION_VERSION, propagation_settings
from simclr.evaluation.pseudo_labels import PSEUDO_LABELS_VERSION
from simclr.evaluation.results import Entry
from simclr.models.inference import FEATURES_VERSION
from simclr.training.device import precision_of
from simclr.weights.folder import digest_of

if TYPE_CHECKING:
    from simclr.data.presets import TransferSet
    from simclr.evaluation.split import Split
    from simclr.evaluation.subjects import EvaluatedModel


def pixels_digest(images: Images) -> str:
    """SHA-256 (hexadecimal) of images as an encoder sees them: contents, order, sizes and number of channels.

    The fingerprint that this is made of may include labels; then features are computed again when labels change.
    """
    digest = sha256(f"{images.fingerprint} {len(images)} {images.channels}".encode())
    digest.update(images.sizes.astype("<i8").tobytes())
    return digest.hexdigest()


def labelled_digest(images: Images) -> str:
    """SHA-256 (hexadecimal) of the images, their labels and the classes that these stand for."""
    digest = sha256(f"{pixels_digest(images)} {images.classes!r}".encode())
    for column in (images.labels, images.targets):
        digest.update(b"-" if column is None else f"{column.shape}".encode() + column.astype("<i8").tobytes())
    return digest.hexdigest()


def features_key(subject: "EvaluatedModel", images: Images, crop: float | None) -> Entry:
    """Key of the features of images by one model."""
    return {
        "protocol": "features",
        "version": {"features": FEATURES_VERSION},
        "model": subject.model,
        "data": {"images": pixels_digest(images)},
        "settings": {"crop": crop, **_layer_settings(subject)},
    }


def accuracy_key(
    protocol: str,
    subject: "EvaluatedModel",
    split: "Split",
    seed: int,
    config: FinetuneConfig | None = None,
    pseudo_labels_by: "EvaluatedModel | None" = None,
) -> Entry:
    """Key of a result of `measure`.

    Args:
        config: Settings of a protocol that trains a network; None: the protocol classifies frozen features.
        pseudo_labels_by: Whose features give the pseudo-labels of such a training; None: it has none.
    """
    data = {"train": labelled_digest(split.train), "test": labelled_digest(split.test)}
    if config is not None:
        versions, settings = {"training": TRAINING_VERSION}, _training_settings(config, subject)
        if pseudo_labels_by is not None:
            versions |= {"features": FEATURES_VERSION, "logistic": LOGISTIC_VERSION, **_pseudo_labels_versions()}
            settings |= {"pseudo_labels": _pseudo_labels_settings(pseudo_labels_by)}
            data |= _pool_data(split)
    elif protocol == "knn":
        versions = {"features": FEATURES_VERSION, "knn": KNN_VERSION}
        settings = {"k": KNN_K, "temperature": KNN_TEMPERATURE, "leave_one_out": split.test is split.train}
    else:
        versions = {"features": FEATURES_VERSION, "logistic": LOGISTIC_VERSION}
        settings = _linear_settings() if protocol == "linear" else _logistic_settings(L2_PATH)
    return {
        "protocol": protocol,
        "version": versions | {"metrics": METRICS_VERSION},
        "model": _initial_network(subject, config, from_scratch=protocol == "supervised"),
        "data": data,
        "settings": settings | _layer_settings(subject),
        "seed": seed,
    }


def classifier_key(
    network: nn.Module, shape: EncoderConfig, classes: list[str], preset: str, test: Images, seed: int, device: str
) -> Entry:
    """Key of the accuracies of a trained classifier; how it was trained takes no part.

    Args:
        shape: Of its encoder.
        classes: Names of its classes.
        preset: Whose evaluation preprocessing it is given.
        seed: Of its training.
        device: Kind of device.
    """
    return {
        "protocol": "classifier",
        "version": {"features": FEATURES_VERSION, "metrics": METRICS_VERSION},
        "model": {
            "weights": digest_of(network), "network": shape.to_dict(), "preprocessing": preset,
            "classes": sha256(repr(classes).encode()).hexdigest(), "device": device,
        },
        "data": {"test": labelled_digest(test)},
        "settings": {},
        "seed": seed,
    }  # fmt: skip


def majority_key(split: "Split") -> Entry:
    """Key of the accuracies of the classes' frequencies among the training labels, taken as scores of every image."""
    return {
        "protocol": "majority",
        "version": {"metrics": METRICS_VERSION},
        "model": {"weights": None},
        "data": {"train": labelled_digest(split.train), "test": labelled_digest(split.test)},
        "settings": {},
        "seed": 0,
    }


def curve_key(subject: "EvaluatedModel", split: "Split", count: int | str, seed: int) -> Entry:
    """A point of the label-efficiency curve: the linear classifier on the features of a model."""
    return {
        "protocol": "curve",
        "version": {"features": FEATURES_VERSION, "logistic": LOGISTIC_VERSION, "curve": CURVE_VERSION},
        "model": subject.model,
        "data": {"train": labelled_digest(split.train), "test": labelled_digest(split.test)},
        "settings": {"labels_per_class": count, **_linear_settings(), **_layer_settings(subject)},
        "seed": seed,
    }


def curve_from_scratch_key(
    subject: "EvaluatedModel", split: "Split", count: int | str, seed: int, configs: list[FinetuneConfig]
) -> Entry:
    """A point of the label-efficiency curve: a network of the model's shape, trained on the few labels alone.

    Args:
        configs: Settings of the training, by the number of images.
    """
    return {
        "protocol": "curve, supervised",
        "version": {"training": TRAINING_VERSION, "curve": CURVE_VERSION},
        "model": _initial_network(subject, None, from_scratch=True),
        "data": {"train": labelled_digest(split.train), "test": labelled_digest(split.test)},
        "settings": {
            "labels_per_class": count,
            "training": [_training_settings(config, subject) for config in configs],
        },
        "seed": seed,
    }


def probe_key(subject: "EvaluatedModel", split: "Split", seed: int) -> Entry:
    """Probes of the layers of a model and its projection head; labels take no part."""
    return {
        "protocol": "probe",
        "version": {"probe": PROBE_VERSION, "features": FEATURES_VERSION},
        "model": subject.model | {"head": subject.head_weights},
        "data": {name: pixels_digest(part) for name, part in (("train", split.train), ("test", split.test))},
        "settings": probe_settings(),
        "seed": seed,
    }


def label_free_key(subject: "EvaluatedModel", images: Images, test: Images | None, seed: int, *, copies: bool) -> Entry:
    """What features and images show without labels.

    Args:
        copies: Whether copies among the images are looked for too; what is found names the data set.
    """
    return {
        "protocol": "label-free",
        "version": {"features": FEATURES_VERSION, "label_free": LABEL_FREE_VERSION},
        "model": subject.model,
        "data": {"train": pixels_digest(images), "test": None if test is None else pixels_digest(test)},
        "settings": {"copies": copies, "data_name": images.name, **_layer_settings(subject)},
        "seed": seed,
    }


def linear_transfer_key(
    subject: "EvaluatedModel", data: "TransferSet", seed: int, *, l2_values: list[float], crop: float, version: int
) -> Entry:
    """Transfer by logistic regression on frozen features; `version` is that of the protocol, TRANSFER_VERSION."""
    return {
        "protocol": "linear transfer",
        "version": {
            "features": FEATURES_VERSION, "logistic": LOGISTIC_VERSION, "metrics": METRICS_VERSION, "transfer": version,
        },
        "model": subject.model,
        "data": transfer_data(data) | {"test": labelled_digest(data.test)},
        "settings": {**_logistic_settings(l2_values), "crop": crop, **_layer_settings(subject)},
        "seed": seed,
    }  # fmt: skip


def grid_key(
    subject: "EvaluatedModel", seed: int, *, from_scratch: bool, batch_size: int, steps: int, version: int
) -> Entry:
    """What the trainings of a grid search share: `choose_and_test` adds the images, and rate and decay as settings."""
    return {
        "protocol": "from scratch" if from_scratch else "fine-tuning",
        "version": {"training": TRAINING_VERSION, "metrics": METRICS_VERSION, "grid": version},
        "model": _initial_network(subject, None, from_scratch=from_scratch),
        "settings": {"steps": steps, "batch_size": batch_size},
        "seed": seed,
    }


def training_key(
    subject: "EvaluatedModel", learn: Images, seed: int, config: FinetuneConfig, *, from_scratch: bool
) -> Entry:
    """One training of a grid search, which names the folder of its checkpoints."""
    return {
        "version": {"training": TRAINING_VERSION},
        "model": _initial_network(subject, config, from_scratch=from_scratch),
        "data": {"train": labelled_digest(learn)},
        "settings": _training_settings(config, subject),
        "seed": seed,
    }


def transfer_data(data: "TransferSet") -> Entry:
    """Images on which the settings of transfer are chosen: no test image is among them."""
    return {
        "train": labelled_digest(data.train),
        "validation": None if data.validation is None else labelled_digest(data.validation),
        "metric": data.metric,
    }


def _initial_network(subject: "EvaluatedModel", config: FinetuneConfig | None, *, from_scratch: bool) -> Entry:
    """The network that a training starts from: only its shape if from scratch, and its head if that is used.

    A training reads the features that the head was trained on, where those are others than the encoder returns.
    """
    reads = None if subject.head is None else subject.head.reads
    trained_on = {} if reads is None or not (from_scratch or config) else {"reads": reads}
    if from_scratch:
        return subject.model | trained_on | {"weights": None}
    uses_head = config is not None and config.head_layer > 0
    return subject.model | trained_on | ({"head": subject.head_weights} if uses_head else {})


def _training_settings(config: FinetuneConfig, subject: "EvaluatedModel") -> Entry:
    """The settings that determine a training, and the precision of its device."""
    return config.result_fields() | {"precision": str(precision_of(config.precision, subject.world))}


def _layer_settings(subject: "EvaluatedModel") -> Entry:
    """The layer whose output is taken as features, where it is not what the encoder returns."""
    return {} if subject.layer is None else {"layer": subject.layer}


def _pseudo_labels_versions() -> Entry:
    return {"propagation": PROPAGATION_VERSION, "pseudo_labels": PSEUDO_LABELS_VERSION}


def _pseudo_labels_settings(subject: "EvaluatedModel") -> Entry:
    """What determines pseudo-labels beside images and labels; the digest of the model whose features are taken."""
    return {
        "features": subject.identity, **propagation_settings(), **_linear_settings(), **_layer_settings(subject),
    }  # fmt: skip


def _pool_data(split: "Split") -> Entry:
    """All images to learn from, and which of them have a label."""
    assert split.pool is not None and split.pool_rows is not None
    rows = sha256(split.pool_rows.astype("<i8").tobytes()).hexdigest()
    return {"pool": pixels_digest(split.pool), "pool_rows": rows}


def _linear_settings() -> Entry:
    return {"strengths": list(LINEAR_L2_VALUES), "tolerance": TOL, "validation_rows": VALIDATION_ROWS}


def _logistic_settings(l2_values: Any) -> Entry:
    return {"strengths": list(l2_values), "tolerance": TOL}
