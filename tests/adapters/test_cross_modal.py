"""Cross-modal banks against the formula, token by token, and what they refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moadapt import Placement, Routing, attach, load
from moadapt.adapters import CrossModal
from moadapt.adapters.bank import Adapter
from moadapt.adapters.cross_modal import DIRECTIONS, CrossModalBank
from moadapt.call import Call
from moadapt.sites import Site
from moadapt_routers import ByTask
from tests.conformance.canonical import TASKS, Given, routing_value
from tests.core.zoo import build
from tests.models import llava_batch, randomize, tiny_llama, tiny_llava

ROWS, TOKENS, WIDTH = 5, 7, 8
SITE = Site("blocks.0.mlp", "language", "mlp", 0, WIDTH, WIDTH, "sublayer")
SPECS = {
    "shared": CrossModal(rank=3),
    "a": CrossModal(rank=2, directions=("image_to_text",)),
    "b": CrossModal(rank=4, pooled=True),
    "c": CrossModal(rank=3, directions=("text_to_image",)),
}
TOKEN_KINDS = [  # q is text of the prompt, i an image token of it, a no prompt, . padding
    "iiqqqaa",  # images first
    "qqiiqia",  # text first, more images
    "..qiqaa",  # padding on the left
    "qqqaa..",  # no image, padding on the right
    "iiiaaaa",  # no text in the prompt
]
IMAGE, PROMPT = (torch.tensor([[kind in kinds for kind in row] for row in TOKEN_KINDS]) for kinds in ("i", "qi"))


def build_bank(specs: dict[str, CrossModal] = SPECS, *, fresh: bool = False) -> CrossModalBank:
    """A float64 bank, by default of random weights; the experts are those that are not called `shared`."""
    experts = [name for name in specs if name != "shared"]
    adapters = [Adapter(n, spec, None if n == "shared" else experts.index(n)) for n, spec in specs.items()]
    bank = CrossModalBank(SITE, adapters, nn.Linear(WIDTH, WIDTH)).double()
    for parameter in () if fresh else bank.parameters():
        nn.init.normal_(parameter)
    return bank


def call_of(*rows: int) -> Call:
    chosen = list(rows or range(ROWS))
    return Call(len(chosen), prompt=PROMPT[chosen], image=IMAGE[chosen])


def one_read(token: Tensor, others: Tensor, state: dict[str, Tensor], direction: str) -> Tensor:
    """What one adapter adds to one token that reads others, (D,), by the formula of the family."""
    query, key, value, up, gate = (state[f"{direction}_{name}"] for name in ("query", "key", "value", "up", "gate"))
    scores = torch.stack([(query @ token) @ (key @ other) / math.sqrt(max(len(query), 1)) for other in others])
    read = sum(share * (value @ other) for share, other in zip(scores.softmax(0), others, strict=True))
    return gate[0].tanh() * up.T @ read


def by_hand(bank: CrossModalBank, x: Tensor, routing: Routing) -> Tensor:
    """The delta, row by row, token by token, adapter by adapter."""
    weights = routing.dense().expand(ROWS, TOKENS, -1, -1)
    rows = []
    for row, kinds in enumerate(TOKEN_KINDS):
        images = [x[row, t] for t, kind in enumerate(kinds) if kind == "i"]
        question = [x[row, t] for t, kind in enumerate(kinds) if kind == "q"]
        added = []
        for t, kind in enumerate(kinds):
            direction, others = ("text_to_image", question) if kind == "i" else ("image_to_text", images)
            total = 0 * x[row, t]
            for adapter in bank._in_order():
                if direction in adapter.spec.directions and others:
                    state = {n: bank._slice(bank._part_of(adapter.name), adapter.name, n) for n in bank.tensors}
                    weight = torch.ones(1) if adapter.expert is None else weights[row, t, :, adapter.expert]
                    spread = weight.repeat_interleave(WIDTH // len(weight))
                    total = total + spread * one_read(x[row, t], torch.stack(others), state, direction)
            added.append(total)
        rows.append(torch.stack(added))
    return torch.stack(rows)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["constant", "task", "sequence_sparse", "token_dense", "token_sparse", "heads"])
def test_a_bank_is_the_formula_forward_and_backward(name: str) -> None:
    torch.manual_seed(0)
    bank, x = build_bank(), torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    bank.freeze("c")
    routing = routing_value(name, rows=ROWS, tokens=TOKENS, dtype=torch.float64)
    routing.weights.requires_grad_()
    found, expected = bank(x, torch.zeros_like(x), routing, call_of()), by_hand(bank, x, routing)
    assert_close(found, expected)
    assert found.abs().amax(dim=-1).gt(0).tolist() == [
        [(kind == "i" and "q" in kinds) or (kind != "i" and "i" in kinds) for kind in kinds] for kinds in TOKEN_KINDS
    ]
    read, into = (x, routing.weights, *(p for p in bank.parameters() if p.requires_grad)), torch.randn_like(x)
    ours, theirs = (
        torch.autograd.grad(delta, read, into, allow_unused=True, materialize_grads=True) for delta in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def test_a_row_is_the_same_among_others_and_alone() -> None:
    bank, x = build_bank(), torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    routing = routing_value("constant", rows=1, tokens=1, dtype=torch.float64)
    together = bank(x, x, routing, call_of())
    for row in range(ROWS):
        assert_close(bank(x[[row]], x[[row]], routing, call_of(row)), together[[row]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fresh_adapters_add_exactly_nothing_and_only_gates_get_gradient(dtype: torch.dtype) -> None:
    bank = build_bank(fresh=True).float()
    x = torch.randn(ROWS, TOKENS, WIDTH, dtype=dtype)
    found = bank(x, x, routing_value("constant", rows=1, tokens=1), call_of())
    assert found.dtype == dtype
    assert not found.any()
    found.sum().backward()
    for name, parameter in bank.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert bool(parameter.grad.any()) is name.endswith("_gate"), name


def test_nothing_is_added_without_images_but_every_parameter_stays_in_the_graph() -> None:
    bank, x = build_bank(), torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    call = Call(ROWS, prompt=PROMPT, image=torch.zeros_like(IMAGE))
    found = bank(x, x, routing_value("constant", rows=1, tokens=1, dtype=torch.float64), call)
    assert not found.any()
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in bank.parameters())


def test_a_bank_has_the_parameters_it_says() -> None:
    counts = {name: sum(t.numel() for t in build_bank().state(name).values()) for name in SPECS}
    assert counts == {
        "shared": 2 * (4 * 3 * WIDTH + 1),
        "a": 4 * 2 * WIDTH + 1,
        "b": 2 * (2 * 4 * WIDTH + 1),
        "c": 4 * 3 * WIDTH + 1,
    }


def test_readings_are_the_gates_by_adapter_and_direction() -> None:
    bank = build_bank()
    expected = {
        f"gate/{name}/{direction}": float(bank.state(name)[f"{direction}_gate"].tanh().abs())
        for name, spec in SPECS.items()
        for direction in DIRECTIONS
        if direction in spec.directions
    }
    assert bank.readings() == pytest.approx(expected, rel=1e-12)
    assert len(expected) == 6
    assert set(build_bank(fresh=True).readings().values()) == {0.0}


def test_a_cache_gives_back_what_text_reads_of_the_images() -> None:
    """New tokens get what they would get if all were computed again, and other rows are refused."""
    bank, x = build_bank(), torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    routing = routing_value("sequence_dense", rows=ROWS, tokens=1, dtype=torch.float64)
    whole, first = call_of(), call_of()
    expected = bank(x, x, routing, whole)
    assert set(first.memories) == set()
    bank(x, x, routing, first)
    later = Call(ROWS, image=torch.ones(ROWS, 2, dtype=torch.bool), memories=first.memories, continues=True)
    new = torch.randn(ROWS, 2, WIDTH, dtype=torch.float64)
    grown = Call(
        ROWS,
        prompt=torch.cat([PROMPT, torch.zeros(ROWS, 2, dtype=torch.bool)], dim=1),
        image=torch.cat([IMAGE, torch.ones(ROWS, 2, dtype=torch.bool)], dim=1),  # tokens that look so, but are written
    )
    again = bank(torch.cat([x, new], dim=1), torch.cat([x, new], dim=1), routing, grown)
    assert_close(bank(new, new, routing, later), again[:, TOKENS:])
    assert_close(again[:, :TOKENS], expected)
    constant = routing_value("constant", rows=1, tokens=1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp: the cache holds the images of 5 rows, got 2 rows"):
        bank(new[:2], new[:2], constant, Call(2, memories=first.memories, continues=True))


def test_tokens_of_another_axis_are_refused() -> None:
    x = torch.randn(ROWS, TOKENS + 1, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp gets input of shape \(5, 8, 8\), but .* tokens \(5, 7\)"):
        build_bank()(x, x, routing_value("constant", rows=1, tokens=1, dtype=torch.float64), call_of())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0; need 1 or more"),
        ({"directions": ()}, r"directions=\(\); give one or both of"),
        ({"directions": ("text_to_text",)}, "give one or both of"),
        ({"directions": ("image_to_text", "image_to_text")}, "give one or both of"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossModal(**options)


def test_blended_parameters_are_refused() -> None:
    blended = Given(value=routing_value("blended", rows=3, tokens=1))
    mixture = attach(tiny_llava(), experts={name: CrossModal() for name in TASKS}, router=blended)
    with pytest.raises(ValueError, match="CrossModal cannot be weighed by parameters"):
        mixture(**llava_batch())


@pytest.mark.parametrize(
    ("base", "lacks"),
    [
        (tiny_llama, "LlamaForCausalLM has no vision tower"),
        (lambda: build("florence2"), "Florence2ForConditionalGeneration keeps images in an encoder"),
    ],
)
def test_a_base_with_nothing_to_cross_is_refused(base: Any, lacks: str) -> None:
    with pytest.raises(ValueError, match=f"{lacks}.*nothing to cross"):
        attach(base(), shared=CrossModal())


def test_it_sits_where_text_still_reads_the_images() -> None:
    last = len(tiny_llava().model.language_model.layers) - 1
    text = CrossModal(directions=("image_to_text",))
    blocks = [f"model.language_model.layers.{i}" for i in range(last + 1)]
    sites = {
        name: [site.path for site in attach(tiny_llava(), shared=spec).sites]
        for name, spec in (("both", CrossModal()), ("text", text))
    }
    everywhere = [blocks[0], *(f"{block}.mlp" for block in blocks)]
    assert sorted(sites["text"]) == sorted(everywhere)
    assert sorted(sites["both"]) == sorted(everywhere[:-1])
    vision = Placement(towers=("vision",))
    with pytest.raises(ValueError, match=r"CrossModal would sit at \S+vision\S+ in the vision tower"):
        attach(tiny_llava(), shared=CrossModal(placement=vision))
    with pytest.raises(ValueError, match=r"layers\.2\.mlp, in the language tower; it needs .* or image_to_text alone"):
        attach(tiny_llava(), shared=CrossModal(placement=Placement(depth=(0.6, 1.0))))


def test_every_option_comes_back_from_disk(tmp_path: Any) -> None:
    experts = {name: spec for name, spec in SPECS.items() if name != "shared"}
    mixture = attach(tiny_llava(), shared=SPECS["shared"], experts=experts, router=ByTask())
    randomize(mixture)
    mixture.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", tiny_llava())
    assert loaded.spec == mixture.spec
    with torch.no_grad():
        ours, theirs = (each.eval()(**llava_batch(), task=["a", "b", "c"]).logits for each in (mixture, loaded))
    assert torch.equal(ours, theirs)


def test_labels_on_the_prompt_are_refused() -> None:
    batch = llava_batch()
    mixture = attach(tiny_llava(), shared=CrossModal())
    with pytest.raises(ValueError, match="labels lie on prompt tokens, which a cross-modal adapter reads"):
        mixture(**batch, prompt_mask=torch.ones_like(batch["input_ids"]).bool())
    embeddings = mixture.base.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds does not tell them"):
        mixture(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])
