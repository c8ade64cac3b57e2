"""What banks refuse of the names and tensors of adapters that they are asked for or given."""

from collections.abc import Mapping, Sequence

from torch import Tensor


def check_known(path: str, name: str, names: Sequence[str]) -> None:
    """Refuse the name of an adapter that a bank does not have.

    Args:
        path: Of the site.
        name: What was asked for.
        names: What there is.

    Raises:
        ValueError: It is none of them.
    """
    if name not in names:
        raise ValueError(f"{path} has no adapter {name!r}; it has {', '.join(names)}")


def check_tensors(path: str, name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of an adapter.

    Args:
        path: Of the site.
        name: Of the adapter.
        own: Its tensors.
        given: What shall take their place; more of them are left unread.

    Raises:
        ValueError: One is missing or has another shape.
    """
    for key, tensor in own.items():
        if key not in given or given[key].shape != tensor.shape:
            got = {key: tuple(value.shape) for key, value in given.items()}
            raise ValueError(f"{path}: adapter {name!r} needs {key} of shape {tuple(tensor.shape)}, got {got}")
