"""The Lightning module of a mixture."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.adapters.family import FamilySpec
from moadapt.attaching import attach
from moadapt.mixture import Mixture
from moadapt.placement import Placement
from moadapt.routing import RouterSpec
from moadapt.storage import load_tensors, tensors
from moadapt.training.batch import Batch
from moadapt.training.module import TaskModule
from moadapt.training.optimization import ROUTER, Optimization, Role


class MixtureModule(TaskModule):
    """Trains a mixture: shared adapter, experts and routers on a frozen base.

    Args:
        base: Name of the base; a registered short name, a folder or a hub name.
        experts: Adapters that the router weighs, by name.
        shared: The adapter that every input uses.
        router: Gives the experts their weights; needed exactly when there are experts.
        placement: Where adapters sit that name no placement of their own; by default all attention and MLP linears of
            the language tower.
        optimization: Settings of the optimiser.
        pass_task: Whether the mixture is told the task of every row; a router that goes by task is told always.
        dtype: Number type of the base's weights, such as `float32` or `bfloat16`; `auto` takes the file's own.
        attn_implementation: One of transformers' attention kernels.
        gradient_checkpointing: Compute blocks again in the backward pass, to save memory.
        seed: Of dropout and routers' noise, from 0.
    """

    def __init__(
        self,
        base: str,
        experts: dict[str, FamilySpec] | None = None,
        shared: FamilySpec | None = None,
        router: RouterSpec | None = None,
        placement: Placement | None = None,
        optimization: Optimization = Optimization(),  # noqa: B008, a frozen value
        pass_task: bool = False,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base, optimization, dtype, attn_implementation, seed)
        self.experts, self.shared, self.router, self.placement = experts, shared, router, placement
        self.pass_task = pass_task or (router is not None and router.depends_on == "task")
        self.gradient_checkpointing = gradient_checkpointing

    @property
    def mixture(self) -> Mixture:
        """The mixture in training."""
        assert isinstance(self.model, Mixture), "configure_model was called"
        return self.model

    def setup(self, stage: str) -> None:
        """Require that tasks and experts suit each other where the router goes by task.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            ValueError: A task has no expert, or, in training, an expert no task.
        """
        if self.router is None or self.router.depends_on != "task":
            return
        tasks, experts = list(self.data.tasks), list(self.experts or {})
        alone = {
            "tasks without expert": [name for name in tasks if name not in experts],
            "experts without task": [name for name in experts if name not in tasks and stage == "fit"],
        }
        told = [f"{what}: {', '.join(names)}" for what, names in alone.items() if names]
        if told:
            raise ValueError(
                f"the router goes by task, and there are {'; '.join(told)}. The data has the tasks "
                f"{', '.join(tasks)}; name the experts after them"
            )

    def build(self, base: PreTrainedModel) -> Mixture:
        """Attach adapters and routers."""
        mixture = attach(base, shared=self.shared, experts=self.experts, router=self.router, placement=self.placement)
        if self.gradient_checkpointing:
            mixture.gradient_checkpointing_enable()
        return mixture

    def options(self, batch: Batch) -> dict[str, Any]:
        """Return the prompt mask of a batch with answers, and the tasks where the mixture is told them."""
        told: dict[str, Any] = {"task": batch.task_names} if self.pass_task else {}
        return told if batch.labels is None else {**told, "prompt_mask": batch.prompt_mask}

    def roles(self) -> dict[nn.Parameter, Role]:
        """Return shared and expert parameters with the tower of their site, and those of routers."""
        found: dict[nn.Parameter, Role] = {}
        for site, bank in self.mixture.banks():
            stacked, rates, undecayed = bank.expert_rows(), bank.rates(), bank.undecayed()
            for name, parameter in bank.named_parameters():
                if parameter.requires_grad:
                    kind = "expert" if name in stacked else "shared"
                    found[parameter] = Role(site.tower, kind, rates.get(name, 1.0), name not in undecayed)
        return found | {p: Role(ROUTER, ROUTER) for p in self.mixture.routers.parameters() if p.requires_grad}

    def stacks(self) -> list[dict[nn.Parameter, Tensor]]:
        """Return for each bank its stacked parameters, with the expert of every row."""
        return [
            {bank.get_parameter(name): rows for name, rows in bank.expert_rows().items()}
            for _, bank in self.mixture.banks()
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Return adapters and routers under the names that a saved mixture gives them."""
        return tensors(self.mixture)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy adapters and routers in; see `TaskModule.load_tensors`."""
        load_tensors(self.mixture, tensors)
