"""Every kind of tuner that the peft library has is hosted exactly or refused with a reason."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moadapt import Mixture, Placement, Routing, attach, load
from moadapt.adapters import NotMergeable, PeftTuner
from moadapt.adapters.bank import Adapter
from moadapt.adapters.peft_hosting import other_tensors
from moadapt.adapters.peft_kinds import HOSTED, REFUSED, accepted_options, config, not_tried
from moadapt.adapters.peft_tuner import PeftBank
from moadapt.registry import FAMILIES
from moadapt.sites import Site
from moadapt.specs import from_json, to_json
from moadapt.training.mixture_module import MixtureModule
from moadapt.training.optimization import Optimization, check_groups, parameter_groups
from moadapt.training.optimizer import ExpertAdamW
from moadapt_routers import ByTask
from tests.conformance.canonical import EXPERTS, TASKS
from tests.models import llava_batch, tiny_llama

SMALL: dict[str, dict[str, Any]] = {  # sizes that fit tiny layers
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 50},
    "LORA": {"use_dora": True},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"vector_length": 8, "num_vectors": 12},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 50},
}
SHARING = ("PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA")
"""Kinds whose layers share tensors."""
WIDTH, FACES, ROWS, TOKENS = 16, 24, 3, 4
over_kinds = pytest.mark.parametrize("kind", HOSTED)
SOME = Placement(modules=("q_proj", "v_proj"))
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled"
)  # SHIRA, told by torch


def spec_of(kind: str, **more: Any) -> PeftTuner:
    return PeftTuner(kind=kind, options={**SMALL.get(kind, {}), **more})


def mixture_of(spec: PeftTuner, *, experts: bool = True, base: Any = None, scale: float = 0.1) -> Mixture:
    """A mixture of one kind whose adapters were moved from their start."""
    mixture = attach(
        tiny_llama() if base is None else base,
        shared=spec,
        experts={name: spec for name in EXPERTS} if experts else None,
        router=ByTask() if experts else None,
        placement=SOME,
    )
    move(mixture, scale)
    return mixture.eval()


def move(module: nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def text_batch() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in llava_batch().items() if name != "pixel_values"}


def logits(model: Any, batch: dict[str, Tensor] | None = None, **how: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**(text_batch() if batch is None else batch), **how).logits
    return found


def bank_of(kind: str, experts: dict[str, int | None]) -> tuple[PeftBank, nn.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, FACES).requires_grad_(False)
    site = Site("blocks.0.linear", "language", "attention", 0, WIDTH, FACES)
    bank = PeftTuner.bank(site, [Adapter(name, spec_of(kind), index) for name, index in experts.items()], linear)
    linear.double()  # some kinds cannot be built over float64, but all run there
    move(bank.double(), 0.1)
    return bank.eval(), linear


def test_every_type_of_the_installed_peft_was_tried() -> None:
    assert not_tried() == (), f"peft {peft.__version__} has new types: try them, then list them as hosted or refused"
    assert HOSTED.keys() | REFUSED.keys() == {kind.value for kind in PeftType}
    assert not HOSTED.keys() & REFUSED.keys()


@over_kinds
def test_a_fresh_tuner_starts_as_its_table_says(kind: str) -> None:
    mixture = mixture_of(spec_of(kind), scale=0)
    with mixture.disabled():
        plain = logits(mixture)
    moved = float((logits(mixture, task=TASKS) - plain).abs().max() / plain.abs().max())
    start = HOSTED[kind].start
    assert (moved == 0) is (start == "exact")
    assert (moved < 1e-5) is (start != "never")


@over_kinds
def test_a_lone_tuner_is_what_plain_peft_makes_of_it(kind: str) -> None:
    spec = spec_of(kind)
    mixture = mixture_of(spec, experts=False)
    base = tiny_llama()
    settings = config(kind, spec.options, ["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = get_peft_model(base, settings, autocast_adapter_dtype=False).eval()
    for site, bank in mixture.banks():
        assert isinstance(bank, PeftBank)
        layer = plain.base_model.model.get_submodule(site.path)
        assert isinstance(layer, BaseTunerLayer)
        own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}  # type: ignore[attr-defined]
        own |= {name: place[key] for name, place, key in other_tensors(layer)}  # type: ignore[arg-type]
        for name, tensor in bank.state("shared").items():
            own[name].data.copy_(tensor)
    found, expected = logits(mixture), logits(plain)
    assert (expected - logits(tiny_llama())).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("axes", [(1, 1, 1), (ROWS, 1, 1), (ROWS, TOKENS, 1), (ROWS, 1, 2)], ids=str)
@over_kinds
def test_a_bank_adds_the_weighted_sum_of_tuners_less_base(kind: str, axes: tuple[int, int, int]) -> None:
    bank, linear = bank_of(kind, {"shared": None, "zero": 0, "two": 2})
    weights = torch.rand(*axes, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    y = linear(x)
    expected = bank.layers[0](x) - y
    for layer, expert in ((bank.layers[1], 0), (bank.layers[2], 2)):
        spread = weights[..., expert].repeat_interleave(FACES // axes[2], dim=2)
        expected = expected + spread * (layer(x) - y)
    found, into = bank(x, y, Routing(weights, 3)), torch.randn_like(y)
    wanted = (x, weights, *(p for p in bank.parameters() if p.requires_grad))
    for ours, theirs in zip(
        (found, *torch.autograd.grad(found, wanted, into, retain_graph=True, materialize_grads=True)),
        (expected, *torch.autograd.grad(expected, wanted, into, materialize_grads=True)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    if axes[1] == 1:  # no token sees another
        torch.testing.assert_close(bank(x[:, :1], y[:, :1], Routing(weights, 3)), found[:, :1], rtol=1e-5, atol=1e-6)


@over_kinds
def test_mixed_tasks_give_what_each_gives_alone(kind: str) -> None:
    mixture, batch = mixture_of(spec_of(kind)), text_batch()
    mixed = logits(mixture, task=TASKS)
    for row, task in enumerate(TASKS):
        alone = logits(mixture, {name: tensor[row : row + 1] for name, tensor in batch.items()}, task=task)
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@over_kinds
def test_every_parameter_is_trained_and_the_base_is_not(kind: str) -> None:
    base = tiny_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    mixture = mixture_of(spec_of(kind), base=base).train()
    mixture(**text_batch(), task=TASKS).loss.backward()
    trained = {name: p for name, p in mixture.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    mixture.merge("task", task="tell") if HOSTED[kind].mergeable else None
    mixture.detach()
    assert {name for name, _ in base.named_parameters()} == before.keys() & {n for n, _ in base.named_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@over_kinds
def test_a_tuner_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    mixture = mixture_of(spec_of(kind))
    mixture.save(tmp_path / "saved")
    torch.manual_seed(99)
    loaded = load(tmp_path / "saved", tiny_llama()).eval()
    assert loaded.spec == mixture.spec
    assert torch.equal(logits(loaded, task=TASKS), logits(mixture, task=TASKS))


@over_kinds
def test_a_merge_is_exact_or_refused(kind: str) -> None:
    mixture, batch = mixture_of(spec_of(kind)), text_batch()
    if not HOSTED[kind].mergeable:
        with pytest.raises(NotMergeable, match=f"peft's {kind} of adapter 'shared' is no affine map"):
            mixture.merge("task", task="tell")
        return
    plain, report = mixture.merge("task", task="tell")
    assert report.exact
    expected = logits(mixture, batch, task="tell")
    assert (logits(plain, batch) - expected).abs().max() < 2e-5 * expected.abs().max()


@over_kinds
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    mixture = mixture_of(spec_of(kind)).train()

    def gradients() -> list[Tensor]:
        mixture.zero_grad()
        torch.manual_seed(3)  # for kinds that draw numbers in training
        mixture(**text_batch(), task=TASKS, use_cache=False).loss.backward()
        return [p.grad.clone() for p in mixture.parameters() if p.grad is not None]

    expected = gradients()
    mixture.gradient_checkpointing_enable()
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@over_kinds
def test_a_base_in_sixteen_bits_gives_close_results(kind: str) -> None:
    fine = mixture_of(spec_of(kind), experts=False, scale=0.02)
    coarse = mixture_of(spec_of(kind), experts=False, scale=0.02, base=tiny_llama().to(torch.bfloat16))
    for (_, ours), (_, theirs) in zip(coarse.banks(), fine.banks(), strict=True):
        ours.load_state("shared", theirs.state("shared"))
    assert {p.dtype for _, p in coarse.named_adapter_parameters()} == {torch.float32}
    expected = logits(fine)
    assert (logits(coarse).float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", SHARING)
def test_what_layers_share_is_held_stored_and_counted_once(kind: str) -> None:
    mixture = mixture_of(spec_of(kind), experts=False)
    held = [id(p) for _, bank in mixture.banks() for p in bank.parameters()]
    assert len(held) == len(set(held))
    first, *others = [bank.state("shared") for _, bank in mixture.banks()]
    assert any(first.keys() - other.keys() for other in others)


def test_an_expert_that_no_input_uses_is_not_run_and_gets_a_gradient_of_zero() -> None:
    bank, linear = bank_of("LOHA", {"zero": 0, "one": 1})
    runs: list[int] = []
    for index, layer in enumerate(bank.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    x = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    for routing in (
        Routing.of_rows(torch.ones(ROWS, dtype=torch.long), 2),
        Routing.constant(torch.tensor([0.0, 0.5], dtype=torch.float64)),
    ):
        runs.clear()
        bank.zero_grad()
        bank(x, linear(x), routing).sum().backward()
        assert runs == [1]
        assert all(p.grad is not None and not p.grad.any() for p in bank.layers[0].parameters())
        assert all(p.grad is not None and p.grad.any() for p in bank.layers[1].parameters())
    runs.clear()
    bank(x, linear(x), Routing.constant(torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)))
    assert runs == [0, 1]  # a weight that is trained may leave zero


def test_a_step_moves_what_layers_share_once_and_unused_experts_never() -> None:
    mixture = mixture_of(spec_of("VBLORA")).train()
    module = MixtureModule("given", optimization=Optimization())
    module.model = mixture
    groups = parameter_groups(module.roles(), Optimization())
    check_groups(groups, mixture)
    before = {name: p.detach().clone() for name, p in mixture.named_parameters() if p.requires_grad}
    mixture(**text_batch(), task=["ask", "ask", "tell"]).loss.backward()
    rate = 0.01
    ExpertAdamW([{**group, "lr": rate, "weight_decay": 0.0} for group in groups], module.stacks()).step()
    unused, seen = EXPERTS.index("find") + 1, set()
    for name, parameter in mixture.named_parameters():
        if name in before:
            moved = float((parameter.detach() - before[name]).abs().max())
            expert = int(name.split("layers.")[-1].split(".")[0])
            assert (moved == 0) is (expert == unused), name
            assert moved < 1.01 * rate, name  # a first step of Adam is the rate, and a second would double it
            seen.add(expert)
    assert seen == {0, 1, 2, 3}


def test_a_grown_adapter_shares_over_its_sites_and_changes_nothing_yet() -> None:
    mixture = mixture_of(spec_of("VERA"))
    expected = logits(mixture, task=TASKS)
    banks = dict(mixture.banks())
    PeftTuner.grow(banks, Adapter("new", spec_of("VERA"), len(EXPERTS)))
    assert torch.equal(logits(mixture, task=TASKS), expected)
    first, *others = [bank.state("new") for bank in banks.values()]
    assert first.keys() - others[0].keys() == {"vera_A.default", "vera_B.default"}
    assert all(other.keys() == others[0].keys() for other in others)


def test_dropout_acts_in_training_only() -> None:
    mixture = mixture_of(PeftTuner(kind="LORA", options={"lora_dropout": 0.5}), experts=False)
    assert torch.equal(logits(mixture), logits(mixture))
    mixture.train()
    assert not torch.equal(logits(mixture), logits(mixture))


def test_options_by_module_name_mean_what_they_mean_in_peft() -> None:
    spec = PeftTuner(kind="LORA", options={"r": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 5}})
    mixture = mixture_of(spec, experts=False)
    ranks = {s.path: len(bank.state("shared")["lora_A.default.weight"]) for s, bank in mixture.banks()}
    assert {path for path, rank in ranks.items() if rank == 5} == {"model.layers.1.self_attn.q_proj"}
    assert set(ranks.values()) == {2, 5}


def test_kinds_mix_as_experts_of_one_router() -> None:
    base = tiny_llama()
    experts = {"ask": spec_of("VERA"), "tell": spec_of("OFT"), "find": spec_of("LORA")}
    mixture = attach(base, experts=experts, router=ByTask())
    move(mixture, 0.1)
    mixed = logits(mixture.eval(), task=TASKS)
    for row, task in enumerate(TASKS):
        torch.testing.assert_close(mixed[row], logits(mixture, task=task)[row], rtol=1e-4, atol=1e-4)


def test_a_spec_comes_back_from_json() -> None:
    spec = PeftTuner(kind="BOFT", options={"boft_block_size": 8}, placement=Placement(kinds=("mlp",)))
    assert from_json(to_json(spec, FAMILIES), FAMILIES) == spec


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("XLORA", {}, "peft's XLORA cannot be hosted: it routes by itself"),
        ("VERRA", {}, r"peft has no tuner 'VERRA'; did you mean 'VERA'\? Kinds that can be hosted: BEFT, BOFT"),
        ("VERA", {"rank": 4}, r"PeftTuner VERA takes no rank; it accepts d_initial, .*\br\b"),
        ("VERA", {"target_modules": ["q_proj"]}, "takes no target_modules; a placement says where an adapter sits"),
        ("LORA", {"bias": "all"}, "PeftTuner LORA takes no bias"),
        ("OFT", {"r": 8, "oft_block_size": 8}, "peft refuses these options of OFT"),
        ("LORA", {"init_lora_weights": "olora"}, "'olora', which changes the base's own weights.* choose from True"),
        ("LOHA", {"r": {1, 2}}, "saved as JSON"),
    ],
)
def test_what_cannot_be_hosted_is_refused_with_the_reason(kind: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PeftTuner(kind=kind, options=options)


def test_sizes_that_do_not_fit_are_refused_with_peft_own_reason() -> None:
    with pytest.raises(ValueError, match=r"peft cannot build C3A with .*'block_size': 7.* \(32, 48\).*: .*factor"):
        attach(tiny_llama(), shared=PeftTuner(kind="C3A", options={"block_size": 7}))


@over_kinds
def test_no_option_of_ours_is_accepted(kind: str) -> None:
    accepted = accepted_options(kind)
    assert accepted
    assert not {"target_modules", "task_type", "modules_to_save", "inference_mode", "bias"} & set(accepted)
