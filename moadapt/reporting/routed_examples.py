"""Inputs coloured by the experts that they got: patches over the picture, words of the prompt, or whole rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from moadapt.reporting.markup import Child, Markup, element, fragment
from moadapt.reporting.numerals import percent
from moadapt.reporting.palette import expert_shade
from moadapt.reporting.patches import grid_of, patched, stored_picture
from moadapt.reporting.paths import shortened
from moadapt.reporting.pictures import picture
from moadapt.reporting.section import nothing, section, swatch
from moadapt.reporting.wording import task_title

Example = Mapping[str, Any]
"""`task`, `images`, `prompt`, `answers`, `tokens` with their `text` and whether each is `image`, and `places`: each
with `name`, and `weights` as [token][expert], or, where whole rows are routed, `shares` by expert."""
_FAINTEST, _STRONGEST = 0.15, 0.65


def routed_examples(shown: Sequence[Example], experts: Sequence[str]) -> Markup:
    """Return the section of the coloured inputs.

    Args:
        shown: Inputs with the routing that they got.
        experts: Names of the experts.
    """
    title = "Inputs, coloured by expert"
    if not shown or not experts:
        return section("inputs", title, nothing("There is no routed input to show."))
    by_token = any("weights" in place for example in shown for place in example["places"])
    note = (
        "Prompts of the validation split. Each patch and each word has the colour of the expert that got most of it: "
        "the stronger, the larger its share. The grid lies over the whole picture, though a processor may have cut its "
        "edges off. Point at a word or a patch to read the shares."
        if by_token
        else "Prompts of the validation split. The router gives a whole prompt one set of weights at each place."
    )
    key = [element("span", swatch(expert_shade(index).variable), name) for index, name in enumerate(experts)]
    blocks = [_block(f"input-{index}", example, experts) for index, example in enumerate(shown)]
    return section("inputs", title, element("p", note), element("p", *key, class_="key"), *blocks)


def _block(name: str, example: Example, experts: Sequence[str]) -> Markup:
    pictures, size = _pictures(example["images"], name)
    answers = " / ".join(list(example.get("answers") or ())[:1])
    heading = element("h3", task_title(str(example["task"])), " ", element("small", f"{example['prompt']} → {answers}"))
    names = shortened([str(place["name"]) for place in example["places"]])
    places = [{**place, "name": name} for place, name in zip(example["places"], names, strict=True)]
    by_token = [place for place in places if "weights" in place]
    by_row = [place for place in places if "shares" in place]
    plain = patched(name, size, None, [], [])
    bars = _bars(by_row, experts) if by_row else None
    panels = [element("div", element("p", "picture", class_="place"), plain, class_="routed") if plain else None, bars]
    panels += [_panel(name, size, example["tokens"], place, experts) for place in by_token]
    return element("div", heading, pictures, element("div", *panels, class_="panels"), class_="example")


def _pictures(files: Sequence[str], name: str) -> tuple[Markup, tuple[int, int] | None]:
    """Return a row's pictures, and the size of the one that patches can be laid over, where there is one alone."""
    if len(files) == 1:
        return stored_picture(files[0], name)
    return fragment(*(picture(file, [], alt=file) for file in files)), None


def _panel(
    name: str,
    size: tuple[int, int] | None,
    tokens: Sequence[Mapping[str, Any]],
    place: Mapping[str, Any],
    experts: Sequence[str],
) -> Markup:
    """Draw one place: its patches over the picture and, where it routes words, these."""
    weights = place["weights"]
    words = len(weights) == len(tokens) and place.get("words", True)
    patches = [w for w, token in zip(weights, tokens, strict=True) if token["image"]] if words else list(weights)
    grid = None if size is None else grid_of(len(patches), *size)
    if grid is None and not words and size is not None and grid_of(len(patches) - 1, *size):
        patches, grid = patches[1:], grid_of(len(patches) - 1, *size)  # the first is a class token
    over = patched(name, size, grid, [_fill(w) for w in patches], [_told(w, experts) for w in patches])
    lost = None if grid is not None or not patches else _strip(patches, experts)
    return element(
        "div",
        element("p", str(place["name"]), class_="place"),
        over,
        lost,
        element("p", *_words(weights, tokens, experts), class_="words") if words else None,
        class_="routed",
    )


def _words(
    weights: Sequence[Sequence[float]], tokens: Sequence[Mapping[str, Any]], experts: Sequence[str]
) -> list[Child]:
    found: list[Child] = []
    images = 0
    for shares, token in zip(weights, tokens, strict=True):
        images += token["image"]
        if not token["image"]:
            found += [_patches_stand(images)] if images else []
            images = 0
            text = str(token["text"]).replace("\n", "↵\n")
            word = text.lstrip(" ")
            found.append(text.removesuffix(word) if word else None)
            word = word or text
            found.append(element("span", word, style=_style("background", shares), title=_told(shares, experts)))
    return [*found, *([_patches_stand(images)] if images else [])]


def _patches_stand(count: int) -> Markup:
    return fragment(element("i", f"{count} image tokens", class_="aside"), " ")


def _strip(patches: Sequence[Sequence[float]], experts: Sequence[str]) -> Markup:
    """Draw patches in a row, where their grid is not known."""
    cells = [element("i", style=_style("background", w), title=_told(w, experts)) for w in patches]
    return element("div", *cells, class_="strip", aria_hidden="true")


def _bars(places: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> Markup:
    rows = [
        fragment(
            element("span", str(place["name"])),
            element("div", *(
                element("i", style=f"width:{100 * share:.2f}%;background:var({expert_shade(index).variable})")
                for index, share in enumerate(_shares(place["shares"]))
            ), class_="bar", title=_told(place["shares"], experts)),
        )
        for place in places
    ]  # fmt: skip
    return element("div", element("div", *rows, class_="bars"), class_="routed broad")


def _shares(weights: Sequence[float]) -> list[float]:
    total = sum(map(abs, weights)) or 1.0
    return [abs(weight) / total for weight in weights]


def _fill(weights: Sequence[float]) -> str:
    colour, strength = _strength(weights)
    return f"fill:var({colour});fill-opacity:{strength:.2f}"


def _style(what: str, weights: Sequence[float]) -> str:
    colour, strength = _strength(weights)
    return f"{what}:color-mix(in srgb,var({colour}) {100 * strength:.0f}%,transparent)"


def _strength(weights: Sequence[float]) -> tuple[str, float]:
    """Return the colour of the expert that got most, and how strong it is: faint where all got alike."""
    shares = _shares(weights)
    most = max(range(len(shares)), key=shares.__getitem__)
    even = 1 / len(shares)
    above = (shares[most] - even) / (1 - even) if len(shares) > 1 else 1.0
    return expert_shade(most).variable, _FAINTEST + (_STRONGEST - _FAINTEST) * max(0.0, above)


def _told(weights: Sequence[float], experts: Sequence[str]) -> str:
    ordered = sorted(zip(experts, _shares(weights), strict=True), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {percent(share, 0)}" for name, share in ordered if share > 0)
