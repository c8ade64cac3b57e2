"""Where routers sit: one place a model, tower, layer or site, and what each place can see.

A router over a layer reads the hidden states that enter the block; over a tower, those that enter its first block; over
the model, the prompt as it enters the language tower, and, where sites before that tower are routed too, the prompt's
text embeddings together with the patch embeddings, since nothing else exists yet. A router that reads the prompt sees
there what one over the model sees, wherever it sits, with text and image told apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from moadapt.image_rows import image_tokens_of
from moadapt.router import RouterSpec
from moadapt.sites import Anatomy, Site
from moadapt.towers import Tower, block_width

_UNREADABLE = {
    "embedding": "token ids",
    "conv2d": "images",
    "experts": "the tokens of all rows in one axis",
}
"""Forms of site whose input is no hidden states with rows and tokens."""


@dataclass(frozen=True)
class Place:
    """One place of a router.

    Args:
        name: `model`, a tower, `tower.layer`, or a site's path.
        tower: Name of the tower whose hidden states it reads.
        hook: Module path of the block whose input the router reads; None where it reads the site's own input or
            nothing.
        dim: Width of what it reads; 0 where it reads nothing.
        before_language: Whether it must decide before the language tower runs, from embeddings.
        summarises: Whether it reads the prompt's averages instead of its tokens.
        reads_encoder: Whether it sits in a decoder, where it reads what the encoder made of the prompt.
        decodes: Whether it reads a decoder's own tokens, whose padding and kinds are not those of the prompt.
        sites: Paths of the sites it serves.
        fallback: Module path of the block at which it decides where `hook` was not reached, for calls without images.
    """

    name: str
    tower: str
    hook: str | None
    dim: int
    before_language: bool
    sites: tuple[str, ...]
    fallback: str | None = None
    summarises: bool = False
    reads_encoder: bool = False
    decodes: bool = False


def plan_places(base: PreTrainedModel, anatomy: Anatomy, sites: Iterable[Site], spec: RouterSpec) -> tuple[Place, ...]:
    """Choose the places of a router spec over the sites that carry experts.

    Args:
        base: The base.
        anatomy: Its anatomy.
        sites: Sites with experts.
        spec: The router.

    Raises:
        ValueError: A place would be reached before what it needs exists, or its routing cannot reach a site.
    """
    sites = list(sites)
    _refuse_unreachable(base, anatomy, sites, spec)
    _refuse_unreadable(sites, spec)
    if spec.alike:
        spec = replace(spec, per="model")
    places: dict[str, Place] = {}
    for site in sites:
        fresh = _place_of(base, anatomy, site, sites, spec)
        known = places.get(fresh.name, fresh)
        places[fresh.name] = replace(known, sites=(*known.sites, site.path))
    return tuple(places.values())


def _refuse_unreachable(base: PreTrainedModel, anatomy: Anatomy, sites: list[Site], spec: RouterSpec) -> None:
    towers = {site.tower for site in sites}
    if spec.scope == "token" and spec.per == "model" and towers - {"language"} and "language" in towers:
        elsewhere = next(site for site in sites if site.tower != "language")
        raise ValueError(
            f"{spec} gives weights to the language tower's tokens, which {elsewhere.path} in the {elsewhere.tower} "
            'tower does not have; use per="tower", "layer" or "site", or scope="sequence"'
        )
    if spec.depends_on != "input" or not base.config.is_encoder_decoder:
        return
    if spec.scope == "token" and spec.per != "site":
        raise ValueError(
            f"{spec} cannot serve {type(base).__name__}, whose encoder and decoder have tokens of their own; use "
            'per="site", or scope="sequence"'
        )
    answering = next((site for site in sites if _reads_answers(anatomy, site, spec)), None)
    if answering is not None:
        raise ValueError(
            f"{spec} would read the input of {answering.path}, which is of answers, as the prompt of "
            f'{type(base).__name__} goes to its encoder; use per="layer", "tower" or "model", or leave experts '
            "out there"
        )


def _refuse_unreadable(sites: list[Site], spec: RouterSpec) -> None:
    """Refuse a router that would have to read what enters a site that takes no hidden states, or decide later."""
    if spec.depends_on != "input":
        return
    for site in sites:
        if site.form == "entry" and spec.reads == "outputs":
            raise ValueError(
                f"{spec} decides on what a module and its experts give, but experts at {site.path} change what enters "
                "it, before it gives anything; choose another router, or leave experts out there"
            )
        if site.form not in _UNREADABLE:
            continue
        own = spec.per == "site" and spec.reads != "prompt"
        place = "before the first block" if site.layer is None else 'with per="site"' if own else ""
        if not place and site.form == "conv2d" and spec.scope == "token":
            place = 'with scope="token"'
        if place:
            raise ValueError(
                f"{spec} reads hidden states, but {site.path} takes {_UNREADABLE[site.form]}, so it cannot serve it "
                f"{place}; use a router by task or constant weights, or leave experts out there"
            )


def _refuse_outside_blocks(site: Site, spec: RouterSpec) -> None:
    """Refuse a router by sequence that would read what enters a site behind the blocks.

    A base may run such a site on some of the tokens only (`logits_to_keep`), and then the prompt cannot be told there;
    but not its last norm.
    """
    if spec.scope == "sequence" and site.tower == "language" and site.layer is None and site.form != "norm":
        raise ValueError(
            f"{spec} would read the input of {site.path}, which lies outside the blocks of the language tower and may "
            'see answer tokens alone; use per="tower" or "model", or scope="token", or leave experts out there'
        )


def _place_of(base: PreTrainedModel, anatomy: Anatomy, site: Site, sites: list[Site], spec: RouterSpec) -> Place:
    tower, name = anatomy.tower(site.tower), _name_of(anatomy, site, spec)
    if spec.depends_on != "input":
        return Place(name, tower.name, None, 0, False, ())
    if spec.reads == "prompt" or name == "model":
        return replace(_model_place(base, anatomy, sites, spec), name=name)
    if name == site.path:
        _refuse_outside_blocks(site, spec)
        width = site.out_features if spec.reads == "outputs" else site.in_features
        decodes = base.config.is_encoder_decoder and _decodes(anatomy, site)
        return Place(name, tower.name, None, width, False, (), decodes=decodes)
    block = tower.blocks[0 if spec.per == "tower" else cast(int, site.layer)]
    if spec.per == "layer" and base.config.is_encoder_decoder and _decodes(anatomy, site):
        return Place(name, tower.name, block, _width(base, tower.blocks[0]), False, (), reads_encoder=True)
    return Place(name, tower.name, block, _width(base, block), False, ())


def _reads_answers(anatomy: Anatomy, site: Site, spec: RouterSpec) -> bool:
    """Tell whether a router by sequence would have to read what a decoder makes of answers."""
    own = spec.per == "site" or (spec.per == "layer" and site.layer is None)
    return spec.scope == "sequence" and spec.reads != "prompt" and own and _decodes(anatomy, site)


def _decodes(anatomy: Anatomy, site: Site) -> bool:
    """Tell whether a site of an encoder-decoder lies in its decoder, or behind it."""
    encoder = anatomy.tower("language").stacks[0]
    return site.tower == "language" and (site.layer is None or site.layer >= encoder)


def _name_of(anatomy: Anatomy, site: Site, spec: RouterSpec) -> str:
    """Name the place of a site; one that belongs to no layer, or to a tower without blocks, is a place of its own."""
    if spec.per == "model":
        return "model"
    if spec.per == "tower" and anatomy.tower(site.tower).blocks:
        return site.tower
    if spec.per == "layer" and site.layer is not None:
        return f"{site.tower}.{site.layer}"
    return site.path


def _model_place(base: PreTrainedModel, anatomy: Anatomy, sites: list[Site], spec: RouterSpec) -> Place:
    main = _main_tower(anatomy)
    first = _first_block(base, main, spec)
    width, summarises = _width(base, first), spec.reads == "prompt"
    if main.name == "language" and any(site.tower != "language" for site in sites):
        vision = _first_block(base, anatomy.tower("vision"), spec)
        width += _width(base, vision)
        return Place("model", main.name, vision, width, True, (), first, summarises)
    if summarises and main.name == "language" and image_tokens_of(base):
        width *= 2  # text and image side by side
    return Place("model", main.name, first, width, False, (), summarises=summarises)


def _main_tower(anatomy: Anatomy) -> Tower:
    towers = sorted(anatomy.towers, key=lambda tower: (not tower.blocks, tower.name != "language"))
    return towers[0]


def _first_block(base: PreTrainedModel, tower: Tower, spec: RouterSpec) -> str:
    if not tower.blocks:
        raise ValueError(
            f"{spec} reads what enters the first block of the {tower.name} tower, but {type(base).__name__} has no "
            "block of linear layers there; use a router by task or constant weights"
        )
    return tower.blocks[0]


def _width(base: PreTrainedModel, block: str) -> int:
    if isinstance(base.get_submodule(block), nn.ModuleList):
        raise ValueError(
            f"a router would read what enters {block}, but {type(base).__name__} runs the parts of that block one by "
            'one; use a router by task, constant weights, or scope="token" with per="site", or leave experts out there'
        )
    width = block_width(base.get_submodule(block))
    if width is None:
        raise ValueError(f'block {block} has no normalisation to read its width off; use a router with per="site"')
    return width
