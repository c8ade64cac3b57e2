import copy

import torch
from torch import Tensor, nn

from moadapt.training.optimizer import ExpertAdamW

ROWS = torch.tensor([0, 0, 0, 2, 2, 1])
SETTINGS = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.3}


def stacks() -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """A bank's two stacks of three experts of ranks 3, 1 and 2, and a parameter of another kind."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((6, 4), (6, 5), (3,))
    down, up, other = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)
    return down, up, other


def optimizer(down: nn.Parameter, up: nn.Parameter, other: nn.Parameter) -> ExpertAdamW:
    groups = [{"params": [down, up]}, {"params": [other], "weight_decay": 0.0, "lr": 0.01}]
    return ExpertAdamW(groups, [{down: ROWS, up: ROWS}], **SETTINGS)  # type: ignore[arg-type]


def gradients(parameters: tuple[nn.Parameter, ...], used: set[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.tensor([int(expert) in used for expert in ROWS])[:, None]
    for parameter in parameters:
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.grad = drawn * keep if parameter.ndim > 1 else drawn


USED = [{0, 1, 2}, {0}, {0}, {1}, set(), {0, 2}]


def test_rows_of_an_expert_move_as_a_parameter_of_their_own() -> None:
    whole = stacks()
    moved = optimizer(*whole)
    parts = {(i, e): nn.Parameter(whole[i].detach()[e == ROWS].clone()) for i in range(2) for e in range(3)}
    other = nn.Parameter(whole[2].detach().clone())
    groups = [{"params": list(parts.values())}, {"params": [other], "weight_decay": 0.0, "lr": 0.01}]
    plain = torch.optim.AdamW(groups, **SETTINGS)  # type: ignore[arg-type]
    for seed, used in enumerate(USED):
        gradients(whole, used, seed)
        for (i, e), part in parts.items():
            gradient = whole[i].grad
            assert gradient is not None
            part.grad = gradient[e == ROWS].clone() if e in used else None
        other.grad = whole[2].grad
        moved.step()
        plain.step()
    for (i, e), part in parts.items():
        assert torch.equal(whole[i][e == ROWS], part)
    assert torch.equal(whole[2], other)


def test_an_unused_expert_keeps_parameter_and_moments_bit_for_bit() -> None:
    whole = stacks()
    moved = optimizer(*whole)
    for seed, used in enumerate([{0, 1, 2}, {0, 2}]):
        before = copy.deepcopy(moved.state_dict()["state"])
        values = [parameter.detach().clone() for parameter in whole]
        gradients(whole, used, seed)
        moved.step()
    after = moved.state_dict()["state"]
    for i in range(2):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(before[i][name][ROWS == 1], after[i][name][ROWS == 1])
            assert not torch.equal(before[i][name][ROWS == 0], after[i][name][ROWS == 0])
        assert torch.equal(values[i][ROWS == 1], whole[i][ROWS == 1])
        assert after[i]["step"].tolist() == [2, 2, 1]  # runs of experts 0, 2, 1


def test_an_expert_is_used_where_one_of_its_stacks_has_a_gradient() -> None:
    down, up, other = stacks()
    moved = optimizer(down, up, other)
    before = down.detach().clone()
    gradients((down, up, other), {0, 1, 2}, 0)
    down.grad = torch.zeros_like(down)  # as at the start of LoRA, where the up side is zero
    moved.step()
    assert torch.allclose(down, before * (1 - 0.1 * 0.3))


def test_a_stored_state_goes_on_as_the_first_would_have() -> None:
    first = stacks()
    one = optimizer(*first)
    for seed in range(3):
        gradients(first, USED[seed], seed)
        one.step()
    second = stacks()
    for mine, theirs in zip(second, first, strict=True):
        mine.data.copy_(theirs.data)
    other = optimizer(*second)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for seed in range(3, 6):
        for parameters, used in ((first, one), (second, other)):
            gradients(parameters, USED[seed], seed)
            used.step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_stay_and_a_closure_computes_them() -> None:
    down, up, other = stacks()
    moved = optimizer(down, up, other)

    def closure() -> Tensor:
        loss = (down.sum() + up.sum() + other.sum()) ** 2
        moved.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    assert moved.step(closure) is not None
    assert all(parameter.grad is not None for parameter in (down, up, other))


def test_a_row_may_be_one_number_and_a_stack_may_be_empty() -> None:
    gates, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(0, 4))
    none = torch.empty(0, dtype=torch.long)
    moved = ExpertAdamW([{"params": [gates, empty]}], [{gates: torch.arange(3), empty: none}], lr=0.1)
    gates.grad, empty.grad = torch.tensor([0.0, 2.0, 0.0]), torch.empty(0, 4)
    moved.step()
    assert (gates != 1).tolist() == [False, True, False]


def test_parameters_without_gradient_stay() -> None:
    whole = stacks()
    before = [parameter.detach().clone() for parameter in whole]
    optimizer(*whole).step()
    assert all(torch.equal(a, b) for a, b in zip(whole, before, strict=True))
