"""Routing by task: unknown tasks, skills that tasks share, and exact merges."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import moadapt
from moadapt import Mixture, Placement, RouterSpec, RoutingContext, attach
from moadapt.adapters import Bottleneck, FamilySpec, Hydra, LoRA
from moadapt_routers import ByTask, Poly, TaskEmbedding
from tests.conformance.canonical import EVERYWHERE, EXPERTS, LANGUAGE, TASKS, make, router_cases
from tests.models import llava_batch, randomize, tiny_llama, tiny_llava

BY_TASK = router_cases(depends_on="task")
LEARNED = [Poly(), Poly(heads=2), TaskEmbedding()]


def randomized(router: Any) -> Any:
    """Give a router, not in training, logits that matter."""
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router.eval()


def logits_of(mixture: Mixture, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = mixture(**llava_batch(), **more).logits
    return found


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize(("router", "placement"), [*BY_TASK, pytest.param(Poly(heads=2), LANGUAGE, id="two-heads")])
def test_a_merge_for_a_task_is_exact(router: RouterSpec, placement: Any, shared: bool) -> None:
    mixture = make(router, placement, shared=shared).double()
    batch = {n: v.double() if v.is_floating_point() else v for n, v in llava_batch().items()}
    for task in TASKS:
        with torch.no_grad():
            routed = mixture(**batch, task=task).logits
            merged, report = mixture.merge("task", task=task)
            assert report.exact
            torch.testing.assert_close(merged(**batch).logits, routed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "router", [ByTask(unknown="average"), *(replace(r, unknown="average") for r in LEARNED)], ids=str
)
def test_an_unknown_task_gets_the_average(router: RouterSpec) -> None:
    mixture = make(router, LANGUAGE)
    known = logits_of(mixture, task=["ask", "tell", "find"])
    mixed = logits_of(mixture, task=["ask", "never seen", "find"])
    torch.testing.assert_close(mixed[[0, 2]], known[[0, 2]])
    even = {place: w[1, 0] for place, w in _weights(mixture, task=["ask", "never seen", "find"]).items()}
    for weights in even.values():
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.parametrize(
    "spec", [ByTask(unknown="average"), *(replace(r, unknown="average") for r in LEARNED)], ids=str
)
def test_weights_of_unavailable_experts_go_to_the_others(spec: Any) -> None:
    """A row of an unknown task gets the average of those that are left; by name, a row never gets another's expert."""
    router = randomized(spec.build(0, 3))
    ids, available = torch.tensor([0, 1, -1]), torch.tensor([True, False, True])
    free = router(RoutingContext(task_ids=ids)).dense()
    found = router(RoutingContext(task_ids=ids, available=available)).dense()
    left = free * available
    torch.testing.assert_close(found, left / left.sum(-1, keepdim=True).clamp(min=1e-9))
    torch.testing.assert_close(found[2], torch.tensor([0.5, 0.0, 0.5]).expand_as(found[2]))


@pytest.mark.parametrize("spec", LEARNED, ids=str)
def test_objectives_judge_the_very_weights(spec: Any) -> None:
    """What a routing says its weights were made of has them as its softmax, for an unknown task too."""
    router = randomized(spec.build(0, 3))
    routing = router(RoutingContext(task_ids=torch.tensor([1, -1, 0, 2])))
    torch.testing.assert_close(routing.logits.softmax(-1), routing.weights)
    router.train()
    again = router(RoutingContext(task_ids=torch.tensor([1, -1, 0, 2])))
    assert torch.equal(again.logits, routing.logits)  # as by other routers, without noise


def test_skills_that_no_task_wants_are_no_division_by_zero() -> None:
    router = Poly().build(0, 3).eval()
    torch.nn.init.constant_(router.z, -200.0)  # whose sigmoid is 0 in float32
    weights = router(RoutingContext(task_ids=torch.tensor([0]))).weights
    torch.testing.assert_close(weights, torch.full((1, 1, 1, 3), 1 / 3))


def test_an_unknown_task_may_get_the_shared_adapter_alone() -> None:
    mixture = make(ByTask(unknown="shared"), LANGUAGE)
    with mixture.override({}):
        alone = logits_of(mixture)
    torch.testing.assert_close(logits_of(mixture, task="never seen"), alone)
    torch.testing.assert_close(logits_of(mixture, task=["ask", "new", "tell"])[1], alone[1])


@pytest.mark.parametrize("router", [ByTask(), *LEARNED], ids=str)
def test_an_unknown_task_is_an_error_otherwise(router: RouterSpec) -> None:
    mixture = make(router, LANGUAGE)
    with pytest.raises(ValueError, match="unknown task 'new'; this mixture knows ask, tell, find"):
        logits_of(mixture, task=["ask", "new", "tell"])


def _weights(mixture: Mixture, **more: Any) -> dict[str, Tensor]:
    with torch.no_grad(), mixture.trace() as trace:
        mixture(**llava_batch(), **more)
    return {place: found[0] for place, found in trace.routings.items()}


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_poly_blends_factors_head_by_head(heads: int) -> None:
    """Against a naive adapter a row, made by hand from the stored tensors."""
    mixture = make(Poly(heads=heads, per="site"), LANGUAGE, shared=False, base=tiny_llama()).double()
    site, bank = next(mixture.banks())
    place = next(i for i, place in enumerate(mixture.places) if site.path in place.sites)
    chances = torch.sigmoid(mixture.routers[place].z.detach().float())  # as routers compute
    weights = chances / chances.sum(-1, keepdim=True)
    x = torch.randn(3, 5, site.in_features, dtype=torch.float64)
    routing = mixture.routers[place](RoutingContext(task_ids=torch.tensor([2, 0, 1])))
    found = bank(x, x.new_zeros(3, 5, site.out_features), routing)
    for row, task in enumerate([2, 0, 1]):
        down, up = (torch.zeros_like(bank.state("ask")[side]) for side in ("down", "up"))
        for index, name in enumerate(EXPERTS):
            for whole, side in ((down, "down"), (up, "up")):
                own = bank.state(name)[side]
                width = own.shape[1] // heads
                for head in range(heads):
                    columns = slice(head * width, (head + 1) * width)
                    whole[:, columns] += weights[task, head, index].double() * own[:, columns]
        torch.testing.assert_close(found[row], x[row] @ down.T @ up, rtol=1e-5, atol=1e-6)


def test_one_row_is_blended_where_patches_have_no_axis_of_rows() -> None:
    """As in the vision tower of Qwen2.5-VL, whose linear layers get the patches of all images in one axis."""
    mixture = make(Poly(heads=2, per="site"), LANGUAGE, base=tiny_llama())
    site, bank = next(mixture.banks())
    x, y = torch.randn(7, site.in_features), torch.randn(7, site.out_features)
    routing = next(iter(mixture.routers))(RoutingContext(task_ids=torch.tensor([1])))
    assert torch.equal(bank(x, y, routing), bank(x[None], y[None], routing)[0])


@pytest.mark.parametrize(
    ("experts", "heads", "told"),
    [
        ({"a": LoRA(rank=2), "b": LoRA(rank=3)}, 1, "got a of rank 2 and scale 1, b of rank 3 and scale 1"),
        ({"a": LoRA(rank=2), "b": LoRA(rank=2, alpha=4)}, 1, "b of rank 2 and scale 2; give them the same settings"),
        ({"a": LoRA(), "b": LoRA(lr_ratio=2.0)}, 1, "needs all 2 experts in one stack"),
        ({"a": LoRA(), "b": LoRA(placement=Placement(depth=(0, 0.5)))}, 1, "needs all 2 experts in one stack"),
        ({"a": LoRA(), "b": Bottleneck()}, 1, "the parameters of b cannot be blended at a site of form 'sublayer'"),
        ({"a": Hydra(), "b": Hydra()}, 1, "the parameters of a, b cannot be blended at a site of form 'linear'"),
        ({"a": LoRA(), "b": LoRA()}, 5, "5 routing heads do not divide its widths"),
    ],
    ids=["ranks", "scales", "stacks", "sites", "families", "family", "heads"],
)
def test_what_cannot_be_blended_is_refused_at_once(experts: dict[str, FamilySpec], heads: int, told: str) -> None:
    base = tiny_llava()
    with pytest.raises(ValueError, match=told):
        attach(base, experts=experts, router=Poly(heads=heads))
    attach(base, experts=experts, router=TaskEmbedding()).detach()  # the base was left as it was


def test_only_linear_layers_are_blended() -> None:
    embedding = Placement(kinds=("embedding",))
    with pytest.raises(ValueError, match=r"embed_tokens: .* cannot be blended at a site of form 'embedding'"):
        make(Poly(), embedding)


def test_averaging_is_even_routing_of_parameters() -> None:
    for shared in (True, False):
        mixture = make(Poly(), EVERYWHERE, shared=shared)
        for router in mixture.routers:
            torch.nn.init.zeros_(router.z)
        even = logits_of(mixture, task=TASKS)
        one = moadapt.average(mixture)
        assert one.experts == ()
        torch.testing.assert_close(logits_of(one), even, rtol=1e-4, atol=1e-4)
        assert all(p.requires_grad for _, p in one.named_adapter_parameters())


def test_an_average_keeps_ranks_and_settings() -> None:
    """Site by site, where adapters are missing at some, in the adapters' own number type."""
    base = tiny_llama()
    places = moadapt.anatomy(base).of_form("linear")
    first, second, third = (
        site.path for site in places if site.kind == "attention" and site.layer == 1 and site.path[-6] in "qkv"
    )
    like = {"lr_ratio": 4.0, "dropout": 0.1}
    expert = LoRA(rank=2, alpha=6, ranks={first: 0, second: 3}, **like)
    shared = LoRA(rank=4, rank_stabilized=True, ranks={second: 0}, **like)
    mixture = attach(base, shared=shared, experts={"a": expert, "b": expert}, router=Poly())
    randomize(mixture)
    mixture.double()
    before = {site.path: bank for site, bank in mixture.banks()}
    one = moadapt.average(mixture)
    spec = one.spec.shared
    assert isinstance(spec, LoRA)
    assert (spec.lr_ratio, spec.dropout, spec.scale) == (4.0, 0.1, 1.0)
    assert [spec.rank_at(site) for site in one.sites if site.path in (first, second, third)] == [4, 3, 6]
    for site, bank in one.banks():
        state, old = bank.state("shared"), before[site.path]
        expected = torch.zeros(site.out_features, site.in_features, dtype=torch.float64)
        if site.path != first:
            down, up = (sum(old.state(name)[side] for name in ("a", "b")) / 2 for side in ("down", "up"))
            expected += 3.0 * up.T @ down
        if site.path != second:
            own = old.state("shared")
            expected += 2.0 * own["up"].T @ own["down"]
        torch.testing.assert_close(state["up"].T @ state["down"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "shared",
    [Bottleneck(), LoRA(acts_on="image"), LoRA(lr_ratio=2.0), LoRA(placement=Placement(depth=(0, 0.5)))],
    ids=str,
)
def test_an_average_joins_a_shared_adapter_of_its_kind_only(shared: FamilySpec) -> None:
    mixture = attach(tiny_llava(), shared=shared, experts={"a": LoRA(), "b": LoRA()}, router=Poly())
    with pytest.raises(ValueError, match="the average joins the shared adapter, which must be a LoRA as the experts"):
        moadapt.average(mixture)
    assert mixture.attached


def test_an_average_acts_where_its_experts_did() -> None:
    like = LoRA(rank=2, acts_on="image")
    mixture = attach(tiny_llava(), shared=like, experts={"a": like, "b": like}, router=Poly())
    randomize(mixture)
    for router in mixture.routers:
        torch.nn.init.zeros_(router.z)
    even = logits_of(mixture, task="a")
    torch.testing.assert_close(logits_of(moadapt.average(mixture)), even, rtol=1e-4, atol=1e-4)


def test_only_like_loras_are_averaged() -> None:
    experts = {"a": LoRA(rank=2), "b": LoRA(rank=3)}
    with pytest.raises(ValueError, match=r"experts that are LoRAs with the same settings.*rank=2.*rank=3"):
        moadapt.average(attach(tiny_llama(), experts=experts, router=ByTask()))
    with pytest.raises(ValueError, match="got none"):
        moadapt.average(attach(tiny_llama(), shared=LoRA()))
    pissa = {name: LoRA(init="pissa") for name in ("a", "b")}
    with pytest.raises(ValueError, match="without an init whose start is taken off"):
        moadapt.average(attach(tiny_llama(), experts=pissa, router=ByTask()))


@pytest.mark.parametrize("router", LEARNED, ids=str)
def test_tasks_may_have_names_of_their_own(router: Any) -> None:
    names = ("one", "two", "three", "four")
    mixture = make(replace(router, tasks=names), LANGUAGE)
    assert (mixture.tasks, mixture.experts) == (names, EXPERTS)
    assert logits_of(mixture, task=["four", "one", "two"]).isfinite().all()
    with pytest.raises(ValueError, match="unknown task 'ask'; this mixture knows one, two, three, four"):
        logits_of(mixture, task="ask")


@pytest.mark.parametrize("router", [Poly, TaskEmbedding])
def test_tasks_are_a_list_of_names_each_once(router: Any) -> None:
    with pytest.raises(ValueError, match=r"got tasks='vqa'; give a list, such as \[vqa\]"):
        router(tasks="vqa")
    with pytest.raises(ValueError, match="name each once"):
        router(tasks=("vqa", "vqa"))


def test_training_samples_once_a_task_and_processes_agree() -> None:
    router = Poly(heads=2, tasks=("a", "b")).build(0, 3)
    ids = torch.tensor([0, 1, 0, 1])

    def drawn(seed: int) -> Tensor:
        noise = torch.Generator().manual_seed(seed)
        weights: Tensor = router(RoutingContext(task_ids=ids, noise=noise)).weights
        return weights

    router.train()
    first = drawn(1)
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], first[3])
    assert not torch.allclose(first[0], first[1])
    torch.manual_seed(5)  # another process draws its other noise elsewhere
    assert torch.equal(drawn(1), first)
    assert not torch.allclose(drawn(2), first)
    router.eval()
    assert torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("router", LEARNED, ids=str)
def test_routing_alone_can_be_trained(router: Any) -> None:
    """MHR-z: every adapter frozen, as many trained numbers as the router has, and nothing else moves."""
    mixture = make(router, LANGUAGE)
    for name in ("shared", *EXPERTS):
        mixture.freeze(name)
    trained = {name: p for name, p in mixture.named_adapter_parameters() if p.requires_grad}
    assert all(name.startswith("routers.") for name in trained)
    each = 3 * getattr(router, "heads", 1) * 3 if isinstance(router, Poly) else (3 + 3) * router.size
    assert sum(p.numel() for p in trained.values()) == len(mixture.places) * each
    before = {name: p.clone() for name, p in mixture.named_parameters()}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    mixture.train()
    mixture(**llava_batch(), task=TASKS).loss.backward()
    optimizer.step()
    moved = {name for name, p in mixture.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained)


@pytest.mark.parametrize("owned", [True, False], ids=["tasks of experts", "tasks of their own"])
@pytest.mark.parametrize("spec", LEARNED, ids=str)
def test_experts_come_and_go(spec: Any, owned: bool) -> None:
    router = replace(spec, tasks=() if owned else ("a", "b")).build(0, 3)
    before = router.logits().detach().clone()
    router.grow(2)
    after = router.logits().detach()
    assert after.shape == ((5 if owned else 2), before.shape[1], 5)
    torch.testing.assert_close(after[: len(before), :, :3], before)
    router.trim([2, 0])
    kept = router.logits().detach()
    expected = before[..., [2, 0]][[2, 0]] if owned else before[..., [2, 0]]
    torch.testing.assert_close(kept, expected)
    assert router(RoutingContext(task_ids=torch.tensor([0, 1]))).num_experts == 2


@pytest.mark.parametrize(
    "router",
    [ByTask(unknown="shared"), ByTask(unknown="average"), *(replace(r, unknown="average") for r in LEARNED)],
    ids=str,
)
def test_a_merge_serves_an_unknown_task_and_what_the_caller_chose(router: RouterSpec) -> None:
    mixture = make(router, LANGUAGE)
    chosen: list[tuple[str, AbstractContextManager[None]]] = [
        ("new", nullcontext()),
        ("new", mixture.only(["ask", "find"])),
        ("tell", mixture.only(["ask", "find"])),
        ("ask", mixture.override({"tell": 0.5})),
    ]
    for task, choice in chosen:
        with choice:
            routed = logits_of(mixture, task=task)
            merged, report = mixture.merge("task", task=task)
        assert report.exact
        with torch.no_grad():
            torch.testing.assert_close(merged(**llava_batch()).logits, routed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", LEARNED, ids=str)
def test_a_merge_takes_a_shared_adapter_of_another_family(router: RouterSpec) -> None:
    mixture = attach(tiny_llava(), shared=Hydra(), experts={name: LoRA() for name in EXPERTS}, router=router)
    randomize(mixture)
    routed = logits_of(mixture.eval(), task="ask")
    merged, _ = mixture.merge("task", task="ask")
    with torch.no_grad():
        torch.testing.assert_close(merged(**llava_batch()).logits, routed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", [Poly(heads=2), TaskEmbedding()], ids=str)
def test_a_task_is_exported_as_a_plain_lora(router: RouterSpec, tmp_path: Path) -> None:
    mixture = make(router, LANGUAGE, shared=False)
    routed = logits_of(mixture, task="find")
    assert mixture.export_peft(tmp_path / "find", method="task", task="find").exact
    served = PeftModel.from_pretrained(mixture.detach(), str(tmp_path / "find")).eval()
    with torch.no_grad():
        torch.testing.assert_close(served(**llava_batch()).logits, routed, rtol=1e-4, atol=1e-4)


def test_blended_mixtures_have_no_mean_routing() -> None:
    mixture = make(Poly(), LANGUAGE)
    with pytest.raises(ValueError, match="blends parameters, which no average of its weights does; merge with"):
        mixture.merge("mean_routing", calibration={**llava_batch(), "task": TASKS})
