"""LoRA at the fused experts of mixture-of-experts blocks: against a loop, against peft, merged, stored and exported."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moadapt
from moadapt import Placement, RouterSpec, Routing
from moadapt.adapters import Adapter, LoRA
from moadapt.adapters.lora_experts import LoRAExperts
from moadapt.call import Call
from moadapt.sites import Site
from moadapt_routers import ByTask, Softmax, TopK
from tests.conformance.canonical import ROUTING_NAMES, Given, routing_value
from tests.models import randomize

EXPERTS = Placement(kinds=("experts",))
PRESENT = {"shared": None, "zero": 0, "two": 2}
SPECS = {"shared": LoRA(rank=2, alpha=3), "zero": LoRA(rank=3), "two": LoRA(rank=1, rank_stabilized=True, alpha=2)}
ROWS, TOKENS = 3, 5
_TEXT: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 12},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "layer_types": ["full_attention"] * 2},
}
"""Experts stored one way, and with biases and interleaved gates the other way round."""


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_TEXT, **MODELS[kind]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # kernels know no doubles
    return model.to(dtype).eval()


def batch(rows: int = ROWS) -> dict[str, Tensor]:
    ids = torch.randint(1, 67, (rows, TOKENS), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def block(kind: str) -> tuple[Site, Any]:
    base = tiny(kind, torch.float64)
    site = next(site for site in moadapt.anatomy(base).sites if site.form == "experts")
    return site, base.get_submodule(site.path)


def bank_at(site: Site, module: Any) -> LoRAExperts:
    bank = LoRA.bank(site, [Adapter(name, spec, PRESENT[name]) for name, spec in SPECS.items()], module).double()
    assert isinstance(bank, LoRAExperts)
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.5)
    return bank


def one_token(module: Any, leaves: Any, weights: Tensor, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Run the experts that one token takes, with changed weights, one adapter after the other."""
    total = torch.zeros_like(x)
    for expert, share in zip(chosen.tolist(), shares, strict=True):
        changed = {}
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(module, name)[expert]
            weight = weight.T if module.is_transposed else weight
            for adapter, number in PRESENT.items():
                factor = SPECS[adapter].scale * (1 if number is None else weights[number])
                down, up = (leaves[adapter][f"{name}_{side}"][:, expert] for side in ("down", "up"))
                weight = weight + factor * up.T @ down
            changed[name] = weight
        biases = [getattr(module, f"{name}_bias")[expert] if module.has_bias else None for name in changed]
        hidden = module._apply_gate(functional.linear(x, changed["gate_up_proj"], biases[0]))
        total = total + share * functional.linear(hidden, changed["down_proj"], biases[1])
    return total


@pytest.mark.parametrize("name", [name for name in ROUTING_NAMES if name not in ("heads", "blended")])
@pytest.mark.parametrize("kind", MODELS)
def test_every_token_runs_with_its_own_weights(kind: str, name: str) -> None:
    site, module = block(kind)
    bank = bank_at(site, module)
    routing = routing_value(name, rows=ROWS, tokens=TOKENS, dtype=torch.float64)
    x = torch.randn(ROWS * TOKENS, site.in_features, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(len(x))])
    shares = torch.rand(len(x), 2, dtype=torch.float64)
    leaves = {n: {part: t.requires_grad_() for part, t in bank.state(n).items()} for n in bank.names}
    dense = routing.dense()[:, :, 0].expand(ROWS, TOKENS, -1).flatten(0, 1)
    slow = [one_token(module, leaves, *each) for each in zip(dense, x, chosen, shares, strict=True)]
    expected, into = torch.stack(slow), torch.randn(len(x), site.in_features, dtype=torch.float64)
    found = bank.adapt(module, x, routing, Call(ROWS), chosen, shares)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(found, [x, *bank.parameters()], into)
    leafs = {(n, part): t for n, parts in leaves.items() for part, t in parts.items()}
    theirs = dict(zip(["x", *leafs], torch.autograd.grad(expected, [x, *leafs.values()], into), strict=True))
    torch.testing.assert_close(ours[0], theirs["x"], rtol=1e-10, atol=1e-10)
    for (path, _), gradient in zip(bank.named_parameters(), ours[1:], strict=True):
        part, _, tensor = path.partition("_")
        owners = ["shared"] if part == "shared" else ["zero", "two"]
        wanted = torch.cat([theirs[owner, tensor] for owner in owners])
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", MODELS)
def test_fresh_adapters_change_nothing_but_rounding(kind: str) -> None:
    base = tiny(kind)
    with torch.no_grad():
        plain = base(**batch()).logits
        routed = attached(kind, ByTask(), fresh=True, base=base)(**batch(), task="a").logits
    torch.testing.assert_close(routed, plain, rtol=1e-6, atol=1e-6 * float(plain.abs().max()))


@pytest.mark.parametrize("kind", MODELS)
def test_a_merge_folds_every_projection_exactly(kind: str, tmp_path: Path) -> None:
    mixture = attached(kind, ByTask())
    mixture.save(tmp_path / "mixture")
    loaded = moadapt.load(tmp_path / "mixture", tiny(kind)).eval()
    with torch.no_grad():
        routed = mixture(**batch(), task="b").logits
        assert torch.equal(loaded(**batch(), task="b").logits, routed)
        plain, report = mixture.merge("task", task="b")
        assert report.exact
        torch.testing.assert_close(plain(**batch()).logits, routed, rtol=1e-4, atol=1e-4)
        with mixture.disabled():
            assert torch.equal(mixture(**batch(), task="b").logits, tiny(kind)(**batch()).logits)
    assert type(mixture.detach().get_submodule("model.layers.0.mlp")) is type(plain.get_submodule("model.layers.0.mlp"))


@pytest.mark.parametrize("kind", MODELS)
# peft applies rank patterns to parameters, but warns that they match no module
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_peft_loads_the_exported_projections(kind: str, tmp_path: Path) -> None:
    mixture = attached(kind, ByTask(), ranks={"model.layers.0.mlp.experts": 3})
    mixture.export_peft(tmp_path / "lora", task="b")
    exported = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path / "lora"))
    with torch.no_grad():
        routed = mixture(**batch(), task="b").logits
        torch.testing.assert_close(exported(**batch()).logits, routed, rtol=1e-4, atol=1e-4)


def test_a_mean_routing_is_merged_with_its_error() -> None:
    mixture = attached("qwen3_moe", Softmax())
    with torch.no_grad():
        _, report = mixture.merge("mean_routing", calibration=[without_labels(), without_labels()])
    errors = {path: error for path, error in report.sites.items() if path.endswith("experts")}
    assert len(errors) == 2
    assert all(0 < error < 1 for error in errors.values())


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_outputs_are_those_of_peft(kind: str, rank_stabilized: bool) -> None:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[], target_parameters=names, use_rslora=rank_stabilized,
        init_lora_weights=False,
    )  # fmt: skip
    other = peft.get_peft_model(tiny(kind, torch.float64), config).double().eval()
    spec = LoRA(rank=3, alpha=5, rank_stabilized=rank_stabilized, placement=EXPERTS)
    mixture = moadapt.attach(tiny(kind, torch.float64), shared=spec).double().eval()
    theirs = {name: p for name, p in other.named_parameters() if "lora_" in name}
    for site, bank in mixture.banks():
        found = {}
        for name in ("gate_up_proj", "down_proj"):
            around = f"base_model.model.{site.path}.{'base_layer.' if name == 'gate_up_proj' else ''}lora_"
            down, up = (theirs[f"{around}{side}.default.weight"].detach() for side in "AB")
            found[f"{name}_down"] = down.view(-1, 3, down.shape[1]).transpose(0, 1)
            found[f"{name}_up"] = up.view(up.shape[0], 3, -1).permute(1, 2, 0)
        bank.load_state("shared", found)
    with torch.no_grad():
        torch.testing.assert_close(mixture(**batch()).logits, other(**batch()).logits, rtol=1e-6, atol=1e-6)
        with mixture.disabled():
            assert not torch.allclose(mixture(**batch()).logits, other(**batch()).logits)


@pytest.mark.parametrize("per", ["model", "tower", "layer"])
@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_routers_over_blocks_reach_rows_and_tokens(per: Any, scope: Any) -> None:
    mixture = attached("qwen3_moe", TopK(k=1, per=per, scope=scope))
    with torch.no_grad():
        together = mixture(**without_labels()).logits
        for row in range(ROWS):
            alone = mixture(**{name: t[row : row + 1] for name, t in without_labels().items()}).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_routing_of_other_rows_is_refused() -> None:
    mixture = attached("qwen3_moe", Given(value=Routing(torch.rand(2, 1, 1, 2), 2)))
    with pytest.raises(ValueError, match="the routing at model has 2 rows"):
        mixture(**batch())


@pytest.mark.parametrize("router", [Softmax(per="site"), TopK(per="site", scope="token")], ids=["softmax", "top_k"])
def test_routers_that_would_read_the_flat_tokens_are_refused(router: RouterSpec) -> None:
    with pytest.raises(ValueError, match=r'mlp\.experts takes the tokens of all rows in one axis.*with per="site"'):
        attached("qwen3_moe", router)


def test_generation_with_a_cache_equals_generation_without() -> None:
    mixture, ids = attached("mixtral", TopK(k=1)), batch()["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    found = [mixture.generate(input_ids=ids, use_cache=use_cache, **options) for use_cache in (True, False)]
    assert torch.equal(*found)


def test_other_modules_of_stacked_parameters_are_refused() -> None:
    class Foreign(nn.Module):
        gate_up_proj = down_proj = None

    site, _ = block("mixtral")
    with pytest.raises(ValueError, match="is a Foreign, whose projections no experts interface"):
        LoRA.bank(site, [Adapter("shared", LoRA(), None)], Foreign())


def test_counts_are_those_of_the_closed_form() -> None:
    mixture = moadapt.attach(tiny("qwen3_moe"), shared=LoRA(rank=3, placement=EXPERTS))
    per_expert = 3 * (16 + 2 * 12) + 3 * (12 + 16)
    assert sum(p.numel() for _, p in mixture.named_adapter_parameters()) == 2 * 5 * per_expert


def without_labels() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch().items() if name != "labels"}


def attached(
    kind: str, router: RouterSpec, *, fresh: bool = False, base: Any = None, ranks: dict[str, int] | None = None
) -> Any:
    """Two experts and a shared adapter at attention and experts."""
    mixture = moadapt.attach(
        base or tiny(kind),
        shared=LoRA(rank=2, placement=Placement(kinds=("experts", "attention"))),
        experts={"a": LoRA(rank=2), "b": LoRA(rank=2, alpha=3, ranks=ranks)},
        router=router,
        placement=EXPERTS,
    )
    if not fresh:
        randomize(mixture, 0.2)
    return mixture.eval()
