"""What a base computes but never reads, as far as its structure and its config tell.

Models that read hidden states of their vision tower compute all of it nevertheless: blocks behind the deepest state
that is read, and pooling heads, cannot influence the output, and adapters there get no gradient.
"""

from transformers import CLIPVisionModel, PreTrainedModel, SiglipVisionModel

from moadapt.towers import Tower, reads_hidden_states

_POOLERS = {"head", "pooler"}


def is_unread(base: PreTrainedModel, path: str, tower: Tower, layer: int | None) -> bool:
    """Tell whether a module of a tower is known not to influence the output.

    Args:
        base: Any transformers model.
        path: Module path.
        tower: The tower that the module belongs to.
        layer: Index of its block in the tower; None outside the blocks.
    """
    if layer is not None:
        return layer >= tower.num_read
    vision = base.get_submodule(tower.path)
    if tower.name != "vision" or vision is base:
        return False
    child = path.removeprefix(tower.path).lstrip(".").split(".")[0]
    if child in _POOLERS:
        return True  # only the pooled output passes there, and these bases read one state a patch
    if child == "post_layernorm" and isinstance(vision, (CLIPVisionModel, SiglipVisionModel)):
        # CLIP's lies on the way to the pooled output alone, SigLIP's behind the hidden states
        return isinstance(vision, CLIPVisionModel) or reads_hidden_states(base)
    return tower.num_read < len(tower.blocks) and _comes_after_blocks(base, child, tower)


def _comes_after_blocks(base: PreTrainedModel, child: str, tower: Tower) -> bool:
    """Tell whether a child of a tower's root is registered behind the stack of blocks."""
    names = [name for name, _ in base.get_submodule(tower.path).named_children()]
    stack = tower.blocks[0].removeprefix(tower.path).lstrip(".").split(".")[0]
    return child in names and names.index(child) > names.index(stack)
