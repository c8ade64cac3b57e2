"""The Lightning module of a plain peft model: a baseline on the same data, loss, optimiser and scores."""

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.sites import anatomy
from moadapt.towers import Tower
from moadapt.training.batch import Batch
from moadapt.training.module import TaskModule
from moadapt.training.optimization import Optimization
from moadapt.training.roles import Role


class PeftModule(TaskModule):
    """Trains one adapter of the peft library for all tasks.

    Args:
        base: Name of the base; a registered short name, a folder or a hub name.
        peft_config: What to put on it.
        optimization: Settings of the optimiser.
        dtype: Number type of the base's weights; `auto` takes the file's own.
        attn_implementation: One of transformers' attention kernels.
        seed: Of dropout, from 0.
        quantize: How to quantise the base's linear layers while it is loaded: `int8`, `int4`, `nf4` or `llm_int8`, see
            `moadapt.bases.load_base`; None loads them as they were written.
    """

    def __init__(
        self,
        base: str,
        peft_config: PeftConfig,
        optimization: Optimization = Optimization(),  # noqa: B008, a frozen value
        dtype: str = "auto",
        attn_implementation: str | None = None,
        seed: int = 0,
        quantize: str | None = None,
    ) -> None:
        super().__init__(base, optimization, dtype, attn_implementation, seed, quantize)
        self.peft_config = peft_config
        self._towers: tuple[Tower, ...] = ()

    @property
    def peft_model(self) -> PeftModel:
        """The model in training."""
        assert isinstance(self.model, PeftModel), "configure_model was called"
        return self.model

    def build(self, base: PreTrainedModel) -> PeftModel:
        """Put the adapter on the base."""
        self._towers = anatomy(base).towers
        model: PeftModel = get_peft_model(base, self.peft_config)
        return model

    def options(self, batch: Batch) -> dict[str, Any]:
        """Return nothing: the adapter is the same for all."""
        return {}

    def roles(self) -> dict[nn.Parameter, Role]:
        """Return every trained parameter with its tower."""
        base: Any = self.peft_model.base_model.model
        return {p: Role(self._tower(name), "adapter") for name, p in base.named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """Return the adapter under peft's own names."""
        stored: dict[str, Tensor] = get_peft_model_state_dict(self.peft_model)
        return stored

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the adapter in; see `TaskModule.load_tensors`."""
        own = {name: tensor.shape for name, tensor in self.tensors().items()}
        given = {name: tensor.shape for name, tensor in tensors.items()}
        if own != given:
            wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise ValueError(f"{len(wrong)} tensors are missing, unknown or of another shape, such as {wrong[:3]}")
        set_peft_model_state_dict(self.peft_model, dict(tensors))

    def _tower(self, name: str) -> str:
        inside = (tower.name for tower in self._towers if not tower.path or name.startswith(tower.path + "."))
        return next(inside, "other")
