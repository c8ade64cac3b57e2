"""Plain models and mixtures behind the interface of the training modules, to answer the same rows."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.mixture import Mixture
from moadapt.training.batch import Batch
from moadapt.training.module import TaskModule
from moadapt.training.optimization import Optimization
from moadapt.training.roles import Role
from moadapt.training.scores import Answered


class PlainModule(TaskModule):
    """Answers with a model, or with another one for each task; trains nothing.

    Args:
        models: The model of every task; a mixture is told the task where its router goes by it.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel | Mixture]) -> None:
        super().__init__("", Optimization(), "auto", None, 0)
        self._models = dict(models)

    def configure_model(self) -> None:
        """Do nothing: the models were given."""

    def answer(self, batch: Batch) -> list[Answered]:
        """Generate with the model of the batch's task."""
        if not len(batch):
            return []
        model: Any = self._models[batch.task_names[0]]
        self.model = model.to(self.device)
        self._transformer = model.base if isinstance(model, Mixture) else model
        return super().answer(batch)

    def build(self, base: PreTrainedModel) -> nn.Module:
        """Return the base itself."""
        return base

    def options(self, batch: Batch) -> dict[str, Any]:
        """Return the tasks where a router goes by them; plain models take the base's inputs."""
        router = self.model.spec.router if isinstance(self.model, Mixture) else None
        return {"task": batch.task_names} if router is not None and router.depends_on == "task" else {}

    def roles(self) -> dict[nn.Parameter, Role]:
        """Return nothing: nothing is trained."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: nothing is trained."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing: nothing is trained."""
