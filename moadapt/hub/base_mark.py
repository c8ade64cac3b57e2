"""Which base an exported adapter belongs to: its fingerprint, in metadata of the file that other readers ignore."""

import json
from collections.abc import Mapping

from transformers import PreTrainedModel

from moadapt.fingerprint import fingerprint

_NAME = "moadapt_base"


def mark(base: PreTrainedModel) -> dict[str, str]:
    """Return metadata that tell a base.

    Args:
        base: Without a mixture on it.
    """
    return {_NAME: json.dumps({"name": base.config.name_or_path, **fingerprint(base)})}


def check_mark(metadata: Mapping[str, str], base: PreTrainedModel) -> None:
    """Refuse another base than the one that a file names, if it names any.

    Args:
        metadata: Of the file.
        base: The base given; of one on the meta device class and shapes count, and no values.

    Raises:
        ValueError: It is another one; the message says what differs.
    """
    if _NAME not in metadata:
        return
    try:
        stored = json.loads(metadata[_NAME])
    except (RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"its mark of the base cannot be read: {error}") from error
    own = fingerprint(base)
    compared = {"class": "another class", "structure": "other parameters", "values": "other weights"}
    for part, what in compared.items():
        if part == "values" and base.device.type == "meta":
            continue
        if not isinstance(stored, dict) or stored.get(part) != own[part]:
            named = stored.get("name") if isinstance(stored, dict) else None
            raise ValueError(
                f"it was made for the base {named!r}; the one given, a {own['class']}, has {what}; load that base"
            )
