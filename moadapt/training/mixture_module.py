"""The Lightning module of a mixture."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.adapters.family import FamilySpec
from moadapt.balancing import Balance, Balancer
from moadapt.initialising import start, waiting_sites
from moadapt.input_means import input_means
from moadapt.mixture import Mixture
from moadapt.mixture_spec import MixtureSpec
from moadapt.objectives import Objective, ParameterObjective, RoutingObjective
from moadapt.placement import Placement
from moadapt.ranks import RankAllocator, RankDriver, trim_ranks
from moadapt.ranks.allocator import ranks_of, stored_ranks, with_ranks
from moadapt.registry import OBJECTIVES
from moadapt.routed import with_tasks
from moadapt.router import RouterSpec
from moadapt.shared_copies import Copied
from moadapt.sites import Site, anatomy
from moadapt.storage import copy_adapters, load_tensors, tensors
from moadapt.tracing import Observation
from moadapt.training.batch import Batch
from moadapt.training.expert_use import ExpertUse
from moadapt.training.module import TaskModule
from moadapt.training.noise import shared_noise
from moadapt.training.optimization import Optimization
from moadapt.training.optimizer import ExpertAdamW, add_gradients
from moadapt.training.penalties import routing_values
from moadapt.training.roles import BALANCE, ROUTER, Role
from moadapt.training.task_gradients import TaskGradients
from moadapt.training.teaching import check_tasks, check_taught, log_prob_of


class MixtureModule(TaskModule):
    """Trains a mixture: shared adapter, experts and routers on a frozen base.

    Args:
        base: Name of the base; a registered short name, a folder or a hub name.
        experts: Adapters that the router weighs, by name.
        shared: The adapter that every input uses.
        router: Gives the experts their weights; needed exactly when there are experts.
        placement: Where adapters sit that name no placement of their own; by default all attention and MLP linears of
            the language tower.
        objectives: What is made small beside the loss of the answers.
        optimization: Settings of the optimiser.
        pass_task: Whether the mixture is told the task of every row; it is told always where the router goes by task,
            and in training where the router is taught by it. Objectives always know it.
        dtype: Number type of the base's weights, such as `float32` or `bfloat16`; `auto` takes the file's own.
        attn_implementation: One of transformers' attention kernels.
        gradient_checkpointing: Compute blocks again in the backward pass, to save memory.
        seed: Of dropout and routers' noise, from 0.
        ranks: Finds the ranks of LoRAs; by default they are those of the adapters.
        start_from: Folder of a saved mixture on the same base whose adapters of the same names training starts from;
            they have the settings that they were saved with.
        train: Whether `all` is trained or the `routers` alone, every adapter being frozen as it was saved.
        calibration_batches: How many of the first training batches starts and ranks that follow data read, at least 1;
            every process reads all of them whole.
        quantize: How to quantise the base's linear layers while it is loaded: `int8`, `int4`, `nf4` or `llm_int8`, see
            `moadapt.bases.load_base`; None loads them as they were written.
        balance: How tasks are balanced, by weights of their losses or by what is made of their gradients; None lets
            every token count alike.
        compile: A backend of `torch.compile`, such as `inductor`, through which the mixture runs; None does not.

    Raises:
        ValueError: There are no calibration batches; routers are to be trained alone and there is none, or no saved
            adapters; or ranks are to be pruned that the router needs to be equal.
    """

    def __init__(
        self,
        base: str,
        experts: dict[str, FamilySpec] | None = None,
        shared: FamilySpec | None = None,
        router: RouterSpec | None = None,
        placement: Placement | None = None,
        objectives: list[Objective] | None = None,
        optimization: Optimization = Optimization(),  # noqa: B008, a frozen value
        pass_task: bool = False,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        ranks: RankAllocator | None = None,
        calibration_batches: int = 8,
        start_from: str | None = None,
        train: Literal["all", "routers"] = "all",
        quantize: str | None = None,
        balance: Balance | None = None,
        compile: str | None = None,
    ) -> None:
        super().__init__(base, optimization, dtype, attn_implementation, seed, quantize)
        self.experts, self.shared, self.router, self.placement = experts, shared, router, placement
        self.objectives = _by_name(objectives or ())
        self._judges = {name: o for name, o in self.objectives.items() if isinstance(o, RoutingObjective)}
        self.pass_task = pass_task or (router is not None and router.depends_on == "task")
        self.gradient_checkpointing, self.backend = gradient_checkpointing, compile
        if compile is not None and compile not in torch.compiler.list_backends(exclude_tags=()):
            known = ", ".join(torch.compiler.list_backends())
            raise ValueError(f"compile is {compile!r}; give a backend of torch.compile, such as {known}")
        self.ranks, self.start_from, self.trains, self.balance = ranks, start_from, train, balance
        if calibration_batches < 1:
            raise ValueError(f"calibration_batches is {calibration_batches}; give at least 1")
        self.calibration_batches = calibration_batches
        if ranks is not None and ranks.prunes and router is not None and router.combines == "parameters":
            raise ValueError(
                f"{type(ranks).__name__} leaves each adapter ranks of its own, but {type(router).__name__} blends the "
                "parameters of adapters with one rank; leave ranks out, or choose a router that blends outputs"
            )
        if train not in ("all", "routers"):
            raise ValueError(f"train is {train!r}; choose all or routers")
        if train == "routers" and (router is None or start_from is None):
            lacking = "router; give experts and one" if router is None else "adapter that was trained; give start_from"
            raise ValueError(f'train="routers" trains routers alone, and there is no {lacking}')
        self._fits = False
        self._ranks_found = False
        self._driver: RankDriver | None = None
        self._stored_ranks: dict[str, Any] | None = None
        self._stored_frozen: tuple[str, ...] = ()
        self._observed: list[Observation] = []
        self._policy: Tensor | None = None
        self._use: ExpertUse | None = None
        self._utilities: Tensor | None = None
        self.balancer: Balancer | None = None
        self._by_task: TaskGradients | None = None

    @property
    def mixture(self) -> Mixture:
        """The mixture in training."""
        assert isinstance(self.model, Mixture), "configure_model was called"
        return self.model

    def finish(self) -> Mixture:
        """Trim the ranks that a fit pruned, if any, and return the mixture; checkpoints fit the untrimmed one.

        Where the fit stopped early, what its budget does not pay for is pruned now.
        """
        if self._driver is not None:
            self._driver.finish()
        if self.ranks is not None and self.ranks.prunes:
            self.model = trim_ranks(self.mixture)
        return self.mixture

    def setup(self, stage: str) -> None:
        """Require that the router knows the tasks of the data where it goes by task, or is taught by it.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            ValueError: It does not know one, or, in training, knows one that the data lacks.
        """
        super().setup(stage)
        self._fits = stage == "fit"
        if self.router is not None:
            check_tasks(self.router, list(self.experts or {}), list(self.data.tasks), fits=self._fits)
        if self._fits and self.balance is not None:
            self.balancer = self.balance.build(tuple(self.data.tasks), self.seed).to(self.device)

    def build(self, base: PreTrainedModel) -> Mixture:
        """Attach adapters and routers."""
        spec = MixtureSpec(dict(self.experts or {}), self.shared, self.router, self.placement or Placement())
        reads = self.ranks is not None and bool(self.ranks.reads(spec, anatomy(base)))
        if reads and self.start_from is not None:
            raise ValueError(
                f"{type(self.ranks).__name__} finds ranks from data, but start_from gives adapters that have theirs; "
                "leave one of the two out"
            )
        if self.ranks is not None and not reads:
            spec = self.ranks.plan(spec, anatomy(base))
        mixture = self._on(base, spec)
        if self.start_from is not None:
            copy_adapters(mixture, Path(self.start_from))
        if self.trains == "routers":
            self._freeze(mixture)
        return mixture

    def _freeze(self, mixture: Mixture) -> None:
        """Freeze every adapter, so that routers train alone."""
        if not any(parameter.requires_grad for parameter in mixture.routers.parameters()):
            raise ValueError(
                f'train="routers" trains routers alone, and {type(self.router).__name__} has nothing to train; choose '
                "another router"
            )
        for adapter in mixture.spec.adapters():
            mixture.freeze(adapter.name)

    def configure_model(self) -> None:
        """Load the base and build on it, once; in a fit, find the ranks that follow data, unless they were loaded."""
        super().configure_model()
        sites = self._read_for_ranks()
        if self._fits and sites and not self._ranks_found:
            assert self.ranks is not None, "sites are read for it"
            means = self._means({*sites, *waiting_sites(self.mixture)})
            self._rebuild(self.ranks.plan(self.mixture.spec, self.mixture.anatomy, means))
            start(self.mixture, means)

    def on_fit_start(self) -> None:
        """Start adapters from data that wait for it; those of a checkpoint, now loaded, do not."""
        sites = waiting_sites(self.mixture)
        if sites:
            start(self.mixture, self._means(sites))

    def on_train_start(self) -> None:
        """Let objectives judge whether they suit the mixture; start what changes ranks, or go on with it.

        Raises:
            ValueError: They do not, or nothing teaches the routers.
        """
        super().on_train_start()
        if self.optimization.expert_mean == "use" and self.mixture.places:
            self._use = ExpertUse(self.mixture)
        check_taught(self.router, self.mixture, self._judges.values())
        for objective in self._judges.values():
            objective.check(self.mixture, tuple(self.data.tasks))
        if self.ranks is not None:
            self._driver = self.ranks.driver(self.mixture.banks(), self.trainer.estimated_stepping_batches)
        if self._driver is not None and self._stored_ranks is not None:
            self._driver.load_state(self._stored_ranks)
        if self.balance is not None and self.balance.reads_gradients:
            self._by_task = TaskGradients(self.mixture.copy_shared(len(self.data.tasks)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss, telling routers how far the training is; one without end never gets on.

        They get the noise of the step, too, the same for all batches whose gradients are accumulated. Both are theirs
        in the step alone, so that a validation judges them as they are in use.
        """
        copied = None if self._by_task is None else self._by_task.collect(batch.task_ids(list(self.data.tasks)))
        with self._step_told(), self.mixture.using(copied):
            return super().training_step(batch, batch_idx)

    @contextmanager
    def _step_told(self) -> Iterator[None]:
        """Let routers know the step within the `with` block."""
        context, step = self.mixture.context, self.trainer.global_step
        share = min(1.0, step / self.trainer.estimated_stepping_batches)
        places = [place.name for place in self.mixture.places]
        context.progress, context.noise = torch.tensor(share, device=self.device), shared_noise(places, self.seed, step)
        try:
            yield
        finally:
            context.progress = context.noise = None

    def task_gradients(self, batch: Batch) -> TaskGradients:
        """Return the gradients that the tasks of a batch have for the shared adapter, of this process alone.

        The training goes on as if nobody had asked, at the cost of one more pass forward and back.

        Args:
            batch: The first of a step.

        Raises:
            ValueError: They cannot be told task by task.
        """
        tasks = list(self.data.tasks)
        found = self._by_task or TaskGradients(self.mixture.copy_shared(len(tasks)))

        def losses(copied: Copied) -> Tensor:
            with self._step_told(), self.mixture.using(copied):
                return TaskModule.losses(self, batch)[0]

        with self.trainer.precision_plugin.train_step_context():
            found.measure(batch.task_ids(tasks), losses)
        return found

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, then mask the ranks that are not kept."""
        super().optimizer_step(*args, **kwargs)
        if self._driver is not None:
            self._driver.act()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of what changes ranks, and which adapters are frozen."""
        checkpoint["frozen"] = self.mixture.frozen
        if self._driver is not None:
            checkpoint["ranks"] = self._driver.state()
        if self.balancer is not None:
            checkpoint["balance"] = self.balancer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of what changes ranks until it starts, and what is frozen until tensors are there."""
        self._stored_frozen = tuple(checkpoint.get("frozen", ()))
        self._stored_ranks = checkpoint.get("ranks")
        if self.balancer is not None and "balance" in checkpoint:
            self.balancer.load_state_dict(checkpoint["balance"])

    def options(self, batch: Batch) -> dict[str, Any]:
        """Return the prompt mask of a batch with written answers, and the tasks where the mixture is told them."""
        trains = batch.labels is not None
        taught = trains and self.router is not None and self.router.taught_by_task
        told: dict[str, Any] = {"task": batch.task_names} if self.pass_task or taught else {}
        return {**told, "prompt_mask": batch.prompt_mask} if trains and not batch.classes else told

    def losses(self, batch: Batch, *key: int) -> tuple[Tensor, Tensor]:
        """Return loss and count of tokens of every row, and keep what the routers decided.

        Where they sample, that is the mean loss over several passes, each with choices of its own. In evaluation
        nothing is kept, and one pass is enough.
        """
        passes = 1 if self.router is None else self.router.passes
        if not self.training or (passes == 1 and not self._judges and self._use is None):
            return super().losses(batch, *key)
        if any(objective.needs_utilities for objective in self._judges.values()):
            self._utilities = self.utilities(batch)
        found, chances, task_ids = [], [], batch.task_ids(list(self.data.tasks))
        before = len(self._observed)
        for index in range(passes):
            with self.mixture.observe() as observed:
                losses, counts = super().losses(batch, *key, *([index] if passes > 1 else []))
            self._observed += [with_tasks(each, task_ids) for each in observed]
            found.append(losses)
            chances += [log_prob_of(observed, len(losses))] if passes > 1 else []
        if batch.spare:  # as many passes as others run, of which nothing is judged
            del self._observed[before:]
            return torch.stack(found).mean(dim=0), counts
        if chances:
            assert self.router is not None, "routers sample"
            rewarded = [self.weigh(losses.detach(), counts, task_ids) for losses in found]
            self._policy = self.router.policy_loss(torch.stack(chances), torch.stack(rewarded))
        if self._use is not None:
            self._use.add(self._observed[before:], counts)
        return torch.stack(found).mean(dim=0), counts

    def weigh(self, losses: Tensor, counts: Tensor, tasks: Tensor) -> Tensor:
        """Multiply the losses of rows by the weights of their tasks, and add what their tokens cost besides, (B,)."""
        return losses if self.balancer is None else self.balancer.weigh(losses, counts, tasks)

    def observe_tasks(self, sums: Tensor) -> None:
        """Let what balances tasks look at the losses of a batch."""
        if self.balancer is not None:
            self.balancer.observe(*sums)

    @torch.no_grad()
    def utilities(self, batch: Batch) -> Tensor:
        """Return by how much each expert lowers the mean loss of each row, beside the shared adapter alone, (B, E).

        Costs a pass for each expert and one without any, in evaluation mode.

        Args:
            batch: The rows, with labels.
        """
        found = []
        with self.mixture.evaluating():
            for weights in ({}, *({name: 1.0} for name in self.mixture.experts)):
                with self.mixture.override(weights):
                    losses, counts = super().losses(batch)
                found.append(losses / counts.clamp(min=1))
        return found[0].unsqueeze(1) - torch.stack(found[1:], dim=1)

    def penalty(self, tokens: Tensor) -> Tensor | None:
        """Return the weighted sum of the objectives on routings, and what teaches routers that sample."""
        terms = []
        if self._judges:
            reduce = partial(self.trainer.strategy.reduce, reduce_op="sum")
            tasks = tuple(self.data.tasks)
            values = routing_values(self._judges, self.mixture, self._observed, reduce, tasks, self._utilities)
            for name, value in values.items():
                self.log(f"objective/{name}", value.detach())
                terms.append(self._judges[name].weight * value)
        if self._policy is not None:
            terms.append(self._policy / tokens)
        self._observed, self._policy, self._utilities = [], None, None
        return torch.stack(terms).sum() if terms else None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Show the gradients of the loss to what changes ranks, then add those of the objectives on parameters.

        Experts that no row used are told by the loss alone: the objectives neither score nor move them.
        """
        if self._by_task is not None:
            self._combine(self._by_task)
        elif self.balancer is not None:
            self.balancer.drop() if self.skips else self.balancer.step()
        super().on_before_optimizer_step(optimizer)
        if self._use is not None and self._tokens is not None:
            self._use.normalise(self._tokens, partial(self.trainer.strategy.reduce, reduce_op="sum"))
        if self.skips:
            return
        if self._driver is not None:
            self._driver.observe()
        chosen = {name: o for name, o in self.objectives.items() if isinstance(o, ParameterObjective)}
        values = {name: objective.value(self.mixture) for name, objective in chosen.items()}
        terms = [o.weight * values[name] for name, o in chosen.items() if o.weight]
        if terms:
            assert isinstance(optimizer, ExpertAdamW), "see TaskModule.configure_optimizers"
            add_gradients(torch.stack(terms).sum(), optimizer)
        for name, value in values.items():
            self.log(f"objective/{name}", value.detach())

    def _combine(self, gradients: TaskGradients) -> None:
        """Put in the place of the shared adapter's gradient what balance makes of those of the tasks.

        Nothing is made of gradients that are dropped, or that are left to others to judge as they are not finite.
        """
        assert self.balancer is not None, "it reads gradients"
        products = gradients.sum_up(partial(self.trainer.strategy.reduce, reduce_op="sum"))
        if not self.skips and bool(products.isfinite().all()):
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # has unscaled those of parameters only
            shares = self.balancer.combine(products, self.trainer.global_step)
            gradients.write(shares, 1.0 if scaler is None else 1 / scaler.get_scale())
            self.balancer.step(products)
        else:
            self.balancer.drop()
        gradients.clear()

    def roles(self) -> dict[nn.Parameter, Role]:
        """Return shared and expert parameters with the tower of their site, and those of routers."""
        found: dict[nn.Parameter, Role] = {}
        parts = self.mixture.anatomy
        for site, bank in self.mixture.banks():
            depth = None if site.layer is None else parts.tower(site.tower).depth(site.layer)
            stacked, rates, undecayed = bank.expert_rows(), bank.rates(), bank.undecayed()
            for name, parameter in bank.named_parameters():
                if parameter.requires_grad:
                    kind = "expert" if name in stacked else "shared"
                    own = rates.get(name, 1.0), name not in undecayed
                    found[parameter] = Role(site.tower, kind, *own, bank.family.cross_modal, depth)
        found |= {p: Role(ROUTER, ROUTER) for p in self.mixture.routers.parameters() if p.requires_grad}
        if self.balancer is not None:
            role = Role(BALANCE, BALANCE)
            role = replace(role, factor=self.balancer.learning_rate / self.optimization.rate(role))
            found |= dict.fromkeys(self.balancer.parameters(), role)
        return found

    def stacks(self) -> list[dict[nn.Parameter, Tensor]]:
        """Return for each bank its stacked parameters, with the expert of every row; likewise with tasks for balance.

        So neither experts nor tasks that a step has no row of are moved by it.
        """
        balanced = [] if self.balancer is None else [*self.balancer.parameters()]
        return [
            *(
                {bank.get_parameter(name): rows for name, rows in bank.expert_rows().items()}
                for _, bank in self.mixture.banks()
            ),
            *({parameter: torch.arange(len(parameter))} for parameter in balanced),
        ]

    def expert_names(self) -> tuple[str, ...]:
        """Return the names of the mixture's experts."""
        return self.mixture.experts

    def readings(self) -> dict[str, float]:
        """Return the mean over sites of what the banks tell, such as how far gates are open, and the ranks kept."""
        found: dict[str, list[float]] = {}
        for _, bank in self.mixture.banks():
            for name, value in bank.readings().items():
                found.setdefault(name, []).append(value)
        kept = {} if self._driver is None else self._driver.readings()
        told = {} if self.balancer is None else self.balancer.readings()
        return {name: sum(values) / len(values) for name, values in found.items()} | kept | told

    def tensors(self) -> dict[str, Tensor]:
        """Return adapters and routers under the names that a saved mixture gives them."""
        return tensors(self.mixture)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy adapters and routers in, of the ranks that they have; see `TaskModule.load_tensors`."""
        spec, found = self.mixture.spec, self.mixture.anatomy
        if self._read_for_ranks():
            stored = with_ranks(spec, stored_ranks(spec, found, tensors))
            if ranks_of(stored, found) != ranks_of(spec, found):
                self._rebuild(stored)
            self._ranks_found = True
        load_tensors(self.mixture, tensors)
        for name in self._stored_frozen:
            self.mixture.freeze(name)

    def _on(self, base: PreTrainedModel, spec: MixtureSpec) -> Mixture:
        mixture = Mixture(base, spec)
        if self.gradient_checkpointing:
            mixture.gradient_checkpointing_enable()
        if self.backend is not None:
            mixture.compile(backend=self.backend)
        return mixture

    def _rebuild(self, spec: MixtureSpec) -> None:
        device, frozen = self.mixture.base.device, self.mixture.frozen
        self.model = self._on(self.mixture.detach(), spec).to(device).train()
        for name in frozen:
            self.mixture.freeze(name)
        self._ranks_found = True

    def _read_for_ranks(self) -> tuple[Site, ...]:
        """Return the sites whose inputs the ranks follow."""
        return () if self.ranks is None else self.ranks.reads(self.mixture.spec, self.mixture.anatomy)

    def _means(self, sites: Iterable[Site]) -> dict[Site, Tensor]:
        """Run the first training batches through the bare base, on all processes the same; see `input_means`."""
        self.mixture.to(self.trainer.strategy.root_device)
        with self.mixture.bare_base() as base:
            batches = self.data.first_batches(self.calibration_batches)
            cast = (batch.to(base.device).cast(base.dtype) for batch in batches)
            keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
            options = {"use_cache": False, **({"logits_to_keep": 1} if keeps else {})}  # nobody reads the logits
            given = ({**batch.inputs, **({} if batch.classes else options)} for batch in cast)
            return input_means(base, sites, given)


def _by_name(objectives: Sequence[Objective]) -> dict[str, Objective]:
    """Name objectives for the log: by their short name, the second of a kind with a number behind it."""
    found: dict[str, Objective] = {}
    for objective in objectives:
        name = OBJECTIVES.name_of(type(objective))
        same = sum(type(other) is type(objective) for other in found.values())
        found[f"{name}_{same + 1}" if same else name] = objective
    return found
