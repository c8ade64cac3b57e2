import json
from pathlib import Path
from typing import Any

import pytest

from moadapt import Placement
from moadapt.adapters import LoRA
from moadapt.cli.short_names import check_keys, resolve, resolve_arguments
from moadapt.registry import ROUTERS, name_files
from moadapt.specs import fields_of

APART = "moadapt.objectives.orthogonality.Orthogonality"
TOP_K, BY_TASK = "moadapt_routers.top_k.TopK", "moadapt_routers.by_task.ByTask"
LORA, VQA = "moadapt.adapters.lora.LoRA", "moadapt_tasks.vqa.VQA"
UNIFORM = "moadapt.sampling.uniform.Uniform"
IMPORTANCE = "moadapt.ranks.importance.Importance"
GROUNDING, QWEN = "moadapt_tasks.grounding.Grounding", "moadapt_tasks.boxes.qwen2_5_vl.Qwen25VLBoxes"
SMART = "moadapt_tasks.boxes.smart_resize.SmartResize"
SCENES = "moadapt_tasks.digit_scenes.dataset.DigitScenes"
TOP = fields_of(Placement.named("top"))


def test_names_become_paths_wherever_their_key_stands() -> None:
    config = {
        "fit": {
            "model": {
                "router": {"class_path": "top_k", "init_args": {"k": 1}},
                "shared": "lora",
                "ranks": "importance",
                "balance": "pcgrad",
                "experts": {"one": "lora", "two": {"class_path": "lora"}},
                "objectives": ["orthogonality", {"class_path": "orthogonality", "init_args": {"weight": 0.5}}],
            },
            "data": {"dataset": "digit_scenes", "tasks": {"vqa": {"class_path": "vqa"}}, "sampling": "uniform"},
        },
        "model": {"init_args": {"router": BY_TASK, "shared": None, "placement": {"every": 2}}},
        "also": {"shared": {"class_path": "lora", "init_args": {"placement": "top"}}, "placement": "top"},
    }
    assert resolve(config) == {
        "fit": {
            "model": {
                "router": {"class_path": TOP_K, "init_args": {"k": 1}},
                "shared": LORA,
                "ranks": IMPORTANCE,
                "balance": "moadapt.balancing.pcgrad.PCGrad",
                "experts": {"one": LORA, "two": {"class_path": LORA}},
                "objectives": [APART, {"class_path": APART, "init_args": {"weight": 0.5}}],
            },
            "data": {"dataset": SCENES, "tasks": {"vqa": {"class_path": VQA}}, "sampling": UNIFORM},
        },
        "model": {"init_args": {"router": BY_TASK, "shared": None, "placement": {"every": 2}}},
        "also": {"shared": {"class_path": LORA, "init_args": {"placement": TOP}}, "placement": TOP},
    }


def test_a_number_in_the_place_of_a_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling is 2\.0; name a sampler: annealed, .*temperature"):
        resolve({"data": {"sampling": 2.0}})


def test_names_become_paths_within_the_settings_of_a_part() -> None:
    view = {"class_path": "smart_resize", "init_args": {"max_pixels": 1003520}}
    codec = {"class_path": "qwen2_5_vl", "init_args": {"view": view}}
    settings = {"refs": "r", "instances": "i", "images": "{file_name}"}
    found = resolve({"tasks": {"boxes": {"class_path": "grounding", "init_args": {**settings, "codec": codec}}}})
    made = {"class_path": SMART, "init_args": {"max_pixels": 1003520}}
    made = {"class_path": QWEN, "init_args": {"view": made}}
    assert found == {"tasks": {"boxes": {"class_path": GROUNDING, "init_args": {**settings, "codec": made}}}}
    assert resolve({"codec": "qwen2_5_vl", "view": "smart_resize"}) == {"codec": QWEN, "view": SMART}
    with pytest.raises(
        ValueError, match=r"view \(smart_resize\) has no setting 'max_pixel'; did you mean max_pixels\?"
    ):
        resolve({"codec": {**codec, "init_args": {"view": {**view, "init_args": {"max_pixel": 1}}}}})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--model.router", "top_k"], ["--model.router", TOP_K]),
        (["--model.router=by_task"], [f"--model.router={BY_TASK}"]),
        (["--model.router.class_path", "top_k"], ["--model.router.class_path", TOP_K]),
        (["--model.router.k", "2"], ["--model.router.k", "2"]),
        (["--model.experts.vqa", "lora", "--x"], ["--model.experts.vqa", LORA, "--x"]),
        (["--data.dataset", "digit_scenes"], ["--data.dataset", SCENES]),
        (["--model.shared", "null", "top_k"], ["--model.shared", "null", "top_k"]),
        (["--model.router", "{class_path: x}"], ["--model.router", "{class_path: x}"]),
        (["--model.objectives+=orthogonality"], [f"--model.objectives+={APART}"]),
        (["--model.objectives=[{class_path: x}]"], ["--model.objectives=[{class_path: x}]"]),
        (["--model.base", "top_k"], ["--model.base", "top_k"]),
        (["--model.placement", "top"], ["--model.placement", json.dumps(TOP)]),
        (["--model.placement={towers: [vision]}"], ["--model.placement={towers: [vision]}"]),
    ],
)
def test_arguments_are_resolved_at_the_same_keys(given: list[str], expected: list[str]) -> None:
    assert resolve_arguments(given) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"router": "topk"}, r"no router is called 'topk'; did you mean top_k, top_p\?"),
        ({"experts": {"a": {"class_path": "loras"}}}, r"no adapter family is called 'loras'; did you mean lora\?"),
        (
            {"router": {"class_path": "top_k", "init_args": {"kk": 2}}},
            r"router \(top_k\) has no setting 'kk'; did you mean k\? It accepts scope, per, .*, k",
        ),
        ({"placement": "tops"}, "no placement is called 'tops'; there are all, top"),
        ({"router": {"class_path": "top_k", "k": 2}}, "router has k beside class_path; put settings under init_args"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_accepted(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(config)


def test_a_class_in_a_file_becomes_importable(tmp_path: Path) -> None:
    file = tmp_path / "own_router_of_a_user.py"
    file.write_text("class Own:\n    pass\n")
    path = resolve({"router": f"{file}:Own"})["router"]
    assert ROUTERS.get(path) is ROUTERS.get(f"{file}:Own")
    assert name_files(f"class_path: {path}") == f"class_path: {file}:Own"


def test_keys_are_checked_against_a_class_and_some_may_be_closed() -> None:
    check_keys("model", ["rank", "placement.depth"], LoRA)
    with pytest.raises(ValueError, match=r"model has no setting 'rank'; did you mean ranks\?"):
        check_keys("model", ["rank"], LoRA, without=["rank"])


@pytest.mark.parametrize(
    "given",
    [
        ["--model.ranks", "importance", "--model.ranks.budgt", "0.5"],
        ["--model.ranks=importance", "--model.ranks.init_args.budgt=0.5"],
    ],
)
def test_a_dotted_setting_that_its_part_lacks_is_refused(given: list[str]) -> None:
    with pytest.raises(ValueError, match=r"model.ranks \(importance\) has no setting 'budgt'; did you mean budget\?"):
        resolve_arguments(given)
    assert len(resolve_arguments(["--model.ranks", "importance", "--model.ranks.budget", "0.5"])) == 4
