"""The towers of a base, vision, connector and language, and the stacks of blocks in them.

They are found through transformers' own accessors and by exact attribute names, never by substring.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

TOWERS = ("vision", "connector", "language")
_CONNECTORS = {
    "multi_modal_projector",
    "connector",
    "language_projection",
    "qformer",
    "embed_vision",
    "merger",
    "deepstack_merger_list",
}


@dataclass(frozen=True)
class Tower:
    """One part of the base.

    Args:
        name: `vision`, `connector` or `language`.
        path: Module path of its root.
        blocks: Module paths of its blocks, first to last.
        num_read: How many of the blocks can influence the output.
        stacks: Numbers of blocks of its stacks, over each of which depth is counted: two, of the encoder and of the
            decoder, in the language tower of an encoder-decoder, else one.
    """

    name: str
    path: str
    blocks: tuple[str, ...]
    num_read: int
    stacks: tuple[int, ...] = ()

    def starts(self) -> Iterator[tuple[int, int]]:
        """Iterate over the stacks: index of the first block in the tower, and number of blocks."""
        first = 0
        for count in self.stacks:
            yield first, count
            first += count

    def depth(self, layer: int) -> float:
        """Return how far up its stack a block begins, from 0 to below 1."""
        return next((layer - first) / count for first, count in self.starts() if first <= layer < first + count)


def find_towers(base: PreTrainedModel) -> Iterator[Tower]:
    """Find the towers of a base, connectors first, as they may lie inside other towers.

    Args:
        base: Any transformers model.
    """
    paths = {id(module): path for path, module in base.named_modules()}
    vision = _vision_root(base)
    language = None if vision is base else base if vision is None else base.get_decoder()
    vision_path = paths.get(id(vision)) if vision is not None else None
    connectors = [p for p in paths.values() if p and p.rsplit(".", 1)[-1] in _CONNECTORS]
    for path in connectors:
        if not any(path.startswith(other + ".") for other in connectors):
            yield Tower("connector", path, (), 0)
    if vision is not None and vision_path is not None:
        blocks = tuple(chain.from_iterable(_stacks(vision, vision_path)))
        yield Tower("vision", vision_path, blocks, _num_read(base, len(blocks)), (len(blocks),))
    if language is not None:
        path = paths[id(language)]
        stacks = tuple(_stacks(language, path))
        blocks = tuple(chain.from_iterable(stacks))
        depths = tuple(map(len, stacks)) if base.config.is_encoder_decoder else (len(blocks),)
        yield Tower("language", path, blocks, len(blocks), depths)


def tower_of(path: str, towers: Iterable[Tower]) -> Tower | None:
    """Return the tower that a module belongs to, if any.

    Args:
        path: Module path.
        towers: The first that holds it counts.
    """
    for tower in towers:
        if not tower.path or path == tower.path or path.startswith(tower.path + "."):
            return tower
    return None


def block_width(block: nn.Module) -> int | None:
    """Return the width of the hidden states that enter a block, read off its first normalisation, if it has one.

    Args:
        block: One block of a tower.
    """
    modules = dict(block.named_modules())
    for path in sorted(modules, key=lambda path: path.count(".")):  # norms of heads lie deeper than those of the block
        weight = getattr(modules[path], "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            return weight.numel()
    return None


def is_causal(base: PreTrainedModel, towers: Iterable[Tower], tower: Tower, layer: int | None) -> bool:
    """Tell whether tokens of a block must not read later ones; where nothing says that they may, they must not.

    Attention says it by `is_causal`. That is not enough in what writes text: some decoders switch it off and mask the
    text all the same, as the prompt alone may be read in both directions.

    Args:
        base: Any transformers model.
        towers: All of its towers.
        tower: The one that holds the block.
        layer: Index of the block in the tower; None outside the blocks.
    """
    said = set[object]()
    if layer is not None:
        parts = base.get_submodule(tower.blocks[layer]).modules()
        said = {part.is_causal for part in parts if isinstance(getattr(part, "is_causal", None), bool)}
    if tower.name != "language":
        return True in said
    if base.config.is_encoder_decoder:
        return layer is None or layer >= tower.stacks[0] or said != {False}
    writes = base.can_generate() or any(other.name == "vision" for other in towers)
    return writes or getattr(base.config, "is_decoder", False) or said != {False}


def writer_within(base: PreTrainedModel) -> PreTrainedModel | None:
    """Return the model within a base that the base's own `generate` runs instead of the base, as BLIP-2's does.

    Args:
        base: Any transformers model.
    """
    if "generate" not in vars(type(base)):
        return None
    inner = base.get_decoder()
    return inner if isinstance(inner, PreTrainedModel) and inner is not base and inner.can_generate() else None


def has_linear(module: nn.Module) -> bool:
    """Tell whether a module holds linear layers."""
    return any(isinstance(each, (nn.Linear, Conv1D)) for each in module.modules())


def _vision_root(base: PreTrainedModel) -> nn.Module | None:
    if base.main_input_name == "pixel_values" and not hasattr(base.config, "text_config"):
        return base
    root = base.get_encoder("image")
    return None if root is None or root is base else root


def _stacks(root: nn.Module, path: str) -> Iterator[list[str]]:
    """Paths of the blocks of each stack of a tower, leaving out lists inside blocks and connectors."""
    stacks: list[str] = []
    for name, module in root.named_modules(prefix=path):
        is_stack = isinstance(module, nn.ModuleList) and len(module) > 0 and has_linear(module[0])
        inside = any(name.startswith(stack + ".") for stack in stacks)
        if is_stack and not inside and name.rsplit(".", 1)[-1] not in _CONNECTORS:
            stacks.append(name)
            yield [f"{name}.{i}" for i in range(len(module))]


def reads_hidden_states(base: PreTrainedModel) -> bool:
    """Tell whether a base chooses hidden states of its vision tower by index, rather than take its last output.

    Args:
        base: Any transformers model.
    """
    return getattr(base.config, "vision_feature_layer", None) is not None


def _num_read(base: PreTrainedModel, count: int) -> int:
    """How many vision blocks lie before the deepest hidden state that the model reads."""
    if not reads_hidden_states(base):
        return count
    read = base.config.vision_feature_layer
    layers = [read] if isinstance(read, int) else list(read)
    return max(layer if layer >= 0 else count + 1 + layer for layer in layers)
