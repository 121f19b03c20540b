"""Lines of result files of the first schema ({"key", "value", "about"}) as fields of a `Result`."""

from typing import Any

_METRICS = ("score", "validation")


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Result`; its key is the one that the same computation has today, so that it is found.

    Args:
        record: A line of the first schema, without its checksum.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: It is none.
    """
    key, value, about = dict(record["key"]), dict(record["value"]), dict(record["about"])
    names = {"subject": about.pop("subject", ""), "data_name": about.pop("images", ""), "split": about.pop("split", "")}
    if "cell" in key:  # of a grid of trainings
        key["settings"] = key["settings"] | key.pop("cell")
    return key | _measured(key["protocol"], value) | names | {"software": about}


def _measured(protocol: str, value: dict[str, Any]) -> dict[str, Any]:
    """Metrics, details and description."""
    if "figures" in value:
        return {"metrics": value["figures"], "description": value["how"]}
    if protocol.startswith("curve"):
        return {"metrics": {"top1": value["accuracy"]}}
    if protocol == "probe":
        table = value.pop("table")
        metrics = {f"{layer}/{task}": share for layer, tasks in table.items() for task, share in tasks.items()}
        return {"metrics": metrics, "details": value}
    metrics = {name: value.pop(name) for name in _METRICS if name in value}
    return {"metrics": {"score": metrics.pop("score"), **metrics}, "details": value}
