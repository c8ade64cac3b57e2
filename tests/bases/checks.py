"""What every base must do with adapters in all its towers, one check a function; each raises where it does not hold.

A check that a class cannot pass says why in `EXCUSES`.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moadapt import Mixture, Placement, RouterSpec, anatomy, attach
from moadapt.adapters import LoRA
from moadapt.image_rows import image_tokens_of
from moadapt_routers import ByTask, Softmax
from tests.bases.rows import WRITERS, collated, items
from tests.bases.twins import Twin, twin

TASKS = ("a", "b")
ANSWERS = ["red", "a green one", "blue"]
NEW_TOKENS = 5
Inputs = dict[str, Any]


@dataclass
class Case:
    """A twin and its rows.

    Args:
        of: The twin.
        training: Inputs with labels.
        prompts: Inputs of all rows to be answered, or classified.
        alone: The same, row by row.
    """

    of: Twin
    training: Inputs
    prompts: Inputs
    alone: list[Inputs]

    @property
    def tasks(self) -> list[str]:
        """The rows take turns."""
        return [TASKS[row % 2] for row in range(len(self.alone))]

    @property
    def writes(self) -> bool:
        """Whether it answers with text."""
        return self.of.name in WRITERS

    def mixture(self, router: RouterSpec, *, fresh: bool = False, towers: tuple[str, ...] | None = None) -> Mixture:
        """Attach two experts and a shared adapter, to all towers unless some are named."""
        found = attach(
            self.of.model,
            shared=LoRA(rank=2),
            experts={task: LoRA(rank=2) for task in TASKS},
            router=router,
            placement=Placement(towers=towers or tuple(tower.name for tower in _towers(self.of))),
        )
        if not fresh:
            generator = torch.Generator().manual_seed(7)
            for _, parameter in found.named_adapter_parameters():
                with torch.no_grad():
                    parameter.normal_(std=0.1, generator=generator)
        return found.eval()


def case_of(name: str) -> Case:
    """Build the twin of a class with rows, of any number of pictures where the class takes that."""
    of = twin(name)
    if name in WRITERS:
        rows = items(name, ANSWERS)
        training = collated(of, rows, answers=True)
        prompts = collated(of, rows, answers=False)
        alone = [collated(of, [row], answers=False).inputs for row in rows]
        return Case(of, {**training.inputs, "labels": training.labels}, prompts.inputs, alone)
    given = _classified(of)
    alone = [{key: tensor[[row]] for key, tensor in given.items()} for row in range(3)]
    return Case(of, {**given, "labels": torch.tensor([0, 1, 0])}, given, alone)


def attaches(case: Case) -> None:
    """Fresh adapters change nothing, and come off without a trace."""
    before = {key: tensor.clone() for key, tensor in case.of.model.state_dict().items()}
    case.of.model.requires_grad_(False)  # torch rounds otherwise where weights ask for gradients
    expected = _outputs(case, case.of.model)
    mixture = case.mixture(ByTask(), fresh=True)
    torch.testing.assert_close(_outputs(case, mixture, task=case.tasks), expected, rtol=0, atol=0)
    assert {site.tower for site in mixture.sites} == {tower.name for tower in _towers(case.of)}
    after = mixture.detach().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def learns(case: Case) -> None:
    """One step lowers the loss."""
    mixture = case.mixture(ByTask(), fresh=True).train()
    optimizer = torch.optim.SGD([p for _, p in mixture.named_adapter_parameters()], lr=1e-3)
    before = mixture(**case.training, task=case.tasks).loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert mixture(**case.training, task=case.tasks).loss < before


def generates(case: Case) -> None:
    """With a cache the mixture writes what it writes without, by task and by a learned router."""
    for router in (ByTask(), Softmax()):
        apart = router.depends_on == "input" and case.of.name == "florence2"  # no router can read its vision tower
        mixture = case.mixture(router, towers=("language",) if apart else None)
        told = {"task": case.tasks} if router.depends_on == "task" else {}
        found = [_written(case, mixture, use_cache=cache, **told) for cache in (True, False)]
        assert torch.equal(*found)
        mixture.detach()


def mixes(case: Case) -> None:
    """Rows of several tasks give in one batch what each gives alone."""
    mixture = case.mixture(ByTask())
    together = _outputs(case, mixture, task=case.tasks)
    for row, (task, inputs) in enumerate(zip(case.tasks, case.alone, strict=True)):
        torch.testing.assert_close(together[row], _outputs(case, mixture, inputs, task=task)[0], rtol=1e-3, atol=1e-3)
    assert (together - _outputs(case, mixture, task=TASKS[0])).abs().max() > 1e-2


def checkpoints(case: Case) -> None:
    """Gradient checkpointing changes no gradient."""
    mixture = case.mixture(ByTask()).train()
    gradients = []
    for _ in range(2):
        mixture.zero_grad()
        mixture(**case.training, task=case.tasks).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in mixture.named_adapter_parameters() if p.grad is not None})
        mixture.gradient_checkpointing_enable()
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


def merges(case: Case) -> None:
    """The model merged for a task gives what the mixture gives for it."""
    mixture = case.mixture(ByTask())
    merged, report = mixture.merge("task", task="b")
    assert report.exact
    torch.testing.assert_close(_outputs(case, merged), _outputs(case, mixture, task="b"), rtol=1e-3, atol=1e-3)


def round_trips(case: Case) -> None:
    """peft loads what is exported, and gives what the mixture gives."""
    mixture = case.mixture(ByTask())
    expected = _outputs(case, mixture, task="b")
    with tempfile.TemporaryDirectory() as folder:
        mixture.export_peft(f"{folder}/lora", task="b")
        loaded = PeftModel.from_pretrained(deepcopy(mixture.detach()), f"{folder}/lora").eval()
    torch.testing.assert_close(_outputs(case, loaded), expected, rtol=1e-3, atol=1e-3)


CHECKS: Mapping[str, Callable[[Case], None]] = {
    "attach": attaches,
    "step lowers loss": learns,
    "cached = uncached": generates,
    "mixed = by row": mixes,
    "checkpointing": checkpoints,
    "merge": merges,
    "peft": round_trips,
}
EXCUSES: dict[tuple[str, str], str] = {
    (name, "cached = uncached"): "classifies, and writes nothing" for name in ("bert", "vit", "dinov2")
}
"""Why a class cannot pass a check, by both names."""


def _towers(of: Twin) -> Sequence[Any]:
    parts = anatomy(of.model)
    return [tower for tower in parts.towers if any(s.tower == tower.name for s in parts.of_form(*LoRA.forms))]


def _classified(of: Twin) -> Inputs:
    if of.name == "bert":
        return dict(of.processor(["a dog", "no cat at all", "why"], padding=True, return_tensors="pt"))
    pictures = [picture.open() for row in items("llava", ANSWERS, (1, 1, 1)) for picture in row.example.pictures]
    return dict(of.processor(pictures, return_tensors="pt"))


def _outputs(case: Case, model: Any, inputs: Inputs | None = None, **told: Any) -> Tensor:
    """Logits of the first token that is written for each row, or of its classes."""
    inputs = case.prompts if inputs is None else inputs
    with torch.no_grad():
        if not case.writes:
            logits: Tensor = model(**inputs, **told).logits
            return logits
        options = {"do_sample": False, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        (first,) = model.generate(**inputs, **told, **options, pad_token_id=0).logits
    found: Tensor = first
    return found


def _written(case: Case, mixture: Mixture, **options: Any) -> Tensor:
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    images = list(image_tokens_of(case.of.model))  # written, they would ask for more pictures
    found: Tensor = mixture.generate(
        **case.prompts, **options, **length, do_sample=False, pad_token_id=0, suppress_tokens=images or None
    )
    return found[:, -NEW_TOKENS:]
