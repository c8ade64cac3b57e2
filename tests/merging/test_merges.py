"""Merges: exact where they say so, and otherwise as far off as they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import moadapt
from moadapt import Placement
from moadapt.adapters import LoRA
from moadapt.fitting import fit_router
from moadapt.merging import MergeRefusedError
from moadapt.merging.calibration import moments
from moadapt.merging.ties import Ties
from moadapt.mixture import Mixture
from moadapt.router import RouterSpec
from moadapt_routers import ByTask, Constant, LoRAHub, Softmax, TopK
from tests.core.zoo import build
from tests.models import llava_batch, randomize, tiny_llava

TASKS = ["vqa", "captioning", "grounding"]
INPUT_ROUTERS = [Softmax(), TopK(k=2), Softmax(scope="token"), Softmax(per="tower")]


def attached(router: RouterSpec) -> Mixture:
    mixture = moadapt.attach(
        tiny_llava(),
        shared=LoRA(rank=4),
        experts={
            "vqa": LoRA(rank=3),
            "captioning": LoRA(rank=5, alpha=10),
            "grounding": LoRA(rank=2, placement=Placement(depth=(0.5, 1.0))),
        },
        router=router,
    )
    randomize(mixture, 0.1)
    return mixture


def batches(count: int) -> list[dict[str, Any]]:
    return [{**llava_batch(rows=6, seed=seed), "task": TASKS * 2} for seed in range(count)]


def inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "task"}


@pytest.mark.parametrize("task", TASKS)
def test_task_merge_by_task_is_exact(task: str) -> None:
    mixture, batch = attached(ByTask()), inputs(batches(1)[0])
    plain, report = mixture.merge("task", task=task)
    assert report.exact
    assert report.worst == 0
    torch.testing.assert_close(plain(**batch).logits, mixture(**batch, task=task).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["task", "mean_routing"])
def test_merge_of_constant_weights_is_exact(method: str) -> None:
    mixture, batch = attached(Constant(weights=(0.5, 0.2, 0.3))), inputs(batches(1)[0])
    options = {"task": "vqa"} if method == "task" else {}
    plain, report = mixture.merge(method, **options, **({"calibration": batch} if method != "task" else {}))
    assert report.exact
    torch.testing.assert_close(plain(**batch).logits, mixture(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", INPUT_ROUTERS, ids=str)
def test_merge_of_input_routing_reports_the_error_of_every_site(router: RouterSpec) -> None:
    mixture, rows = attached(router), batches(2)
    _, report = mixture.merge("mean_routing", calibration=rows)
    assert not report.exact
    assert report.held_out
    assert report.output_kl is not None
    assert report.output_kl >= 0
    expected = brute_force_errors(mixture, rows[:1])
    assert report.sites.keys() == expected.keys()
    for path, error in expected.items():
        assert report.sites[path] == pytest.approx(error, rel=1e-3, abs=1e-5), path


def brute_force_errors(mixture: Mixture, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Form every routed and merged change as a matrix and compare them."""
    with torch.no_grad(), mixture.trace() as trace:
        for batch in rows:
            mixture(**batch)
    place_of = {path: place.name for place in mixture.places for path in place.sites}
    errors = {}
    for site, bank in mixture.banks():
        weights = torch.cat([w.reshape(-1, w.shape[-1]) for w in trace.routings[place_of[site.path]]])
        merged = bank.delta(weights.mean(dim=0)).weight()
        routed = [bank.delta(row).weight() for row in weights]
        apart = sum(float((one - merged).square().sum()) for one in routed)
        errors[site.path] = (apart / sum(float(one.square().sum()) for one in routed)) ** 0.5
    return errors


def test_merge_past_the_bound_is_refused() -> None:
    with pytest.raises(MergeRefusedError, match=r"relative errors pass 0\.001.*model\.language_model"):
        attached(Softmax()).merge("mean_routing", calibration=batches(2), max_error=0.001)


def test_task_merge_of_input_routing_needs_calibration_of_that_task() -> None:
    mixture = attached(TopK(k=2))
    with pytest.raises(ValueError, match="calibration="):
        mixture.merge("task", task="vqa")
    others = [{**llava_batch(rows=2), "task": ["captioning", "grounding"]}]
    with pytest.raises(ValueError, match="no row of task 'vqa'"):
        mixture.merge("task", task="vqa", calibration=others)


def test_mixture_stays_usable_after_a_merge() -> None:
    mixture, batch = attached(Softmax()), inputs(batches(1)[0])
    before = mixture(**batch).logits
    plain, _ = mixture.merge("mean_routing", calibration=batches(2))
    assert torch.equal(mixture(**batch).logits, before)
    assert not any("moadapt" in type(module).__module__ for module in plain.modules())
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_merged_model_reloads_as_a_transformers_checkpoint(tmp_path: Path) -> None:
    mixture, batch = attached(ByTask()), inputs(batches(1)[0])
    plain, _ = mixture.merge("task", task="vqa")
    plain.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, plain(**batch).logits)


CLASSIFIERS: dict[str, dict[str, Tensor]] = {
    "bert": {"input_ids": torch.arange(5, 21).reshape(2, 8), "labels": torch.tensor([0, 1])},
    "vit": {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)},
}


def softmax_on(base: Any, router: RouterSpec | None = None) -> Mixture:
    mixture = moadapt.attach(base, experts={"a": LoRA(), "b": LoRA()}, router=router or Softmax())
    randomize(mixture)
    return mixture.eval()


def kl(mixture: Mixture, plain: Any, batch: dict[str, Any], told: Any) -> float:
    """Mean divergence of the merged distribution at these positions."""
    with torch.no_grad():
        routed, merged = (model(**batch).logits.double().softmax(-1)[told] for model in (mixture, plain))
    return float((routed * (routed / merged).log()).sum(-1).mean())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_measured_on_all_rows(name: str) -> None:
    mixture, batch = softmax_on(build(name)), CLASSIFIERS[name]
    plain, report = mixture.merge("mean_routing", calibration=batch)
    assert report.output_kl == pytest.approx(kl(mixture, plain, batch, slice(None)), rel=1e-3, abs=1e-7)
    assert report.rows == 2


def test_a_base_without_logits_has_no_divergence() -> None:
    mixture = softmax_on(build("llama").model)
    _, report = mixture.merge("mean_routing", calibration={"input_ids": CLASSIFIERS["bert"]["input_ids"]})
    assert report.output_kl is None
    assert report.worst > 0


@pytest.mark.parametrize("length", [5, 8])
def test_an_encoder_decoder_is_measured_where_its_labels_stand(length: int) -> None:
    mixture = softmax_on(build("t5"), Softmax(scope="token", per="site"))
    ids = CLASSIFIERS["bert"]["input_ids"]
    mask, labels = torch.ones_like(ids), ids[:, :length].clone()
    mask[0, -2:], labels[1, -3:] = 0, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    plain, report = mixture.merge("mean_routing", calibration=batch)
    assert report.output_kl == pytest.approx(kl(mixture, plain, batch, labels != -100), rel=1e-3, abs=1e-7)


def test_padding_of_encoder_and_decoder_is_left_out_of_the_mean() -> None:
    mixture, ids = softmax_on(build("t5"), Softmax(scope="token", per="site")), CLASSIFIERS["bert"]["input_ids"]
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, -2:], labels[1, -3:] = 0, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad(), mixture.trace() as trace:
        mixture(**batch)
    found = moments(mixture, [batch])
    for name, real in (
        ("encoder.block.0.layer.0.SelfAttention.q", mask),
        ("decoder.block.0.layer.0.SelfAttention.q", labels != -100),
    ):
        expected = trace.routings[name][0][:, :, 0][real.bool()].double().mean(0)
        torch.testing.assert_close(found[name].mean, expected)


def test_calibration_that_misses_a_place_is_refused() -> None:
    mixture = moadapt.attach(
        tiny_llava(),
        experts={"a": LoRA(), "b": LoRA()},
        router=Softmax(),
        placement=Placement(towers=("vision", "language")),
    )
    text = {"input_ids": torch.full((2, 5), 7)}
    with pytest.raises(ValueError, match=r"no calibration batch reached the router at vision\.0.*batches.*images"):
        mixture.merge("mean_routing", calibration=text)


@pytest.mark.parametrize("write", ["merge", "export_peft"])
def test_a_merge_is_measured_without_dropout_and_keeps_the_mode(write: str, tmp_path: Path) -> None:
    mixture = moadapt.attach(tiny_llava(), experts={name: LoRA(dropout=0.5) for name in TASKS}, router=Softmax())
    randomize(mixture, 0.1)
    rows = batches(2)

    def report() -> Any:
        if write == "merge":
            return mixture.merge("mean_routing", calibration=rows)[1]
        return mixture.export_peft(tmp_path / "lora", method="mean_routing", calibration=rows)

    expected = mixture.eval() and report()
    mixture.train()
    assert report() == expected
    assert mixture.training
    assert all(bank.training for _, bank in mixture.banks())
    with pytest.raises(MergeRefusedError):
        mixture.merge("mean_routing", calibration=rows, max_error=1e-6)
    assert mixture.training


def test_a_merged_model_trains_what_the_base_trained() -> None:
    base = tiny_llava()
    base.requires_grad_(False)
    base.lm_head.requires_grad_(True)
    expected = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    mixture = moadapt.attach(base, shared=LoRA())
    plain, _ = mixture.merge("task")
    assert {name: parameter.requires_grad for name, parameter in plain.named_parameters()} == expected


def test_a_group_of_tasks_is_weighed_as_its_rows_are() -> None:
    mixture, rows = attached(Softmax()), batches(2)
    chosen = [0, 2, 3, 5]
    few = [{k: [v[i] for i in chosen] if k == "task" else v[chosen] for k, v in batch.items()} for batch in rows]
    plain, report = mixture.merge("mean_routing", tasks=["vqa", "grounding"], calibration=rows)
    expected, _ = mixture.merge("mean_routing", calibration=few)
    batch = inputs(rows[0])
    assert report.tasks == ("vqa", "grounding")
    torch.testing.assert_close(plain(**batch).logits, expected(**batch).logits, rtol=1e-5, atol=1e-5)


def test_options_that_do_not_fit_are_refused() -> None:
    mixture = attached(Softmax())
    with pytest.raises(ValueError, match=r"Ties got wrong fields \(unknown: densty\); it accepts density, scale"):
        mixture.merge("ties", densty=0.1)
    with pytest.raises(ValueError, match="has its options already, and was given scale too"):
        mixture.merge(Ties(density=0.1), scale=2.0)
    with pytest.raises(ValueError, match="no task is called 'vqq'; there are vqa, captioning, grounding"):
        mixture.merge("uniform", tasks=["vqq"])
    with pytest.raises(ValueError, match=r"got task='vqa' and tasks=\['vqa'\]; give one of them"):
        mixture.merge("uniform", task="vqa", tasks=["vqa"])
    with pytest.raises(ValueError, match="merge 'lorahub' needs 'labels' in every calibration batch"):
        mixture.merge("lorahub", calibration={k: v for k, v in batches(1)[0].items() if k != "labels"})
    with pytest.raises(ValueError, match="merge 'regmean' needs 'task' in every calibration batch"):
        mixture.merge("regmean", calibration=inputs(batches(1)[0]))


def test_agreement_counts_predictions_whose_likeliest_token_is_the_same() -> None:
    mixture, rows = attached(Softmax(scope="token")), batches(2)
    plain, report = mixture.merge("uniform", calibration=rows)
    with torch.no_grad():
        routed, merged = mixture(**rows[1]).logits, plain(**inputs(rows[1])).logits
    told = torch.nn.functional.pad(rows[1]["labels"][:, 1:] != -100, (0, 1))
    expected = (routed.argmax(-1) == merged.argmax(-1))[told].float().mean()
    assert report.top1 == pytest.approx(float(expected))


def test_a_search_is_that_of_the_router_of_its_name() -> None:
    mixture, rows = attached(LoRAHub(steps=12)), batches(1)
    fit_router(mixture, rows)
    fitted, report = mixture.merge("mean_routing")
    searched, _ = moadapt.reroute(mixture, Softmax()).merge("lorahub", steps=12, calibration=rows)
    assert report.exact
    batch = inputs(rows[0])
    torch.testing.assert_close(searched(**batch).logits, fitted(**batch).logits, rtol=1e-4, atol=1e-4)
