"""Short labels for long module paths."""

from collections.abc import Sequence

_LONG = 22
_LONGEST = 30


def shortened(paths: Sequence[str]) -> list[str]:
    """Leave out of every path the parts that all of them have, where paths are long, and clip what is still too long.

    Args:
        paths: Dotted paths; those of one chart.

    Example:
        >>> shortened(["model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.1.self_attn.q_proj"])
        ['0.mlp.up_proj', '1.self_attn.q_proj']
        >>> shortened(["language.0", "language.1"])
        ['language.0', 'language.1']
    """
    if len(paths) < 2 or max(map(len, paths)) <= _LONG:
        return [clipped(path) for path in paths]
    everywhere = set.intersection(*(set(path.split(".")) for path in paths))
    kept = [".".join(part for part in path.split(".") if part not in everywhere) for path in paths]
    return [clipped(short or path) for short, path in zip(kept, paths, strict=True)]


def clipped(name: str, most: int = _LONGEST) -> str:
    """Leave out the start of a very long name, which would take the room of the chart.

    Args:
        name: A label.
        most: Characters it may have.
    """
    return name if len(name) <= most else f"…{name[1 - most :]}"
