"""FSDP2: the blocks of the frozen base lie in parts on all processes, while adapters and routers stay whole.

A block's weights are gathered when it runs, in the forward and in the backward pass, and given up after it (Zhao et
al., "PyTorch FSDP", section 3; `torch.distributed.fsdp.fully_shard`). They are never trained, so nothing of them is
scattered back, and gradients, clipping, optimiser, checkpoints and saved mixtures are those of plain data parallelism.
Processes must run the same blocks equally often: only the tower that every row passes is sharded, and embeddings, head,
vision tower and connector are whole on every process.
"""

from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moadapt.adapted import AdaptedModule
from moadapt.fingerprint import note_fingerprint
from moadapt.initialising import waiting_sites
from moadapt.mixture import Mixture
from moadapt.quantised import is_quantised
from moadapt.towers import find_towers

if TYPE_CHECKING:
    from moadapt.training.module import TaskModule


class FSDP2Strategy(DDPStrategy):
    """Shards a frozen base over all processes; `strategy: fsdp2`.

    It launches processes as DDP does, and wraps nothing, as training modules add their gradients up themselves.
    """

    def model_to_device(self) -> None:
        """Shard the base, then move what is whole.

        Raises:
            ValueError: The base is quantised, or adapters still wait to start from data.
        """
        from moadapt.training.module import TaskModule  # which asks for this strategy

        module = self.lightning_module
        assert isinstance(module, TaskModule), "only these add their gradients up"
        if self.world_size > 1:
            shard(module, self.root_device.type, self.world_size)
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Begin with the same adapters on all processes."""
        assert self.lightning_module is not None, "it is set up"
        for parameter in self.lightning_module.parameters():
            if parameter.requires_grad:
                torch.distributed.broadcast(parameter.data, src=0)


def shard(module: "TaskModule", device_type: str, processes: int) -> None:
    """Shard the blocks of the tower that every row passes: language, or vision where there is no other.

    Args:
        module: Whose base; it may be sharded already.
        device_type: Such as `cuda` or `cpu`.
        processes: Over how many.

    Raises:
        ValueError: The base is quantised, or adapters still wait to start from data.
    """
    base, mixture = module.transformer, module.model
    tower = {tower.name: tower for tower in find_towers(base)}
    chosen = tower.get("language", tower.get("vision"))
    assert chosen is not None, "every base has one of them"
    root = base.get_submodule(chosen.path)
    if isinstance(root, FSDPModule):
        return
    if any(is_quantised(each) for each in base.modules()):
        raise ValueError(
            "strategy fsdp2 shards plain weights, and this base is quantised; leave quantize out, or give strategy: ddp"
        )
    whole = {parameter for parameter in module.parameters() if parameter.requires_grad}
    if isinstance(mixture, Mixture):
        if waiting_sites(mixture):
            raise ValueError(
                "strategy fsdp2 has no whole weights for adapters that start from data; start and save them on one "
                "process, see moadapt.initialise, and give start_from"
            )
        whole |= {parameter for _, parameter in mixture.named_adapter_parameters()}
        with mixture.bare_base() as bare:
            note_fingerprint(bare)
    mesh = init_device_mesh(device_type, (processes,))
    for path in chosen.blocks:
        block = base.get_submodule(path)
        inner = block.module if isinstance(block, AdaptedModule) else block
        fully_shard(inner, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(root, mesh=mesh, ignored_params=set(module.parameters()))
    # else whatever block runs first, as in `generate`, would be a root of its own
    cast(FSDPModule, root)._get_fsdp_state()._lazy_init()
    # what else Lightning would copy from the first process, piece by piece
    sharded = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
    module._ddp_params_and_buffers_to_ignore = sharded  # type: ignore[assignment]


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="DDP with the blocks of the frozen base sharded")
