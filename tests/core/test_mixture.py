"""The mixture's own behaviour: attaching, tasks, switches that are undone however their block ends, and detaching."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moadapt import Mixture, Placement, attach, load
from moadapt.adapted import AdaptedModule
from moadapt.adapters import LoRA
from moadapt.mixture_spec import MixtureSpec
from moadapt_routers import ByTask, Constant, Softmax, TopK
from tests.conformance.canonical import EVERYWHERE, EXPERTS, LANGUAGE, TASKS, make, weights_by_place
from tests.core.zoo import build
from tests.models import llava_batch, prompt_of, randomize, rows_of, tiny_llama, tiny_llava

ONE_PATH = "model.language_model.layers.0.mlp.up_proj"
ONE = Placement(modules=(ONE_PATH,))
SWITCHES: dict[str, Callable[[Mixture], AbstractContextManager[Any]]] = {
    "override": lambda mixture: mixture.override({"tell": 2.0}),
    "only": lambda mixture: mixture.only(["tell"]),
    "disabled": lambda mixture: mixture.disabled(),
    "trace": lambda mixture: mixture.trace(),
    "bare_base": lambda mixture: mixture.bare_base(),
}


def logits(model: nn.Module, **extra: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**llava_batch(), **extra).logits
    return found


def state(base: nn.Module) -> dict[str, Any]:
    """All that attaching must leave as it was."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        "modules": [(path, id(module), module.training) for path, module in base.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.detach().sum()) for name, p in base.named_parameters()],
        "hooks": [len(getattr(module, kind)) for module in base.modules() for kind in hooks],
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "got neither shared nor experts; give at least one adapter"),
        ({"experts": {"a": LoRA()}}, r"got 1 experts and no router; experts need a router, such as .*ByTask\(\)"),
        ({"shared": LoRA(), "router": ByTask()}, "got 0 experts and a router; .*and a router needs experts"),
        ({"experts": {"a.b": LoRA()}, "router": ByTask()}, "adapter name 'a.b' is refused"),
        ({"shared": LoRA(placement=Placement(modules=("qproj",)))}, "matches no site of this base.*near names: q_proj"),
        (
            {"shared": LoRA(ranks={"model.qproj": 2})},
            r"ranks names 'model.qproj', which is none of its 21 sites; near: ",
        ),
        (
            {"experts": {"a": LoRA(placement=ONE, ranks={ONE_PATH: 0})}, "router": ByTask()},
            "no expert sits anywhere; give one of them a rank above 0",
        ),
        ({"experts": {"a": LoRA()}, "router": TopK(k=2)}, "TopK needs 2 experts or more, but there are 1"),
        ({"shared": LoRA(), "experts": {"a": LoRA(dropout=0.5)}, "router": ByTask()}, "share a dropout mask"),
        (
            {
                "experts": {"a": LoRA()},
                "router": Softmax(scope="token", per="model"),
                "placement": Placement(towers=("vision", "language")),
            },
            "gives weights to the language tower's tokens, which model.vision_tower.*does not have; use per=",
        ),
    ],
)
def test_what_cannot_be_attached_leaves_the_base_as_it_was(given: dict[str, Any], message: str) -> None:
    base = tiny_llava().train()
    before = state(base)
    with pytest.raises(ValueError, match=message):
        attach(base, **given)
    assert state(base) == before
    attach(base, shared=LoRA())


def test_ranks_by_path_hold_there_and_only_there(tmp_path: Path) -> None:
    paths = [site.path for site in attach(tiny_llava(), shared=LoRA()).sites]
    ranks = {paths[0]: 0, paths[1]: 3, paths[2]: 7}
    mixture = attach(tiny_llava(), shared=LoRA(rank=4, ranks=ranks))
    randomize(mixture, 0.3)
    found = {site.path: len(bank.state("shared")["down"]) for site, bank in mixture.banks()}
    assert found == {path: ranks.get(path, 4) for path in paths[1:]}
    expected = logits(mixture)
    mixture.save(tmp_path / "ranked")
    assert torch.equal(logits(load(tmp_path / "ranked", tiny_llava())), expected)


def test_attaching_twice_is_refused_and_keeps_the_first() -> None:
    mixture = make(ByTask())
    expected = logits(mixture, task=TASKS)
    with pytest.raises(ValueError, match=r"carries a mixture already \(at model\..*\); detach that one first"):
        attach(mixture.base, shared=LoRA())
    assert torch.equal(logits(mixture, task=TASKS), expected)


def test_detach_gives_the_same_object_and_bits_and_attaching_again_works() -> None:
    base = tiny_llava()
    plain = logits(base)
    before = state(base)  # transformers leaves hooks of its own at the first call
    for router in (ByTask(), Softmax(), TopK(scope="token", per="site")):
        mixture = make(router, EVERYWHERE, base=base)
        routed = logits(mixture, task=TASKS)
        assert not torch.equal(routed, plain)
        assert mixture.detach() is base
        assert state(base) == before
        assert torch.equal(logits(base), plain)


def test_the_order_of_experts_is_the_order_of_weights() -> None:
    mixture = attach(tiny_llava(), experts={"z": LoRA(), "a": LoRA(), "m": LoRA()}, router=Constant(weights=(3, 1, 2)))
    assert mixture.tasks == ("z", "a", "m")
    assert [(a.name, a.expert) for a in mixture.spec.adapters()] == [("z", 0), ("a", 1), ("m", 2)]
    with mixture.trace() as trace:
        mixture(**llava_batch())
    assert trace.experts == ("z", "a", "m")
    assert trace.routings["model"][0].flatten().tolist() == [3, 1, 2]


def test_adapters_sit_where_their_own_placement_says() -> None:
    upper = Placement(towers=("language",), modules=("q_proj",), depth=(0.5, 1))
    mixture = attach(
        tiny_llava(),
        shared=LoRA(),
        experts={"a": LoRA(placement=upper), "b": LoRA(placement=Placement(towers=("connector",)))},
        router=ByTask(),
        placement=Placement(towers=("language",), modules=("q_proj", "k_proj")),
    )
    found = {site.path: bank.names for site, bank in mixture.banks()}
    layer, connector = "model.language_model.layers", "model.multi_modal_projector"
    assert found == {
        f"{connector}.linear_1": ("b",),
        f"{connector}.linear_2": ("b",),
        **{f"{layer}.{i}.self_attn.k_proj": ("shared",) for i in range(3)},
        **{f"{layer}.{i}.self_attn.q_proj": ("shared", "a") if i == 2 else ("shared",) for i in range(3)},
    }
    assert mixture(**llava_batch(), task="a").logits.shape == (3, 13, 67)


def test_adapter_parameters_are_all_that_the_base_has_not() -> None:
    base = tiny_llava()
    frozen = {id(parameter) for parameter in base.parameters()}
    mixture = make(Softmax(), EVERYWHERE, base=base)
    own = {id(parameter) for _, parameter in mixture.named_adapter_parameters()}
    assert own == {id(parameter) for parameter in mixture.parameters()} - frozen
    assert not own & frozen
    assert all(p.requires_grad is (id(p) in own) for p in mixture.parameters())


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (None, None),
        ("tell", [1]),
        (["find", "ask", "find"], [2, 0, 2]),
        (("ask",), [0]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([1], dtype=torch.uint8), [1]),
        ([], []),
    ],
    ids=str,
)
def test_tasks_become_indices(task: Any, expected: list[int] | None) -> None:
    found = make(ByTask()).task_ids(task)
    assert (found if found is None else found.tolist()) == expected
    assert found is None or found.dtype == torch.long


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("Ask", "unknown task 'Ask'; this mixture knows ask, tell, find"),
        (["ask", "x", "w", "x"], "unknown task 'w', 'x'; this mixture knows ask, tell, find"),
        (["ask", 1, None], "unknown task 1, None; this mixture knows"),
        ("shared", "unknown task 'shared'; this mixture knows"),
        (torch.tensor([0, 3]), r"task indices go from 0 to 2, got \[0, 3\]"),
        (torch.tensor([-1]), r"task indices go from 0 to 2, got \[-1\]"),
        (torch.tensor(1), r"task indices are integers of shape \(B,\), got torch.int64 of \(\)"),
        (torch.ones(3, 1).long(), r"got torch.int64 of \(3, 1\)"),
        (torch.tensor([0.0]), r"got torch.float32 of \(1,\)"),
        (torch.tensor([True]), r"got torch.bool of \(1,\)"),
    ],
    ids=str,
)
def test_tasks_that_do_not_exist_are_refused(task: Any, message: str) -> None:
    mixture, prompt = make(ByTask()), prompt_of(llava_batch())
    for act in (lambda: mixture.task_ids(task), lambda: mixture(**prompt, task=task)):
        with pytest.raises(ValueError, match=message):
            act()
    with pytest.raises(ValueError, match=message):
        mixture.generate(**prompt, task=task, max_new_tokens=1)


def test_a_number_of_tasks_that_is_not_the_number_of_rows_is_refused() -> None:
    mixture = make(ByTask())
    with pytest.raises(ValueError, match="got 2 task names for 3 rows; give one name, or one a row"):
        mixture(**llava_batch(), task=["ask", "tell"])
    assert mixture.context.call is None
    with pytest.raises(ValueError, match="ByTask needs the task of every row; pass task=, one of ask, tell, find, or"):
        mixture(**llava_batch())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64], ids=str)
def test_task_indices_of_any_integer_type_are_names(dtype: torch.dtype) -> None:
    mixture = make(ByTask())
    expected = logits(mixture, task=["find", "ask", "tell"])
    assert torch.equal(logits(mixture, task=torch.tensor([2, 0, 1], dtype=dtype)), expected)


def test_one_task_is_the_task_of_every_row() -> None:
    mixture = make(ByTask())
    assert torch.equal(logits(mixture, task="tell"), logits(mixture, task=["tell"] * 3))


def test_a_mixture_without_experts_takes_any_task() -> None:
    mixture = make(None)
    assert mixture.tasks == ()
    assert torch.equal(logits(mixture, task="anything"), logits(mixture))


@pytest.mark.parametrize("router", [ByTask(), Softmax(), TopK(scope="token", per="site")], ids=str)
def test_override_gives_every_input_the_weights(router: Any) -> None:
    mixture = make(router)
    before = logits(mixture, task=TASKS)
    constant = make(Constant(weights=(0.5, 0.0, -2.0)))
    with mixture.override({"find": -2, "ask": 0.5}):
        assert torch.equal(logits(mixture), logits(constant))
    assert torch.equal(logits(mixture, task=TASKS), before)


def test_override_holds_while_generating() -> None:
    mixture, prompt = make(ByTask()), prompt_of(llava_batch())
    fixed = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = mixture.generate(**prompt, task="find", **fixed)
    with mixture.override({"find": 1.0}):
        assert torch.equal(mixture.generate(**prompt, **fixed), expected)


def test_overrides_nest() -> None:
    mixture = make(Softmax())
    with mixture.override({"ask": 1.0}):
        outer = logits(mixture)
        with mixture.override({"tell": 1.0}):
            assert not torch.equal(logits(mixture), outer)
        assert torch.equal(logits(mixture), outer)


def test_override_without_weights_leaves_the_shared_adapter() -> None:
    mixture, alone = make(Softmax()), make(None)
    for site, bank in alone.banks():
        same = next(theirs for there, theirs in mixture.banks() if there == site)
        bank.load_state("shared", same.state("shared"))
    with mixture.override({}):
        torch.testing.assert_close(logits(mixture), logits(alone), rtol=0, atol=1e-4)


def test_only_spreads_the_weight_over_the_chosen() -> None:
    mixture, batch = make(Softmax(), LANGUAGE), llava_batch()
    expected = weights_by_place(mixture, **batch)["language.0"][..., [0, 2]]
    with mixture.only(["find", "ask"]):
        found = weights_by_place(mixture, **batch)["language.0"]
    torch.testing.assert_close(found[..., [0, 2]], expected / expected.sum(-1, keepdim=True))
    assert not found[..., 1].any()


def test_only_takes_rows_of_other_tasks_their_expert() -> None:
    mixture, batch = make(ByTask(), shared=False), llava_batch()
    with mixture.only(["ask", "find"]):
        assert weights_by_place(mixture, **batch, task=TASKS)["model"].squeeze().tolist() == [
            [1, 0, 0], [0, 0, 0], [0, 0, 1]
        ]  # fmt: skip


@pytest.mark.parametrize("experts", [None, ByTask()], ids=["shared", "experts"])
@pytest.mark.parametrize("switch", [lambda m: m.override({"x": 1.0}), lambda m: m.only(["x"])])
def test_switches_refuse_unknown_experts(switch: Any, experts: Any) -> None:
    mixture = make(experts)
    known = "ask, tell, find" if experts else "none, as it has no experts"
    with pytest.raises(ValueError, match=f"unknown expert 'x'; this mixture knows {known}"), switch(mixture):
        pass
    assert (mixture.context.override, mixture.context.available) == (None, None)


def test_only_refuses_to_leave_no_expert() -> None:
    mixture = make(Softmax())
    with pytest.raises(ValueError, match=r"only\(\) needs at least one expert; choose from ask, tell, find"):
        mixture.only([]).__enter__()


def test_disabled_is_the_bare_base_bit_for_bit() -> None:
    plain, mixture = logits(tiny_llava()), make(ByTask(), EVERYWHERE)
    with mixture.disabled():
        assert torch.equal(logits(mixture), plain)  # no task is needed
        with mixture.disabled():
            pass
        assert torch.equal(logits(mixture.base), plain)  # as does the base itself
        with mixture.trace() as trace:
            logits(mixture)
        assert trace.routings == {}
    assert not torch.equal(logits(mixture, task=TASKS), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_are_undone_after_an_exception(switch: str, error: type[BaseException]) -> None:
    mixture = make(Softmax(), EVERYWHERE)
    expected, before = logits(mixture), state(mixture.base)
    with pytest.raises(error), SWITCHES[switch](mixture):
        raise error
    assert torch.equal(logits(mixture), expected)
    assert state(mixture.base) == before
    context = mixture.context
    assert (context.override, context.available, context.traces, context.enabled) == (None, None, [], True)


@pytest.mark.parametrize("where", ["model.language_model.layers.1", "model.vision_tower", "lm_head"])
def test_a_pass_that_fails_leaves_no_call_behind(where: str) -> None:
    mixture, prompt = make(Softmax(), EVERYWHERE), prompt_of(llava_batch())
    expected = logits(mixture)

    def fail(*args: Any) -> None:
        raise RuntimeError("no memory left")

    handle = mixture.base.get_submodule(where).register_forward_hook(fail)
    for act in (lambda: logits(mixture), lambda: mixture.generate(**prompt, max_new_tokens=2)):
        with pytest.raises(RuntimeError, match="no memory left"):
            act()
        assert mixture.context.call is None
    handle.remove()
    assert torch.equal(logits(mixture), expected)


def test_a_trace_holds_every_routing_of_every_pass() -> None:
    mixture, batch = make(TopK(k=2), LANGUAGE), llava_batch()
    with mixture.trace() as outer:
        mixture(**batch, task=TASKS)
        with mixture.trace() as inner:
            mixture(**rows_of(batch, 1))
    mixture(**batch)
    assert list(outer.routings) == [f"language.{i}" for i in range(3)]
    for place, found in outer.routings.items():
        assert [tuple(weights.shape) for weights in found] == [(3, 1, 1, 3), (1, 1, 1, 3)]
        assert len(inner.routings[place]) == 1
        torch.testing.assert_close(found[0][1], found[1][0], rtol=0, atol=1e-5)
        assert (found[0] > 0).sum(-1).eq(2).all()
        assert not found[0].requires_grad
    tasks = [None if found is None else found.tolist() for found in outer.tasks]
    assert tasks == [[0, 1, 2], None]
    assert inner.tasks == [None]
    assert outer.experts == EXPERTS


def test_the_base_alone_is_refused_while_a_mixture_is_on_it() -> None:
    mixture = make(ByTask())
    with pytest.raises(RuntimeError, match="the base was called without its mixture; call the mixture, or detach"):
        mixture.base(**llava_batch())
    layer = mixture.base.get_submodule("model.language_model.layers.0.mlp")
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\..* was run outside a call of its mixture"):
        layer(torch.zeros(1, 1, 32))


def test_a_cache_that_another_model_filled_is_refused() -> None:
    prompt = prompt_of(llava_batch())
    cache = tiny_llava()(**prompt, use_cache=True).past_key_values
    mixture, after = make(Softmax()), {"input_ids": torch.full((3, 1), 9)}
    with pytest.raises(ValueError, match="past_key_values holds tokens that this mixture did not process"):
        mixture(**after, past_key_values=cache)
    own = mixture(**prompt, use_cache=True).past_key_values
    assert mixture(**after, past_key_values=own).logits.shape == (3, 1, 67)


def test_the_bare_base_has_no_wrappers_and_gets_them_back() -> None:
    mixture, plain = make(ByTask(), EVERYWHERE), logits(tiny_llava())
    expected = logits(mixture, task=TASKS)
    with mixture.bare_base() as base:
        assert not any(isinstance(module, AdaptedModule) for module in base.modules())
        assert torch.equal(logits(base), plain)
        with pytest.raises(ValueError, match="detached"):
            mixture(**llava_batch(), task=TASKS)
    assert torch.equal(logits(mixture, task=TASKS), expected)
    mixture.detach()
    with mixture.bare_base() as base:
        assert torch.equal(logits(base), plain)
    assert torch.equal(logits(base), plain)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_dropout_of_the_base_stays_off_while_adapters_train(name: str) -> None:
    base = build(name).train()
    rates = [module.p for module in base.modules() if isinstance(module, nn.Dropout)]
    assert any(rates)
    ids = torch.randint(5, 60, (2, 6))
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}
    assert not torch.equal(base(**inputs).logits, base(**inputs).logits)

    mixture = attach(base, shared=LoRA(dropout=0.0))
    randomize(mixture)
    mixture.train()
    assert torch.equal(mixture(**inputs).logits, mixture(**inputs).logits)
    assert mixture.training
    assert all(bank.training for _, bank in mixture.banks())
    nn.ModuleList([mixture]).train()  # as a trainer does
    assert torch.equal(mixture(**inputs).logits, mixture(**inputs).logits)
    mixture.eval()
    assert not any(bank.training for _, bank in mixture.banks())

    mixture.detach()
    assert all(module.training for module in base.modules())
    assert not torch.equal(base(**inputs).logits, base(**inputs).logits)


def test_dropout_of_adapters_is_on_in_training_only() -> None:
    mixture = attach(tiny_llama(), shared=LoRA(dropout=0.5))
    randomize(mixture)
    ids = torch.randint(5, 60, (2, 6))
    mixture.train()
    assert not torch.equal(mixture(input_ids=ids).logits, mixture(input_ids=ids).logits)
    mixture.eval()
    assert torch.equal(mixture(input_ids=ids).logits, mixture(input_ids=ids).logits)


def test_a_spec_lists_its_adapters_shared_first() -> None:
    spec = MixtureSpec({"a": LoRA(rank=1), "b": LoRA(rank=2)}, LoRA(rank=3), ByTask(), Placement())
    found = [(adapter.name, adapter.spec, adapter.expert) for adapter in spec.adapters()]
    assert found == [("shared", LoRA(rank=3), None), ("a", LoRA(rank=1), 0), ("b", LoRA(rank=2), 1)]


@pytest.mark.parametrize("router", [ByTask(), Softmax(), TopK(per="model")], ids=str)
def test_a_copy_works_by_itself(router: Any) -> None:
    mixture, prompt = make(router, EVERYWHERE), prompt_of(llava_batch())
    fixed = {"task": TASKS, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected, tokens = logits(mixture, task=TASKS), mixture.generate(**prompt, **fixed)
    twin = copy.deepcopy(mixture)
    with mixture.trace() as trace:
        assert torch.equal(logits(twin, task=TASKS), expected)
        assert torch.equal(twin.generate(**prompt, **fixed), tokens)
    assert (trace.tasks, trace.routings) == ([], {})
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(mixture, task=TASKS), expected)
    plain, twin = logits(tiny_llava()), copy.deepcopy(mixture)
    assert torch.equal(logits(mixture.detach()), plain)
    assert torch.equal(logits(twin, task=TASKS), expected)
    assert torch.equal(logits(twin.detach()), plain)
    assert not any(isinstance(module, AdaptedModule) for module in twin.base.modules())


@pytest.mark.parametrize(
    "act",
    [
        lambda mixture, folder: mixture.save(folder),
        lambda mixture, folder: mixture.merge("task", task="ask"),
        lambda mixture, folder: mixture.export_peft(folder, task="ask"),
    ],
    ids=["save", "merge", "export_peft"],
)
def test_a_detached_mixture_is_not_written_or_merged(act: Any, tmp_path: Path) -> None:
    mixture = make(ByTask())
    mixture.detach()
    with pytest.raises(ValueError, match="this mixture was detached from its base; attach adapters again"):
        act(mixture, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("placement", [LANGUAGE, EVERYWHERE], ids=["language", "everywhere"])
def test_a_trace_of_generate_holds_the_tasks_of_every_pass(placement: Placement, use_cache: bool) -> None:
    mixture, prompt = make(ByTask(), placement), prompt_of(llava_batch())
    with mixture.trace() as trace:
        mixture.generate(
            **prompt, task=TASKS, use_cache=use_cache, min_new_tokens=3, max_new_tokens=3, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    assert [found.tolist() for found in trace.tasks if found is not None] == [[0, 1, 2]] * 3
