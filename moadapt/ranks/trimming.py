"""Take the ranks that add nothing out of a mixture, between two fits."""

from torch import Tensor

from moadapt.adapters.initial import filled_later
from moadapt.mixture import Mixture
from moadapt.ranks.allocator import lora_banks, ranks_of, with_ranks
from moadapt.storage import fill, tensors


def trim_ranks(mixture: Mixture) -> Mixture:
    """Return a mixture without the rank-one terms whose `up` is zero; it computes the same on the same base.

    Its LoRAs have a rank for every site (`LoRA.ranks`) and the scale they had; where nothing is left of an adapter it
    is absent. The given mixture is detached.

    Args:
        mixture: With pruned terms, as `importance` leaves them.

    Raises:
        ValueError: The mixture was detached, or no adapter or no expert has a term left.
    """
    if not mixture.attached:
        raise ValueError(
            "this mixture was detached from its base, so there is nothing to trim; attach or load it again"
        )
    found, spec = tensors(mixture), mixture.spec
    ranks = {n: {s.path: r for s, r in own.items()} for n, own in ranks_of(spec, mixture.anatomy).items()}
    frozen = {(site, name) for site, bank in lora_banks(mixture.banks()) for name in bank.frozen}
    for site, bank in lora_banks(mixture.banks()):
        for name in bank.names:
            keys = [f"adapters/{name}/{site.path}/{part}" for part in bank.tensors]
            live = adds_something(bank.state(name)["up"])
            ranks[name][site.path] = int(live.sum())
            kept = {key: found.pop(key)[live] for key in keys}
            found |= kept if live.any() else {}
    trimmed = with_ranks(spec, ranks)
    trimmed.sites(mixture.anatomy)  # refuses before anything is detached
    if not any(key.startswith("adapters/") for key in found):
        raise ValueError("every adapter's `up` is zero, so trimming would leave none; train the mixture first")
    training, checkpoints = mixture.training, mixture.checkpoints
    with filled_later():
        fresh = Mixture(mixture.detach(), trimmed)
    fill(fresh, {key: tensor for key, tensor in found.items() if key in tensors(fresh)})
    for site, bank in lora_banks(fresh.banks()):
        for name in bank.names:
            if (site, name) in frozen:
                bank.freeze(name)
    if checkpoints:
        fresh.gradient_checkpointing_enable()
    return fresh.train(training)


def adds_something(up: Tensor) -> Tensor:
    """Tell of each rank-one term whether its `up` is not zero, (R,).

    Args:
        up: (R, F).
    """
    return up.detach().abs().amax(dim=1) > 0
