"""What the demonstration trains: settings, and the three runs they make."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from peft import LoraConfig

from moadapt.adapters import LoRA
from moadapt.bases import load_base
from moadapt.mixture_spec import MixtureSpec
from moadapt.placement import Placement
from moadapt.registry import DATASETS, ROUTERS
from moadapt.router import RouterSpec
from moadapt.sites import anatomy
from moadapt.specs import bind
from moadapt.training import MixedTasks, MixtureModule, Optimization, PeftModule
from moadapt.training.module import TaskModule

_SCENES = {"root": "data/digit_scenes_demo", "train": 3000, "validation": 50, "test": 150}
SINGLE, PER_TASK, MIXTURE = "single_lora", "lora_per_task", "mixture"


@dataclass(frozen=True)
class DemoSettings:
    """Everything that a demonstration depends on.

    Args:
        base: A registered short name, a folder or a hub name.
        data: Short name of a data set with its own tasks.
        data_options: Fields of that data set to change.
        seed: Of data order, adapters and routers, from 0.
        steps: Training steps of every run.
        batch_size: Rows of a step, all tasks mixed.
        rank: Rank of every task's LoRA.
        shared_rank: Rank of the mixture's shared LoRA.
        router: Short name of the mixture's router.
        learning_rate: Peak rate of all adapters.
        router_learning_rate: Peak rate of the routers.
    """

    base: str = "digit_scenes"
    data: str = "digit_scenes"
    data_options: Mapping[str, Any] = field(default_factory=lambda: dict(_SCENES))
    seed: int = 0
    steps: int = 500
    batch_size: int = 32
    rank: int = 8
    shared_rank: int = 4
    router: str = "softmax"
    learning_rate: float = 1e-2
    router_learning_rate: float = 5e-3

    def key(self) -> dict[str, Any]:
        """Return what cached results depend on."""
        return {"version": 1, **asdict(self)}

    def data_module(self) -> MixedTasks:
        """Return the rows, the same for every run."""
        return MixedTasks(
            self.base,
            dataset=bind(DATASETS.get(self.data), self.data_options),
            batch_size=self.batch_size,
            eval_batch_size=128,
            seed=self.seed,
        )

    def modules(self, tasks: Iterable[str]) -> dict[str, TaskModule]:
        """Return the modules to train, by row name.

        Args:
            tasks: Names of the tasks, one expert each.
        """
        names = list(tasks)
        router: RouterSpec = bind(ROUTERS.get(self.router), {})
        spec = MixtureSpec(
            {name: LoRA(rank=self.rank) for name in names}, LoRA(rank=self.shared_rank), router, Placement()
        )
        run = self.run_options()
        by_task: RouterSpec = bind(ROUTERS.get("by_task"), {})
        return {
            SINGLE: PeftModule(peft_config=self.equal_lora(spec), **run),
            PER_TASK: MixtureModule(experts=dict(spec.experts), router=by_task, **run),
            MIXTURE: MixtureModule(experts=dict(spec.experts), shared=spec.shared, router=router, **run),
        }

    def run_options(self) -> dict[str, Any]:
        """Return the arguments of a module that are the same whatever it trains."""
        return {
            "base": self.base,
            "dtype": "float32",
            "attn_implementation": "eager",  # the fastest on a CPU at these lengths
            "optimization": Optimization(
                learning_rate=self.learning_rate, router_learning_rate=self.router_learning_rate, warmup=0.05
            ),
            "seed": self.seed,
        }

    def equal_lora(self, spec: MixtureSpec) -> LoraConfig:
        """Return one LoRA at the same sites with at least as many trainable parameters as a mixture and its routers.

        Args:
            spec: The mixture.
        """
        base, _ = load_base(self.base)
        sites = spec.placement.sites(anatomy(base), LoRA())
        width = sum(site.in_features + site.out_features for site in sites)
        rank = self.shared_rank + self.rank * len(spec.experts)
        routers = _router_parameters(base, spec)
        rank += -(-routers // width)  # round up, in the single LoRA's favour
        return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=[site.path for site in sites])


def _router_parameters(base: Any, spec: MixtureSpec) -> int:
    from moadapt.mixture import Mixture

    mixture = Mixture(base, spec)
    count = sum(parameter.numel() for parameter in mixture.routers.parameters())
    mixture.detach()
    return count
