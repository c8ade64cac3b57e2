"""Two tasks that agree on one direction of a shared adapter and oppose each other on another, the one ten times louder.

Both want 1 along the agreed direction; along the other the loud task wants 1 and the quiet one -1. The loud one's
losses are ten times as large, and no output comes nearer than a floor, as answers are never certain. The adapter is
linear, so what each method does is known:

- The plain sum ends at (10 - 1) / (10 + 1) = 0.82: the quiet task is worse off than untouched.
- A weight of 0.1 makes the tasks alike, so the end is 0. `uncertainty` ends there too: under its variances the sum is
  that of `log L`, in which a factor before a loss is a constant, and a floor above 1 leaves one minimum, in the middle.
- `gradnorm` ends where equal norms are those of equal progress: both losses fell by the same share, again 0.
- `dynamic_average` compares a loss with itself a little earlier and knows of no loudness: where both stand still, the
  weights are 1 again, so it ends as the plain sum does.
- `pcgrad` takes no step that harms either task, so the quiet one's loss never rises. It stays where all that is left is
  conflict, as both projections are nothing there: at the agreed 1, short of where the plain sum ends.
- `cagrad` ends as the plain sum does: along the last direction its step is `(1 - c) / (1 + c)` of the plain one. So on
  the way there the quiet task has lost less.
"""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from moadapt.adapters import Adapter, Bias
from moadapt.balancing import Balance, CAGrad, DynamicAverage, Fixed, GradNorm, PCGrad, Uncertainty
from moadapt.call import Call
from moadapt.shared_copies import SharedCopies
from moadapt.sites import Site
from moadapt.training.task_gradients import TaskGradients
from tests.planted.toy import orthonormal

WIDE, LOUDNESS, FLOOR, STEPS, RATE = 8, 10.0, 2.0, 400, 0.005
TASKS = ("loud", "quiet")
OF_ROWS = torch.tensor([0, 1, 1, 0])
SCALES = torch.tensor([LOUDNESS, 1.0], dtype=torch.float64)[OF_ROWS]
C = 0.5
PLAIN = (LOUDNESS - 1) / (LOUDNESS + 1)
UNTOUCHED = 2.0
"""Loss of the quiet task beyond its floor at the start."""


class Conflict:
    """A shared offset, what two tasks want of it, and a fit of it.

    Args:
        seed: Of the directions.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.agreed, self.opposed = orthonormal(2, WIDE).double()
        wanted = torch.stack([self.agreed + self.opposed, self.agreed - self.opposed])
        self.wanted, self.inputs = wanted[OF_ROWS], torch.randn(len(OF_ROWS), 1, WIDE).double()
        self.site = Site("linear", "language", "attention", 0, WIDE, WIDE, has_bias=True)
        self.bank = Bias.bank(self.site, [Adapter("shared", Bias(), None)], nn.Linear(WIDE, WIDE)).double()
        self.bank.family = Bias
        self.path: list[Tensor] = []

    def losses(self, gradients: TaskGradients | None) -> Tensor:
        """Loss of every row, told apart by task where gradients are collected."""
        bank, routing, call = self.bank, None, Call(len(OF_ROWS))
        if gradients is not None:
            twin = gradients.collect(OF_ROWS).of(bank, None, self.site, self.inputs, call)
            assert twin is not None
            bank, routing = twin
        given = bank(self.inputs, torch.zeros_like(self.inputs), routing, call)[:, 0]
        return SCALES * ((given - self.wanted).square().sum(dim=1) + FLOOR)

    def fit(self, balance: Balance, rate: float) -> "Conflict":
        """Descend, as a training does with its batches.

        Args:
            balance: The method.
            rate: Of the offset.
        """
        copies = SharedCopies([(self.site, self.bank)], 0, 2, blends=False, reads_images=False)
        gradients = TaskGradients(copies) if balance.reads_gradients else None
        balancer = balance.build(TASKS, 0)
        groups = [{"params": self.bank.parameters()}, {"params": balancer.parameters(), "lr": 0.5}]
        optimizer = torch.optim.SGD(groups, lr=rate)
        for step in range(STEPS):
            optimizer.zero_grad()
            each = self.losses(gradients)
            (balancer.weigh(each, torch.ones_like(each), OF_ROWS).sum() / len(OF_ROWS)).backward()
            sums = torch.zeros(2, dtype=each.dtype).index_add(0, OF_ROWS, each.detach())
            balancer.observe(sums, OF_ROWS.bincount().double())
            if gradients is not None:
                products = gradients.sum_up(lambda whole: whole)
                gradients.write(balancer.combine(products, step), 1.0)
                gradients.clear()
            balancer.step(None if gradients is None else products)
            optimizer.step()
            self.path.append(self.bank.state("shared")["bias"][0])
        return self

    def along(self, direction: Tensor) -> Tensor:
        """Where the offset was after each step."""
        return torch.stack(self.path) @ direction

    def quiet(self) -> Tensor:
        """Loss of the quiet task beyond its floor after each step; untouched it is 2."""
        return (self.along(self.agreed) - 1) ** 2 + (self.along(self.opposed) + 1) ** 2


RATES = {"uncertainty": 20 * RATE}
"""Where weights are small: those of `uncertainty` are 1 / (2 L)."""
METHODS: dict[str, Balance] = {
    "none": Fixed(),
    "fixed": Fixed(weights={"loud": 1 / LOUDNESS}),
    "uncertainty": Uncertainty(),
    "gradnorm": GradNorm(alpha=1.0, learning_rate=0.01),
    "dynamic_average": DynamicAverage(every=10),
    "pcgrad": PCGrad(),
    "cagrad": CAGrad(c=C),
}


@cache
def fitted(name: str, seed: int) -> Conflict:
    return Conflict(seed).fit(METHODS[name], RATES.get(name, RATE))


over_seeds = pytest.mark.parametrize("seed", range(3))


@over_seeds
def test_what_tasks_agree_on_is_learned_by_all_methods(seed: int) -> None:
    for name in METHODS:
        run = fitted(name, seed)
        assert float(run.along(run.agreed)[-1]) == pytest.approx(1, abs=0.02), name


@over_seeds
def test_the_loud_task_wins_where_nothing_tells_its_loudness(seed: int) -> None:
    for name in ("none", "dynamic_average", "cagrad"):
        run = fitted(name, seed)
        assert float(run.along(run.opposed)[-1]) == pytest.approx(PLAIN, abs=0.01), name
        assert run.quiet()[-1] > UNTOUCHED + 1, name


@over_seeds
def test_weights_that_follow_scale_or_progress_meet_in_the_middle(seed: int) -> None:
    for name in ("fixed", "uncertainty", "gradnorm"):
        run = fitted(name, seed)
        assert float(run.along(run.opposed)[-1]) == pytest.approx(0, abs=0.02), name
        assert run.quiet()[-1] < UNTOUCHED - 0.9, name


@over_seeds
def test_projected_gradients_never_harm_the_quiet_task(seed: int) -> None:
    run = fitted("pcgrad", seed)
    steps = run.quiet().diff()
    assert steps.max() < 1e-3 * steps.abs().max()
    assert 0 < run.along(run.opposed)[-1] < PLAIN / 2
    moves = torch.stack(run.path).diff(dim=0).norm(dim=1)
    assert moves[-1] < 1e-3 * moves[0]


@over_seeds
def test_the_averse_step_loses_less_of_the_quiet_task_on_the_same_way(seed: int) -> None:
    averse, plain = fitted("cagrad", seed), fitted("none", seed)
    assert (averse.quiet() <= plain.quiet() + 1e-9).all()
    assert (plain.quiet() - averse.quiet()).max() > 0.3
    left = {run: (PLAIN - run.along(run.opposed)).abs().log() for run in (averse, plain)}
    late = slice(200, 300)  # the agreed direction is done, the other on its way
    assert float(left[averse].diff()[late].mean()) == pytest.approx((1 - C) / (1 + C) * plain_pace(), rel=0.05)


def plain_pace() -> float:
    """How the distance to the end shrinks in a step of the plain sum, as the logarithm of its factor."""
    curvature = 2 * (LOUDNESS + 1) * 2 / len(OF_ROWS)
    return float(torch.tensor(1 - RATE * curvature, dtype=torch.float64).log())
