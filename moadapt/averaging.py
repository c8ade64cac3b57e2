"""One adapter out of many that blend their parameters: the average of the experts' factors.

MHR-mu of Caccia et al., "Multi-Head Adapter Routing for Cross-Task Generalization", section 3.2: the routing is dropped
and the average skill is trained on. It is just what even weights of parameters do, and no average of outputs.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moadapt.adapters.lora import LoRA
from moadapt.adapters.lora_bank import LoRABank
from moadapt.mixture import Mixture
from moadapt.mixture_spec import MixtureSpec
from moadapt.names import SHARED
from moadapt.placement import Placement
from moadapt.storage import fill


def average(mixture: Mixture) -> Mixture:
    """Return a mixture whose shared adapter is the average of the experts, with the old shared one's ranks beside it.

    The given mixture is detached from its base, which the new one takes over. Sites and changes of the base are those
    of even weights; ranks of a shared adapter and of the average add up.

    Args:
        mixture: Of LoRAs alone, the experts with the same settings.

    Raises:
        ValueError: There are no experts, or they are no such LoRAs, or the shared adapter is not like them.
    """
    spec = mixture.spec
    like = _settings_of_all(spec)
    states = {}
    for site, bank in mixture.banks():
        if not isinstance(bank, LoRABank) or len(bank.tensors) != 2:
            raise ValueError(
                f"{site.path}: only LoRAs of linear layers, embeddings and convolutions are averaged, and without an "
                "init whose start is taken off"
            )
        states[site.path] = _joined(bank, spec)
    rank = max(len(state["down"]) for state in states.values())
    one = replace(like, rank=rank)
    placed = [site.path for site in one.sites(mixture.anatomy, spec.placement)]
    ranks = {path: len(states[path]["down"]) if path in states else 0 for path in placed}
    one = replace(one, ranks={path: own for path, own in ranks.items() if own != rank} or None)
    found = Mixture(mixture.detach(), MixtureSpec({}, one, None, spec.placement))
    fill(found, {f"adapters/{SHARED}/{path}/{side}": t for path, state in states.items() for side, t in state.items()})
    return found


def _settings_of_all(spec: MixtureSpec) -> LoRA:
    """Return what all adapters have in common, as a LoRA."""
    experts = list(spec.experts.values())
    first = experts[0] if experts else None
    if not isinstance(first, LoRA) or any(each != first for each in experts):
        raise ValueError(
            "averaging takes experts that are LoRAs with the same settings, as routers that blend parameters have; got "
            f"{', '.join(f'{name}: {each}' for name, each in spec.experts.items()) or 'none'}"
        )
    like, shared = _settings(first, spec.placement), spec.shared
    if shared is not None and (not isinstance(shared, LoRA) or _settings(shared, spec.placement) != like):
        raise ValueError(
            "the average joins the shared adapter, which must be a LoRA as the experts are in all but its ranks, scale "
            f"and init; got {shared} beside {first}"
        )
    return like


def _settings(adapter: LoRA, default: Placement) -> LoRA:
    """Return an adapter without what an average may differ in: ranks, scale and start."""
    placement = adapter.placement or default
    return replace(adapter, placement=placement, rank=1, alpha=None, rank_stabilized=False, ranks=None, init="default")


def _joined(bank: LoRABank, spec: MixtureSpec) -> dict[str, Tensor]:
    """Return `down` and `up` of the shared adapter, if any, above those of the average; scales are in `up`."""
    parts, experts = [], bank.experts()
    if isinstance(spec.shared, LoRA) and SHARED in bank.names:
        parts.append((bank.state(SHARED), spec.shared.scale))
    if experts:
        states = [bank.state(adapter.name) for adapter in experts]
        mean = {side: torch.stack([state[side] for state in states]).mean(dim=0) for side in ("down", "up")}
        parts.append((mean, bank.shape_of(experts[0])[1]))
    return {
        "down": torch.cat([state["down"] for state, _ in parts]),
        "up": torch.cat([state["up"] * scale for state, scale in parts]),
    }
