"""Made-up details of a demonstration, as plausible as a real one's, with pictures drawn on the fly."""

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIDE = 56
TASKS = ("vqa", "captioning", "grounding")
RUNS = ("single_lora", "lora_per_task", "mixture")
ROWS = ("base", *RUNS, "mixture_merged_per_task", "mixture_merged")
COLOURS = {"red": "#e03c31", "green": "#3fbf4a", "blue": "#4d7ff0", "yellow": "#f0d43a", "purple": "#a545d8"}
_SKILL = dict(zip(ROWS, (0.06, 0.70, 0.78, 0.81, 0.80, 0.62), strict=True))
_PROJECTIONS = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))

Thing = tuple[str, str, list[float]]


def fake_details(folder: Path, *, seed: int = 0, steps: int = 200, layers: int = 4, each: int = 8) -> dict[str, Any]:
    """Make details; the pictures go to the folder."""
    rng = random.Random(seed)
    return {
        "title": "moadapt demo",
        "command": f"moadapt demo --seed {seed}",
        "seed": seed,
        "seconds": 287.4,
        "settings": {
            "base": "digit_scenes",
            "data": "digit_scenes",
            "seed": seed,
            "steps": steps,
            "batch_size": 32,
            "rank": 8,
            "shared_rank": 4,
            "router": "softmax",
            "learning_rate": 5e-3,
        },
        "rows": [_row(name, rng) for name in ROWS],
        "losses": {run: _losses(steps, 1 + 0.2 * index, rng) for index, run in enumerate(RUNS)},
        "routing": _routing(layers, rng),
        "parameters": _parameters(),
        "merges": [_merge(task, layers, rng) for task in (*TASKS, None)],
        "examples": [_example(folder, task, index, rng) for task in TASKS for index in range(each)],
    }


def _row(name: str, rng: random.Random) -> dict[str, Any]:
    skill = _SKILL[name]
    trained = {"single_lora": 312_064, "lora_per_task": 276_480, "mixture": 311_820}.get(name, 0)
    ratio = {"base": 1.0, "single_lora": 1.31, "lora_per_task": 1.38, "mixture": 1.44}.get(name)
    return {
        "name": name,
        "trainable_parameters": trained,
        "step_ratio": ratio,
        "vqa": {"accuracy": skill * 0.97 + rng.uniform(0, 0.02)},
        "captioning": {"cider_d": 4.9 * skill, "bleu4": 0.8 * skill, "rouge_l": 0.1 + 0.8 * skill},
        "grounding": {"accuracy": 0.9 * skill, "mean_iou": 0.1 + 0.65 * skill},
    }


def _losses(steps: int, speed: float, rng: random.Random) -> dict[str, list[list[float]]]:
    floors = dict(zip(("all", *TASKS), (0.33, 0.22, 0.28, 0.5), strict=True))
    return {
        task: [
            [step, (floor + 2.6 * np.exp(-speed * 5 * step / steps)) * rng.lognormvariate(0, 0.12)]
            for step in range(1, steps + 1)
        ]
        for task, floor in floors.items()
    }


def _routing(layers: int, rng: random.Random) -> dict[str, Any]:
    weights = []
    for layer in range(layers):
        at_place = []
        for index in range(len(TASKS)):
            logits = [rng.gauss(0, 0.3) + (0.4 + 1.8 * layer / layers) * (index == expert) for expert in range(3)]
            shares = np.exp(logits) / np.exp(logits).sum()
            at_place.append(shares.tolist())
        weights.append(at_place)
    places = [f"language.{layer}" for layer in range(layers)]
    return {"experts": list(TASKS), "places": places, "tasks": list(TASKS), "weights": weights}


def _parameters() -> list[dict[str, Any]]:
    ranks = dict.fromkeys(TASKS, 8)
    none = {"shared": 0, "experts": 0, "router": 0, "other": 0}
    return [
        {"run": "single_lora", **none, "other": 312_064, "ranks": {"lora": 29}},
        {"run": "lora_per_task", **none, "experts": 276_480, "ranks": ranks},
        {
            "run": "mixture",
            **none,
            "shared": 46_080,
            "experts": 263_424,
            "router": 2_316,
            "ranks": {"shared": 4, **ranks},
        },
    ]


def _merge(task: str | None, layers: int, rng: random.Random) -> dict[str, Any]:
    scale = 0.08 if task else 0.35
    paths = [f"model.language_model.layers.{layer}.{name}" for layer in range(layers) for name in _PROJECTIONS]
    return {
        "row": "mixture_merged_per_task" if task else "mixture_merged",
        "method": "task" if task else "mean_routing",
        "task": task,
        "exact": False,
        "sites": {path: scale * rng.uniform(0.5, 1.4) for path in paths},
        "output_kl": scale * 0.06,
        "held_out": True,
        "rows": 192,
    }


def _example(folder: Path, task: str, index: int, rng: random.Random) -> dict[str, Any]:
    things = _things(rng)
    file = folder / f"{task}-{index}.png"
    draw_scene(things).save(file)
    ask = {"vqa": _question, "captioning": _caption, "grounding": _expression}[task]
    asked, reference, predict = ask(things, rng)
    box = reference if task == "grounding" else None
    predictions = {name: predict(rng.random() < _SKILL[name] - 0.25 * (index % 2)) for name in ROWS}
    references = reference if task == "captioning" else [str(reference)]
    return {
        "task": task,
        "images": [str(file)],
        "prompt": asked,
        "references": references,
        "box": box,
        "predictions": predictions,
    }


def _things(rng: random.Random) -> list[Thing]:
    corners = rng.sample([(3, 4), (32, 5), (5, 31), (33, 30)], rng.choice((2, 3)))
    colours = rng.sample(list(COLOURS), len(corners))
    return [
        (str(rng.randrange(10)), colour, [x + dx, y, x + dx + 16.0, y + 21.0])
        for (x, y), colour in zip(corners, colours, strict=True)
        for dx in [rng.randrange(4)]
    ]


def draw_scene(things: list[Thing]) -> Image.Image:
    """Draw coloured digits on dark noise."""
    noise = np.random.default_rng(len(things)).integers(18, 40, (SIDE, SIDE, 1), dtype=np.uint8)
    image = Image.fromarray(noise.repeat(3, axis=2))
    pen = ImageDraw.Draw(image)
    for digit, colour, (left, top, right, bottom) in things:
        glyph = Image.new("L", (6, 9))
        ImageDraw.Draw(glyph).text((0, -1), digit, fill=255)
        box = glyph.getbbox() or (0, 0, 6, 9)
        mask = glyph.crop(box).resize((int(right - left), int(bottom - top)))
        pen.bitmap((int(left), int(top)), mask, fill=COLOURS[colour])
    return image


def _question(things: list[Thing], rng: random.Random) -> tuple[str, Any, Any]:
    digit, colour, _ = rng.choice(things)

    def predict(right: bool) -> dict[str, Any]:
        text = colour if right else rng.choice([other for other in COLOURS if other != colour])
        return {"text": text, "right": text == colour, "box": None}

    return f"what color is the {digit}?", colour, predict


def _caption(things: list[Thing], rng: random.Random) -> tuple[str, Any, Any]:
    names = [f"{colour} {digit}" for digit, colour, _ in things]
    references = [
        f"a {' and a '.join(names)}",
        f"from left to right: {', '.join(names)}",
        f"{len(names)} digits: {', '.join(names)}",
    ]

    def predict(right: bool) -> dict[str, Any]:
        text = references[1] if right else f"from left to right: {rng.choice(names)}, {rng.choice(list(COLOURS))} 7"
        return {"text": text, "right": None, "box": None}

    return "describe the picture", references, predict


def _expression(things: list[Thing], rng: random.Random) -> tuple[str, Any, Any]:
    digit, colour, box = rng.choice(things)

    def predict(right: bool) -> dict[str, Any]:
        if not right and rng.random() < 0.15:
            return {"text": "from left to right", "right": False, "box": None}
        reach = 1.5 if right else 9.0
        found = [min(SIDE, max(0.0, edge + rng.uniform(-reach, reach))) for edge in box]
        found[2], found[3] = max(found[2], found[0] + 3), max(found[3], found[1] + 3)
        return {"text": str([round(edge * 999 / SIDE) for edge in found]), "right": right, "box": found}

    return f"where is the {colour} {digit}?", box, predict
