"""Short labels for long module paths."""

from collections.abc import Sequence

_LONG = 22


def shortened(paths: Sequence[str]) -> list[str]:
    """Leave out of every path the parts that all of them have, where paths are long.

    Args:
        paths: Dotted paths; those of one chart.

    Example:
        >>> shortened(["model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.1.self_attn.q_proj"])
        ['0.mlp.up_proj', '1.self_attn.q_proj']
        >>> shortened(["language.0", "language.1"])
        ['language.0', 'language.1']
    """
    if len(paths) < 2 or max(map(len, paths)) <= _LONG:
        return list(paths)
    everywhere = set.intersection(*(set(path.split(".")) for path in paths))
    return [".".join(part for part in path.split(".") if part not in everywhere) or path for path in paths]
