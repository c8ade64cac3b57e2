"""One adapter out of many that blend their parameters: the average of the experts' factors.

MHR-mu of Caccia et al., "Multi-Head Adapter Routing for Cross-Task Generalization", section 3.2: the routing is dropped
and the average skill is trained on. It is just what even weights of parameters do, and no average of outputs.
"""

import torch

from moadapt.adapters.lora import LoRA
from moadapt.adapters.lora_bank import LoRABank
from moadapt.mixture import Mixture
from moadapt.mixture_spec import MixtureSpec
from moadapt.names import SHARED


def average(mixture: Mixture) -> Mixture:
    """Return a mixture whose shared adapter is the average of the experts, with the old shared one's ranks beside it.

    The given mixture is detached from its base, which the new one takes over. Sites and changes of the base are those
    of even weights; ranks of a shared adapter and of the average add up.

    Args:
        mixture: Of LoRAs alone, the experts with one rank, scale and placement.

    Raises:
        ValueError: There are no experts, or they are no such LoRAs.
    """
    spec = mixture.spec
    experts = list(spec.experts.values())
    if not experts or not all(isinstance(each, LoRA) and each == experts[0] for each in experts):
        raise ValueError(
            "averaging takes experts that are LoRAs with the same settings, as routers that blend parameters have; got "
            f"{', '.join(f'{name}: {each}' for name, each in spec.experts.items()) or 'none'}"
        )
    if spec.shared is not None and (not isinstance(spec.shared, LoRA) or spec.shared.placement != experts[0].placement):
        raise ValueError(
            f"the average joins the shared adapter, which must be a LoRA with the experts' placement, not {spec.shared}"
        )
    states = {}
    for site, bank in mixture.banks():
        if not isinstance(bank, LoRABank) or len(bank.tensors) != 2:
            raise ValueError(f"{site.path}: only plain LoRAs are averaged, without a start that is taken off")
        states[site.path] = _joined(bank, spec)
    first = experts[0]
    assert isinstance(first, LoRA), "checked above"
    ranks = {path: len(state["down"]) for path, state in states.items()}
    rank = max(ranks.values())
    one = LoRA(
        rank=rank,
        alpha=float(rank),
        ranks={path: own for path, own in ranks.items() if own != rank} or None,
        dropout=first.dropout,
        placement=first.placement,
    )
    found = Mixture(mixture.detach(), MixtureSpec({}, one, None, spec.placement))
    for site, bank in found.banks():
        bank.load_state(SHARED, states[site.path])
    return found


def _joined(bank: LoRABank, spec: MixtureSpec) -> dict[str, torch.Tensor]:
    """Return `down` and `up` of the shared adapter, if any, above those of the average; scales are in `up`."""
    states = [bank.state(name) for name in spec.experts]
    _, scale = bank.shape_of(bank.experts()[0])
    down, up = (torch.stack([state[side] for state in states]).mean(dim=0) for side in ("down", "up"))
    if not isinstance(spec.shared, LoRA):
        return {"down": down, "up": up * scale}
    shared = bank.state(SHARED)
    return {
        "down": torch.cat([shared["down"], down]),
        "up": torch.cat([shared["up"] * spec.shared.scale, up * scale]),
    }
