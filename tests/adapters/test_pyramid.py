"""Pyramids against the Kronecker product: what a kernel makes of the seed, and whose the seed is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moadapt import Mixture, Placement, attach, load
from moadapt.adapters import Pyramid
from moadapt.adapters.bank import Adapter
from moadapt.adapters.pyramid import PyramidBank, expand
from moadapt.sites import Site
from moadapt_routers import ByTask
from tests.conformance.canonical import TASKS, routing_value
from tests.models import llava_batch, randomize, tiny_llama, tiny_llava

ROWS, TOKENS, WIDE, NARROW = 3, 4, 14, 8
SITE = Site("blocks.0.fc2", "language", "mlp", 0, WIDE, NARROW)
SPECS = {
    "shared": Pyramid(rank=2, stride=3),
    "fine": Pyramid(rank=2, stride=2, scale=0.5),
    "same": Pyramid(rank=2, stride=2),
    "coarse": Pyramid(rank=2, stride=4, scale=-2.0),
    "whole": Pyramid(rank=2, stride=20),
}
"""Strides that divide both widths, one or neither, and one that is larger than both."""


def build(specs: dict[str, Pyramid] = SPECS, *, fresh: bool = False) -> PyramidBank:
    """A float64 bank, by default of random weights."""
    torch.manual_seed(0)
    experts = [name for name in specs if name != "shared"]
    adapters = [Adapter(n, spec, experts.index(n) if n in experts else None) for n, spec in specs.items()]
    bank = PyramidBank(SITE, adapters, nn.Linear(WIDE, NARROW)).double()
    for parameter in bank.parameters() if not fresh else ():
        nn.init.normal_(parameter)
    return bank


def change_of(bank: PyramidBank, name: str) -> Tensor:
    """The weight change of one adapter, (F, D), as the paper has it."""
    one, spec = bank.state(name), SPECS[name]
    seed = one["seed_up"].T @ one["seed_down"]
    corner = seed[: -(-NARROW // spec.stride), : -(-WIDE // spec.stride)]
    product = torch.kron(corner.contiguous(), one["kernel"].reshape(spec.stride, spec.stride))
    return spec.scale * product[:NARROW, :WIDE]


@pytest.mark.parametrize("name", ["constant", "task", "sequence_sparse", "token_dense", "heads"])
def test_a_bank_multiplies_by_the_kronecker_product(name: str) -> None:
    bank, routing = build(), routing_value(name, rows=ROWS, tokens=TOKENS, experts=4, dtype=torch.float64)
    x, y = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64), torch.randn(ROWS, TOKENS, NARROW, dtype=torch.float64)
    expected = x @ change_of(bank, "shared").T
    for expert, each in enumerate([n for n in SPECS if n != "shared"]):
        weights = routing.dense()[..., expert]
        weights = weights.repeat_interleave(NARROW // weights.shape[2], dim=2)
        expected = expected + weights * (x @ change_of(bank, each).T)
    torch.testing.assert_close(bank(x, y, routing), expected, rtol=1e-10, atol=1e-10)


def test_heads_may_cut_through_blocks() -> None:
    bank = build({"whole": SPECS["whole"], "fine": SPECS["fine"], "shared": Pyramid(rank=2, stride=3)})
    routing = routing_value("heads", rows=ROWS, tokens=1, experts=2, dtype=torch.float64)
    heads = torch.cat([routing.weights, routing.weights.flip(2)], dim=2)  # four slices of two features
    x, y = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64), torch.zeros(ROWS, TOKENS, NARROW, dtype=torch.float64)
    routing = type(routing)(heads, 2)
    expected = x @ change_of(bank, "shared").T
    for expert, each in enumerate(("whole", "fine")):
        expected = expected + heads[..., expert].repeat_interleave(2, dim=2) * (x @ change_of(bank, each).T)
    torch.testing.assert_close(bank(x, y, routing), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_low_rank_factors_give_the_kronecker_product(stride: int) -> None:
    down, up = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    kernel = torch.randn(stride, stride, dtype=torch.float64)
    wide, narrow = 4 * stride - stride // 2, 5 * stride
    found_down, found_up = expand(down, up, kernel, wide, narrow)
    assert found_down.shape == (3 * stride, wide)
    expected = torch.kron((up.T @ down).contiguous(), kernel)[:narrow, :wide]
    torch.testing.assert_close(found_up.T @ found_down, expected, rtol=1e-10, atol=1e-10)


def test_fixed_weights_merge_to_one_low_rank_change_a_stride() -> None:
    bank, weights = build(), torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    delta = bank.delta(weights)
    assert len(delta.down) == 2 * (3 + 2 + 4 + 20)  # the two experts of stride 2 are one
    expected = sum(
        w * change_of(bank, name) for name, w in zip(SPECS, [1.0, *weights.tolist()], strict=True)
    )  # the shared adapter comes first
    torch.testing.assert_close(delta.weight(), expected, rtol=1e-10, atol=1e-10)


def test_what_adapters_are_compared_by_is_their_change() -> None:
    bank = build()
    factors = bank.low_rank()
    for name in SPECS:
        mine = [i for i, owner in enumerate(factors.owners) if owner == name]
        found = factors.up[mine].T @ factors.down[mine]
        torch.testing.assert_close(found, change_of(bank, name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("of_seed", "of_kernel"), [(1, 1), (2, 1), (2, 2), (3, 4)])
def test_the_rank_is_that_of_the_seed_times_that_of_the_kernel(of_seed: int, of_kernel: int) -> None:
    spec = Pyramid(rank=of_seed, stride=4)
    site = Site("fc", "language", "mlp", 0, 16, 16)
    bank = PyramidBank(site, [Adapter("shared", spec, None)], nn.Linear(16, 16)).double()
    kernel = torch.randn(4, of_kernel, dtype=torch.float64) @ torch.randn(of_kernel, 4, dtype=torch.float64)
    bank.load_state("shared", {**bank.state("shared"), "kernel": kernel.flatten()})
    change = bank.delta(torch.zeros(0, dtype=torch.float64)).weight()
    assert int(torch.linalg.matrix_rank(change)) == of_seed * of_kernel


def test_the_kernel_learns_first_and_the_seed_after_it() -> None:
    bank = build(fresh=True)
    x, y = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64), torch.zeros(ROWS, TOKENS, NARROW, dtype=torch.float64)
    routing = routing_value("constant", rows=1, tokens=1, experts=4, dtype=torch.float64)
    optimizer, seen = torch.optim.SGD(bank.parameters(), lr=0.1), []
    for _ in range(2):
        optimizer.zero_grad()
        (bank(x, y, routing) - 1).square().sum().backward()
        seen.append({name: bool(p.grad.any()) for name, p in bank.named_parameters() if p.grad is not None})
        optimizer.step()
    kernels, seeds = {"shared_kernel", "expert_kernel"}, {"seed_down", "seed_up"}
    assert seen[0] == {**dict.fromkeys(kernels, True), **dict.fromkeys(seeds, False)}
    assert seen[1] == dict.fromkeys(kernels | seeds, True)


def test_its_size_is_the_closed_form() -> None:
    """One seed for all, whose size the finest stride gives, and a kernel for each."""
    rank, finest, strides = 4, 2, (2, 2, 4, 6, 8)
    experts = {f"of_{i}": Pyramid(rank=rank, stride=s, finest=finest) for i, s in enumerate(strides)}
    mixture = attach(tiny_llava(), experts=experts, router=ByTask(), placement=Placement(kinds=("mlp",)))
    seeds = sum(rank * (-(-s.in_features // finest) - (-s.out_features // finest)) for s in mixture.sites)
    kernels = len(mixture.sites) * sum(stride**2 for stride in strides)
    own = [p for _, bank in mixture.banks() for p in bank.parameters()]
    assert sum(p.numel() for p in own) == seeds + kernels


def mixed() -> Mixture:
    """Trained experts of three strides beside a shared one."""
    experts = {name: Pyramid(rank=2, stride=stride) for name, stride in zip(TASKS, (2, 3, 8), strict=True)}
    mixture = attach(tiny_llava(), shared=Pyramid(rank=2), experts=experts, router=ByTask())
    randomize(mixture)
    return mixture.eval()


def test_strides_mix_in_one_bank_and_come_back_from_disk(tmp_path: Path) -> None:
    mixture, batch = mixed(), llava_batch()
    assert all(bank.names == ("shared", *TASKS) for _, bank in mixture.banks())
    expected = mixture(**batch, task=TASKS).logits
    mixture.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", tiny_llava()).eval()(**batch, task=TASKS).logits, expected)
    plain, report = mixture.merge("task", task="tell")
    assert report.exact
    torch.testing.assert_close(plain(**batch).logits, mixture(**batch, task="tell").logits, rtol=1e-4, atol=1e-4)


def test_a_folder_whose_adapters_differ_in_the_seed_is_refused(tmp_path: Path) -> None:
    mixed().save(tmp_path / "saved")
    file = tmp_path / "saved" / "adapters.safetensors"
    stored = load_file(file)
    key = next(name for name in stored if name.startswith("adapters/tell/") and name.endswith("/seed_up"))
    save_file({**stored, key: stored[key] + 1}, file)
    with pytest.raises(
        ValueError, match=rf"{key} and adapters/shared/.* differ, but adapters of one site have seed_up"
    ):
        load(tmp_path / "saved", tiny_llava())


def test_a_frozen_adapter_holds_the_seed() -> None:
    bank = build()
    x, y = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64), torch.zeros(ROWS, TOKENS, NARROW, dtype=torch.float64)
    before = x @ change_of(bank, "fine").T
    bank.freeze("fine")
    bank.grow(Adapter("new", SPECS["coarse"], 4))
    optimizer = torch.optim.AdamW([p for p in bank.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    routing = routing_value("constant", rows=1, tokens=1, experts=5, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        (bank(x, y, routing) - 1).square().sum().backward()
        optimizer.step()
    assert torch.equal(x @ change_of(bank, "fine").T, before)
    assert bank.state("new")["kernel"].any()  # a new one learns on the same seed
    assert {n for n, p in bank.named_parameters() if p.requires_grad} == {"shared_kernel", "expert_kernel"}
    bank.trim(["same", "new"])
    assert {n for n, p in bank.named_parameters() if not p.requires_grad} == set()


def test_another_number_is_another_seed() -> None:
    experts = {"old": Pyramid(), "new": Pyramid(seed=1), "thin": Pyramid(rank=2)}
    mixture = attach(tiny_llava(), experts=experts, router=ByTask())
    mixture.freeze("old")
    trained = {bank.names: bank.get_parameter("seed_up").requires_grad for _, bank in mixture.banks()}
    assert trained == {("old",): False, ("new",): True, ("thin",): True}


def test_it_is_exported_as_a_lora_of_rank_times_stride(tmp_path: Path) -> None:
    mixture = attach(tiny_llama(), shared=Pyramid(rank=2, stride=3)).eval()
    randomize(mixture, 0.2)
    mixture.export_peft(tmp_path / "lora")
    ids = llava_batch()["input_ids"]
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora")).eval()
    assert {each.r for each in loaded.peft_config.values()} == {6}
    torch.testing.assert_close(loaded(input_ids=ids).logits, mixture(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"stride": 1}, "stride=1, finest=2"),
        ({"finest": 0}, "1 <= finest <= stride"),
        ({"scale": 0.0}, "scale=0"),
        ({"scale": float("inf")}, "scale=inf"),
    ],
    ids=str,
)
def test_bad_options_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pyramid(**wrong)
