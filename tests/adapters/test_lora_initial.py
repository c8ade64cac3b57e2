"""Initial states of LoRA: identity, exactness, what the papers and the peft library say of each."""

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import moadapt
from moadapt import Placement, Routing, anatomy, initialise
from moadapt.adapters import Adapter, LoRA
from moadapt.adapters.initial import Layer
from moadapt.adapters.initial.corda import damped
from moadapt.adapters.lora_bank import LoRABank
from moadapt.input_means import Products, input_means
from moadapt.registry import INITIALS
from moadapt.sites import Site
from moadapt_routers import ByTask
from tests.conformance.canonical import ROUTING_NAMES, Given, routing_value
from tests.models import llava_batch, padded, randomize, tiny_llama, tiny_llava

NAMES = INITIALS.names()
SHIFTING = [name for name in NAMES if INITIALS.get(name).shifts]
READING = [name for name in NAMES if INITIALS.get(name).reads_inputs]
EVERYWHERE = Placement(towers=("vision", "connector", "language"))
WIDE, NARROW, ROWS, TOKENS = 12, 8, 3, 5
SITE = Site("linear", "language", "mlp", 0, WIDE, NARROW)


def mixture_of(init: str, router: Any = None, base: Any = None, **options: Any) -> Any:
    """A LLaVA with a shared adapter and two experts that start so."""
    experts = {"a": LoRA(rank=2, init=init, **options), "b": LoRA(rank=4, alpha=3, init=init, **options)}
    mixture = moadapt.attach(
        base or tiny_llava(), shared=LoRA(rank=2, init=init), experts=experts, router=router or ByTask(),
        placement=EVERYWHERE,
    )  # fmt: skip
    initialise(mixture, llava_batch())
    return mixture.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", NAMES)
def test_every_start_changes_nothing_bit_for_bit(init: str, dtype: torch.dtype) -> None:
    batch, base = llava_batch(), tiny_llava().to(dtype)
    with torch.no_grad():
        plain = base(**batch).logits
        mixture = mixture_of(init, base=base)
        assert torch.equal(mixture(**batch, task=["a", "b", "a"]).logits, plain)
        shifted = any(name.endswith("start_up") for name, _ in mixture.named_adapter_parameters())
    assert shifted is (init in SHIFTING)


def test_blended_parameters_start_at_identity_too() -> None:
    routing = Routing(torch.rand(3, 1, 2, 2).softmax(-1), 2, combines="parameters")
    base, batch = tiny_llava(), llava_batch()
    with torch.no_grad():
        plain = base(**batch).logits
        experts = {name: LoRA(rank=2, init="pissa") for name in "ab"}
        mixture = moadapt.attach(base, shared=LoRA(rank=2, init="olora"), experts=experts, router=Given(value=routing))
        assert torch.equal(mixture(**batch).logits, plain)
        randomize(mixture)
        assert not torch.allclose(mixture(**batch).logits, plain)


@pytest.mark.parametrize("name", [name for name in ROUTING_NAMES if name != "blended"])
def test_a_frozen_term_is_weighed_like_its_adapter(name: str) -> None:
    specs = {
        "shared": LoRA(rank=2, init="pissa"),
        "zero": LoRA(rank=3, alpha=2, init="olora"),
        "two": LoRA(rank=1, init="pissa"),
    }
    present = {"shared": None, "zero": 0, "two": 2}
    adapters = [Adapter(n, spec, present[n]) for n, spec in specs.items()]
    bank = LoRABank(SITE, adapters, nn.Linear(WIDE, NARROW)).double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    routing = routing_value(name, rows=ROWS, tokens=TOKENS, dtype=torch.float64)
    x = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64)
    leaves = {n: {part: t.requires_grad_() for part, t in bank.state(n).items()} for n in bank.names}
    expected = torch.zeros(ROWS, TOKENS, NARROW, dtype=torch.float64)
    for adapter, parts in leaves.items():
        change = parts["up"].T @ parts["down"] - parts["start_up"].T @ parts["start_down"]
        added, expert = specs[adapter].scale * x @ change.T, present[adapter]
        if expert is not None:
            weight = routing.dense()[..., expert]
            added = added * weight.repeat_interleave(NARROW // weight.shape[2], dim=2)
        expected = expected + added
    found, into = bank(x, torch.zeros_like(expected), routing), torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (found * into).sum().backward()
    (expected * into).sum().backward()
    for side in ("down", "up"):
        wanted = torch.cat([leaves[n][side].grad for n in ("zero", "two")])
        torch.testing.assert_close(bank.get_parameter(f"expert_{side}").grad, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(bank.get_parameter(f"shared_{side}").grad, leaves["shared"][side].grad)
        assert not bank.get_parameter(f"expert_start_{side}").requires_grad
    assert set(bank.expert_rows()) == {"expert_down", "expert_up"}
    weights = routing.dense()[0, 0, 0]
    torch.testing.assert_close(x @ bank.delta(weights).weight().T, bank(x, found * 0, Routing.constant(weights)))


@pytest.mark.parametrize("init", [*SHIFTING, "eva"])
def test_trained_starts_merge_and_export_exactly(init: str, tmp_path: Path) -> None:
    mixture, batch = mixture_of(init), llava_batch()
    generator = torch.Generator().manual_seed(3)
    for _, parameter in mixture.named_adapter_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 20
    mixture.save(tmp_path / "mixture")
    mixture.export_peft(tmp_path / "lora", task="b")
    loaded = moadapt.load(tmp_path / "mixture", tiny_llava())
    assert not any(bank.waiting for _, bank in loaded.banks())
    exported = peft.PeftModel.from_pretrained(tiny_llava(), str(tmp_path / "lora"))
    with torch.no_grad():
        routed = mixture(**batch, task="b").logits
        assert torch.equal(loaded(**batch, task="b").logits, routed)
        plain, _ = mixture.merge("task", task="b")
        for other in (plain, exported):
            torch.testing.assert_close(other(**batch).logits, routed, rtol=1e-4, atol=1e-4)
    ranks = {p.shape[0] for n, p in exported.named_parameters() if "lora_A" in n}
    assert ranks == {12} if init in SHIFTING else {6}
    assert all(torch.equal(p, q) for p, q in zip(mixture.detach().parameters(), tiny_llava().parameters(), strict=True))


def layer_of(weight: Tensor, rank: int = 2, scale: float = 1.5, inputs: Tensor | None = None) -> Layer:
    return Layer(weight.shape[1], weight.shape[0], rank, scale, weight.device, lambda: weight, inputs)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_are_those_of_peft(init: str) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    other: Any = peft.get_peft_model(tiny_llama(), config)
    spec = LoRA(rank=2, alpha=3, init=init, placement=Placement(modules=("q_proj", "down_proj")))
    mixture = moadapt.attach(tiny_llama(), shared=spec)
    for site, bank in mixture.banks():
        theirs = other.get_submodule(f"base_model.model.{site.path}")
        down, up = (getattr(theirs, f"lora_{side}")["default"].weight for side in "AB")
        state = bank.state("shared")
        torch.testing.assert_close(state["up"].T @ state["down"], up @ down, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state["down"].abs(), down.abs(), rtol=1e-4, atol=1e-5)  # a sign may differ
        residual = bank.frozen_map()[0] - 1.5 * state["start_up"].T @ state["start_down"]
        torch.testing.assert_close(residual, theirs.base_layer.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_corda_starts_are_those_of_peft(method: str) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base, ids = tiny_llama(), torch.randint(5, 60, (1, 40), generator=torch.Generator().manual_seed(1))
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )  # fmt: skip
    preprocess_corda(base, config, run_model=lambda: base(ids))
    other: Any = peft.get_peft_model(base, config)
    init = {"kpm": "corda_preserve", "ipm": "corda_preview"}[method]
    spec = LoRA(rank=2, alpha=3, init=init, placement=Placement(modules=("q_proj", "down_proj")))
    mixture = moadapt.attach(tiny_llama(), shared=spec)
    initialise(mixture, {"input_ids": ids})
    for site, bank in mixture.banks():
        theirs = other.get_submodule(f"base_model.model.{site.path}")
        down, up = (getattr(theirs, f"lora_{side}")["default"].weight for side in "AB")
        state = bank.state("shared")
        torch.testing.assert_close(state["up"].T @ state["down"], up @ down, rtol=1e-3, atol=1e-5)


def test_orthogonal_starts_are_those_of_peft() -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0], init_lora_weights="orthogonal")
    other: Any = peft.get_peft_model(tiny_llama(), config)
    theirs = other.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    down, up = INITIALS.get("orthogonal")().factors(layer_of(torch.zeros(32, 32), rank=4))
    for mine, side in ((down, theirs.lora_A), (up.T, theirs.lora_B)):
        peft_s = side["default"].weight.detach()
        assert mine.shape == peft_s.shape
        assert torch.linalg.matrix_rank(mine) == torch.linalg.matrix_rank(peft_s) == 2
        assert 0.5 < float(mine.std() / peft_s.std()) < 2
    assert (up.T @ down).abs().max() < 1e-6
    assert (theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight).abs().max() < 1e-6


def test_gaussian_starts_have_the_deviation_of_peft() -> None:
    down, up = INITIALS.get("gaussian")().factors(layer_of(torch.zeros(5, 4000), rank=8))
    assert float(down.std()) == pytest.approx(1 / 8, rel=0.02)
    assert not up.any()


def random_inputs(width: int, count: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_what_corda_keeps_is_nearest_in_the_norm_of_the_inputs(rank: int) -> None:
    weight, x = torch.randn(NARROW, WIDE, dtype=torch.float64), random_inputs(WIDE)
    inputs = x.T @ x / len(x)
    matrix, inverse = damped(inputs)
    torch.testing.assert_close(matrix @ inverse, torch.eye(WIDE, dtype=torch.float64), rtol=0, atol=1e-6)
    values = torch.linalg.svdvals(weight @ matrix)
    down, up = INITIALS.get("corda_preview")().factors(layer_of(weight, rank, 1.5, inputs))
    dropped = torch.linalg.matrix_norm((weight - 1.5 * up.T @ down) @ matrix)
    torch.testing.assert_close(dropped, values[rank:].square().sum().sqrt(), rtol=1e-8, atol=1e-8)
    down, up = INITIALS.get("corda_preserve")().factors(layer_of(weight, rank, 1.5, inputs))
    kept = torch.linalg.matrix_norm((1.5 * up.T @ down) @ matrix)
    torch.testing.assert_close(kept, values[len(values) - rank :].square().sum().sqrt(), rtol=1e-8, atol=1e-8)


def test_corda_of_white_inputs_is_the_plain_decomposition() -> None:
    weight, white = torch.randn(NARROW, WIDE, dtype=torch.float64), 3 * torch.eye(WIDE, dtype=torch.float64)
    (down, up), (other_down, other_up) = (
        INITIALS.get(name)().factors(layer_of(weight, 3, 1.0, white)) for name in ("corda_preview", "pissa")
    )
    torch.testing.assert_close(up.T @ down, other_up.T @ other_down, rtol=1e-10, atol=1e-10)


def test_inputs_without_size_are_refused() -> None:
    with pytest.raises(ValueError, match="mean square is 0"):
        damped(torch.zeros(4, 4))


def test_eva_takes_the_inputs_first_right_singular_vectors() -> None:
    x = random_inputs(WIDE)
    down, up = INITIALS.get("eva")().factors(layer_of(torch.zeros(NARROW, WIDE), 3, 1.0, x.T @ x / len(x)))
    expected = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    torch.testing.assert_close(down.abs(), expected.abs(), rtol=1e-8, atol=1e-8)
    assert not up.any()


def test_sums_stream_over_batches_and_leave_padding_out() -> None:
    mixture = mixture_of("default")
    sites = [site for site in mixture.sites if site.path.endswith("q_proj")]
    whole = llava_batch(4)
    halves = [{name: t[rows] for name, t in whole.items()} for rows in (slice(0, 2), slice(2, 4))]
    fresh = [padded(half, 3, side) for half, side in zip(halves, ("left", "right"), strict=True)]
    with mixture.bare_base() as base:
        once = input_means(base, sites, [whole])
        streamed, apart = input_means(base, sites, halves), input_means(base, sites, [halves[1]])
        unpadded = input_means(base, sites, [fresh[1]])
    for site in sites:
        torch.testing.assert_close(streamed[site], once[site], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unpadded[site], apart[site], rtol=1e-4, atol=1e-5)


def test_sites_that_read_one_tensor_share_their_mean() -> None:
    mixture, batch = mixture_of("default"), llava_batch()
    taken: dict[str, Tensor] = {}
    with mixture.bare_base() as base:
        means = {site.path: mean for site, mean in input_means(base, mixture.sites, [batch]).items()}
        for path in means:
            base.get_submodule(path).register_forward_pre_hook(lambda m, args, path=path: taken.update({path: args[0]}))
        base(**batch)
    for path, mean in means.items():
        x = taken[path].flatten(0, -2) if "language" not in path else taken[path][batch["attention_mask"].bool()]
        torch.testing.assert_close(mean, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        for other, theirs in means.items():
            assert (mean is theirs) is (taken[path] is taken[other])
    first = "model.language_model.layers.0"
    assert means[f"{first}.self_attn.q_proj"] is means[f"{first}.self_attn.v_proj"]
    assert means[f"{first}.mlp.up_proj"] is not means[f"{first}.mlp.down_proj"]


def test_sites_that_share_inputs_only_sometimes_are_still_exact() -> None:
    one, two, both = (torch.randn(n, 4) for n in (3, 5, 7))
    a, b = (Site(name, "vision", "mlp", 0, 4, 4) for name in "ab")
    found = Products()
    found.batch = {}
    for x, readers in ((both, (a, b)), (one, (a,)), (two, (b,))):
        for site in readers:
            found.add(site, x)
    found.flush()
    means = found.means([a, b])
    for site, own in ((a, one), (b, two)):
        x = torch.cat([both, own])
        torch.testing.assert_close(means[site], x.T @ x / len(x))


@pytest.mark.parametrize("given", ["labels", "ids"])
@pytest.mark.parametrize("length", [5, 7], ids=["equal", "longer"])
def test_encoder_and_decoder_have_padding_of_their_own(given: str, length: int) -> None:
    """Keys and values of cross-attention read what the encoder gave, and so its padding."""
    base = BartForConditionalGeneration(
        BartConfig(
            vocab_size=67, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, pad_token_id=1,
        )
    ).eval()  # fmt: skip
    ids, mask = torch.randint(5, 60, (2, 5)), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    labels, decoder_mask = torch.randint(5, 60, (2, length)), torch.ones(2, length, dtype=torch.long)
    decoder_mask[0, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if given == "labels":
        batch["labels"] = labels.masked_fill(decoder_mask == 0, -100)
    else:
        batch |= {"decoder_input_ids": labels, "decoder_attention_mask": decoder_mask}
    masks = {"encoder.layers.1.self_attn.q_proj": mask, "decoder.layers.1.self_attn.q_proj": decoder_mask}
    masks |= {"decoder.layers.1.encoder_attn.q_proj": decoder_mask, "decoder.layers.1.encoder_attn.k_proj": mask}
    masks |= {"decoder.layers.1.encoder_attn.v_proj": mask, "decoder.layers.1.fc1": decoder_mask}
    read: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple[Tensor], path: str) -> None:
        read[path] = args[0]

    for path in masks:
        base.get_submodule(f"model.{path}").register_forward_pre_hook(partial(note, path=path))
    sites = {path: next(s for s in anatomy(base).sites if s.path == f"model.{path}") for path in masks}
    means = input_means(base, sites.values(), [batch])
    for path, real in masks.items():
        x = read[path][real.bool()]
        torch.testing.assert_close(means[sites[path]], x.T @ x / len(x), msg=path)


def test_what_waits_for_data_is_not_saved(tmp_path: Path) -> None:
    mixture = moadapt.attach(tiny_llama(), shared=LoRA(rank=2, init="eva"))
    with pytest.raises(ValueError, match=r"shared starts from data and has not seen any.*initialise"):
        mixture.save(tmp_path / "saved")
    initialise(mixture, {"input_ids": torch.randint(5, 60, (2, 6))})
    mixture.save(tmp_path / "saved")


@pytest.mark.parametrize(("init", "method"), [("pissa", "svd"), ("olora", "qr"), ("corda_preview", "svd")])
def test_a_site_is_decomposed_once_and_not_at_all_by_loading(
    init: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, own = 0, getattr(torch.linalg, method)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, method, counted)
    mixture = mixture_of(init)
    assert count == len(mixture.sites)
    saved = {name: p.clone() for name, p in mixture.named_adapter_parameters()}
    mixture.save(tmp_path / "saved")
    count = 0
    loaded = moadapt.load(tmp_path / "saved", tiny_llava())
    assert count == 0
    assert all(torch.equal(saved[name], p) for name, p in loaded.named_adapter_parameters())


def test_an_adapter_of_a_trimmed_name_waits_again() -> None:
    mixture = moadapt.attach(
        tiny_llama(), experts={name: LoRA(rank=2, init="eva") for name in "ab"}, router=ByTask()
    )  # fmt: skip
    initialise(mixture, {"input_ids": torch.randint(5, 60, (2, 6))})
    _, bank = next(mixture.banks())
    bank.trim(["a"])
    assert not bank.waiting
    bank.grow(Adapter("b", LoRA(rank=2, init="eva"), 1))
    assert bank.waiting == {"b"}


@pytest.mark.parametrize("init", READING)
def test_a_start_that_reads_data_refuses_to_train_without(init: str) -> None:
    mixture = moadapt.attach(tiny_llava(), shared=LoRA(rank=2, init=init))
    batch = llava_batch()
    mixture.eval()
    mixture(**batch)
    mixture.train()
    with pytest.raises(ValueError, match=r"shared starts from data; call moadapt\.initialise"):
        mixture(**batch)
    initialise(mixture, [batch, batch])
    mixture(**batch).loss.backward()
    before = [p.clone() for _, p in mixture.named_adapter_parameters()]
    initialise(mixture, llava_batch(seed=9))
    after = [p for _, p in mixture.named_adapter_parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_sites_that_no_batch_reached_are_named() -> None:
    mixture = moadapt.attach(tiny_llava(), shared=LoRA(rank=2, init="eva"), placement=EVERYWHERE)
    text = {"input_ids": llava_batch()["input_ids"][:, 4:]}
    with pytest.raises(ValueError, match=r"no calibration batch reached model\.vision_tower"):
        initialise(mixture, text)


@pytest.mark.parametrize("init", NAMES)
def test_a_base_of_shapes_alone_can_be_counted(init: str) -> None:
    base = tiny_llama().to("meta")
    mixture = moadapt.attach(base, shared=LoRA(rank=2, init=init, placement=Placement(modules=("q_proj",))))
    parameters = [p for _, p in mixture.named_adapter_parameters()]
    assert all(p.is_meta for p in parameters)
    assert sum(p.numel() for p in parameters if p.requires_grad) == 3 * 2 * (32 + 32)


def test_only_the_factors_train() -> None:
    spec = LoRA(rank=3, init="pissa", placement=Placement(modules=("q_proj",)))
    mixture = moadapt.attach(tiny_llama(), shared=spec)
    trained = sum(p.numel() for _, p in mixture.named_adapter_parameters() if p.requires_grad)
    assert trained == 3 * 3 * (32 + 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "pisa"}, "did you mean pissa"),
        ({"init": "orthogonal", "rank": 3}, "make it even"),
        ({"init": "pissa", "rank": 33}, "rank 33 is above 32"),
        ({"init": "pissa", "placement": Placement(kinds=("embedding",))}, "where LoRA has no init='pissa'"),
    ],
    ids=["name", "odd", "high", "form"],
)
def test_starts_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moadapt.attach(tiny_llama(), shared=LoRA(**options))
