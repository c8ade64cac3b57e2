"""Every base in `configs/bases` is built for every job in `configs/jobs` that it can do, on a tiny twin."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from moadapt.cli import main
from moadapt.mixture import Mixture
from tests.bases.twins import NAMES, twin
from tests.cli.published import write_published
from tests.cli.test_trainer import Parsed

ROOT = Path(__file__).parents[2] / "configs"
TWINS = {"llava_1_5": "llava"}
"""Twins by the base's file, where the names differ."""
TEXT = ("llama",)
"""Bases without pictures, which take the job of text alone."""
BASES = [file.stem for file in sorted((ROOT / "bases").glob("*.yaml"))]
JOBS = {
    "together": {"vqa", "captioning", "grounding"},
    "by_task": {"vqa", "captioning", "grounding"},
    "routers": {"vqa", "captioning", "grounding"},
    "vqa": {"vqa"},
    "text": {"questions"},
}
"""Jobs, with the tasks that they train on."""
PAIRS = [(base, job) for base in BASES for job in JOBS if (base in TEXT) == (job == "text")]
QUICK = [("paligemma", "together"), ("florence2", "vqa"), ("llama", "text"), ("llava_1_5", "routers")]
"""Pairs that the default run trains for a step."""
Given = Callable[[str, str], list[str]]


def files(base: str, job: str) -> list[str]:
    """Return the files of a command, in the order that the head comments tell."""
    names = dict.fromkeys([f"jobs/{'text' if job == 'text' else 'together'}", f"bases/{base}", f"jobs/{job}"])
    return [f"configs/{name}.yaml" for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data in the published forms, where the command is given."""
    made = tmp_path_factory.mktemp("published")
    write_published(made)
    (made / "configs").symlink_to(ROOT)
    return made


@pytest.fixture
def given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    """Give the arguments of `moadapt` for a base and a job, its twin in the place of the base."""
    monkeypatch.chdir(folder)

    def arguments(base: str, job: str) -> list[str]:
        name = TWINS.get(base, base)
        if name not in NAMES:
            pytest.skip(f"the twin {name} needs what is not installed")
        if not (folder / name).exists():
            built = twin(name)
            built.model.save_pretrained(folder / name)
            built.processor.save_pretrained(folder / name)
        named = [part for file in files(base, job) for part in ("-c", file)]
        return [
            "fit",
            *named,
            "--model.base",
            str(folder / name),
            "--trainer.accelerator",
            "cpu",
            "--data.num_workers=0",
        ]

    return arguments


def test_every_file_is_a_base_or_a_job_of_these() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.yaml")} == set(JOBS)
    assert {path.parent.name for path in ROOT.rglob("*.yaml")} == {"bases", "jobs", "configs"}


@pytest.mark.parametrize(("base", "job"), PAIRS)
def test_a_job_is_built_on_a_base(base: str, job: str, given: Given, tmp_path: Path) -> None:
    arguments = given(base, job)
    if job == "routers":  # its adapters are not trained yet
        arguments = [*arguments, "--model.start_from=null", "--model.train=all"]
    made = Parsed([*arguments, "--trainer.default_root_dir", str(tmp_path)])
    made.datamodule.setup("fit")
    [batch] = made.datamodule.first_batches(1)
    assert {*made.datamodule.tasks} == JOBS[job]
    assert {*batch.task_names} <= JOBS[job]
    assert (batch.labels != -100).any(dim=1).all()
    made.model.configure_model()
    assert isinstance(made.model.model, Mixture)
    assert (made.model.shared is None) == (job in ("by_task", "routers"))
    parameters = made.model.mixture.parameters()
    assert {str(each.dtype) for each in parameters if not each.requires_grad} == {"torch.bfloat16"}


@pytest.mark.filterwarnings("ignore:Found .* eval mode")
@pytest.mark.parametrize(
    ("base", "job"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_a_base_takes_a_step_of_a_job(base: str, job: str, given: Given, tmp_path: Path) -> None:
    few = ["--trainer.max_steps=1", "--trainer.accumulate_grad_batches=1", "--trainer.limit_val_batches=0"]
    few += ["--data.batch_size=4", "--trainer.val_check_interval=1"]
    run = ["--trainer.default_root_dir", str(tmp_path / job)]
    if job == "routers":
        apart = str(tmp_path / "by_task")
        assert main([*given(base, "by_task"), *few, "--trainer.default_root_dir", apart]) == 0
        run += ["--model.start_from", f"{apart}/mixture"]
    assert main([*given(base, job), *few, *run]) == 0
    assert (tmp_path / job / "mixture").is_dir()


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.yaml")), ids=lambda file: file.stem)
def test_a_head_comment_tells_the_command_and_the_hardware(file: Path) -> None:
    head = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    named = re.findall(r"-c (configs/\S+\.yaml)", head)
    assert f"configs/{file.relative_to(ROOT)}" in named
    assert all((ROOT.parent / name).is_file() for name in named)
    if file.parent != ROOT:
        assert re.search(r"not run on (these|published)\s(# )?weights", head)
        assert ("Written for" if file.parent.name == "bases" else "ardware: ") in head
