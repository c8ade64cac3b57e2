"""Options that name a part, or spell it out: `lora`, or `{name: lora, rank: 8}`."""

from typing import Any

import yaml

from moadapt.registry import Registry
from moadapt.specs import from_json


def spelled(given: str) -> Any:
    """Read an option that is a bare name or a mapping.

    Args:
        given: As typed.

    Raises:
        ValueError: It is neither.
    """
    refusal = f"{given!r} is neither a name nor a mapping such as '{{name: lora, rank: 8}}'"
    try:
        found = yaml.safe_load(given)
    except yaml.YAMLError as error:
        raise ValueError(refusal) from error
    if not found or not isinstance(found, str | dict):
        raise ValueError(refusal)
    return found


def part_of(given: str, registry: Registry) -> Any:
    """Return the spec that an option names or spells out.

    Args:
        given: As typed.
        registry: Where to look its name up.

    Raises:
        ValueError: It is neither a name nor a mapping, or the part or a field is unknown.
    """
    found = spelled(given)
    return from_json({"name": found} if isinstance(found, str) else found, registry)
