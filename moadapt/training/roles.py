"""What a trained parameter is: tower, kind and depth, by which it gets its learning rate and its time to move."""

from dataclasses import dataclass

ROUTER = "router"
BALANCE = "balance"
CROSS_MODAL = "cross_modal"
KINDS = ("shared", "expert", CROSS_MODAL)


@dataclass(frozen=True)
class Role:
    """What a trained parameter is.

    Args:
        tower: The tower of its site, `router` or `balance`.
        kind: `shared`, `expert`, `router` or `balance`; for a plain peft model `adapter`.
        factor: Of its learning rate.
        decays: Whether weight decay may act on it, if it is no vector.
        cross_modal: Whether it belongs to an adapter through which modalities read each other.
        depth: How far up its stack of blocks its own begins, from 0 to below 1; None outside blocks.
    """

    tower: str
    kind: str
    factor: float = 1.0
    decays: bool = True
    cross_modal: bool = False
    depth: float | None = None
