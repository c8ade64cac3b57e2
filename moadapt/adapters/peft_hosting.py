"""A tuner of the peft library over the frozen linear layers of many sites, which it never touches.

The tuner gets a tree of linear layers on the base's weights, with the base's module names, so that peft's options by
name mean what they mean in peft. Its layers replace those of the tree, not the base's modules, and each goes to the
bank of its site, on a stand-in that reads the base's weight and holds no parameter.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moadapt.adapters.peft_kinds import config
from moadapt.quantised import dequantised, is_quantised
from moadapt.sites import Site

_ADAPTER = "default"


class StandIn(nn.Linear):
    """A frozen linear layer as peft's layers see it: weight and bias are read, never held.

    A quantised weight is dequantised once, and kept beside the packed one for tuners that read it in every call.

    Args:
        module: The base's module, a linear layer stored either way round.
    """

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self._module = (module,)  # in a tuple, so that it is no submodule
        self._known: tuple[Tensor, Tensor] | None = None
        self._plain: tuple[Tensor, ...] = ()  # in a tuple, so that it is no tensor of the adapter
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The base's weight, (F, D)."""
        module: Any = self._module[0]
        if is_quantised(module):
            if not self._plain or self._plain[0].device != module.weight.device:
                self._plain = (dequantised(module),)
            return self._plain[0]
        weight: Tensor = module.weight
        return weight.T if isinstance(module, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The base's bias, (F,)."""
        bias: Tensor | None = self._module[0].bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output; where it is known, a copy, as some tuners add to it in place."""
        if self._known is not None and x is self._known[0]:
            return self._known[1].clone()
        found: Tensor = self._module[0](x)
        return found

    @contextmanager
    def knowing(self, x: Tensor, y: Tensor) -> Iterator[None]:
        """Take the base's output for one input as known within the `with` block.

        Args:
            x: Input, (B, T, D).
            y: The base's output for it, (B, T, F).
        """
        self._known = (x, y)
        try:
            yield
        finally:
            self._known = None


def host(kind: str, options: Mapping[str, Any], sites: Mapping[Site, nn.Module]) -> dict[Site, nn.Module]:
    """Build one tuner over all sites of an adapter and return its layer at each.

    Args:
        kind: Name of a hosted `PeftType`.
        options: What the user set for it.
        sites: The frozen module of each site.

    Raises:
        ValueError: peft cannot build it at these sites, and its reason is given; or it replaces the base's weights.
    """
    tree, stand_ins = nn.Module(), {site: StandIn(module) for site, module in sites.items()}
    plain = {site: _plain(stand_in.weight, stand_in.bias) for site, stand_in in stand_ins.items()}
    for site, linear in plain.items():
        _put(tree, site.path, linear)
    settings = config(kind, options, _targets(tree, [site.path for site in sites]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a user of peft could set, but of nothing that is in our hands
            PEFT_TYPE_TO_TUNER_MAPPING[PeftType(kind)](tree, settings, _ADAPTER)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        widths = sorted({(site.in_features, site.out_features) for site in sites})
        raise ValueError(
            f"peft cannot build {kind} with {dict(options)} at {next(iter(sites)).path} and {len(sites) - 1} other "
            f"sites, of widths (in, out) {widths}: {error}"
        ) from error
    layers: dict[Site, nn.Module] = {}
    for site, stand_in in stand_ins.items():
        if plain[site].weight.untyped_storage()._cdata != stand_in.weight.untyped_storage()._cdata:
            raise ValueError(
                f"{kind} with {dict(options)} starts from another weight at {site.path} than the base's, which all "
                "adapters share; choose a start that leaves it as it is"
            )
        layer = tree.get_submodule(site.path)
        assert isinstance(layer, BaseTunerLayer), "every site is a target"
        layers[site] = _settle(layer, stand_in)
    _own_once(layers.values())
    return layers


def added(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return what a tuner's layer adds to the base's output, (B, T, F).

    Args:
        layer: One of those that `host` returns.
        x: Input, (B, T, D).
        y: The base's output, (B, T, F).
    """
    with _stand_in(layer).knowing(x, y):
        found: Tensor = layer(x)
    return found - y


def merged(layer: nn.Module, *, adds_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Return how peft's own merge changes weight, (F, D), and bias, (F,), on a copy of the base's layer.

    Args:
        layer: One of those that `host` returns.
        adds_bias: Whether the copy has a bias even where the base's layer has none.
    """
    frozen = _stand_in(layer)
    exact = torch.promote_types(frozen.weight.dtype, torch.float32)
    weight = frozen.weight.detach().to(exact)
    bias = None if frozen.bias is None else frozen.bias.detach().to(exact)
    if bias is None and adds_bias:
        bias = weight.new_zeros(len(weight))
    plain = _plain(weight.clone(), None if bias is None else bias.clone())
    scratch: Any = copy.deepcopy(layer, {id(frozen): plain})
    with torch.no_grad():
        scratch.merge()
    changed = scratch.get_base_layer()
    shift = None if bias is None else changed.bias.detach() - bias
    return changed.weight.detach() - weight, shift if shift is not None and bool(shift.any()) else None


def other_tensors(layer: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Find the tensors that a layer keeps as plain attributes, such as the places of sparse updates.

    Args:
        layer: A tuner's layer.

    Returns:
        For each a name, and the dictionary and key where it stands.
    """
    for path, module in layer.named_modules():
        for name, value in list(vars(module).items()):
            prefix = f"{path}.{name}" if path else name
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                yield prefix, vars(module), name
            elif isinstance(value, dict) and name not in ("_parameters", "_buffers", "_modules"):
                yield from ((f"{prefix}.{key}", value, key) for key, t in value.items() if isinstance(t, Tensor))


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer of these very tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _settle(layer: nn.Module, stand_in: StandIn) -> nn.Module:
    """Put the stand-in under a tuner's layer and its own numbers in float32 or finer."""
    layer.base_layer = stand_in

    def finer(tensor: Tensor) -> Tensor:
        exact = torch.promote_types(tensor.dtype, torch.float32)
        return tensor.to(exact) if tensor.is_floating_point() else tensor

    return layer._apply(finer)  # type: ignore[no-untyped-call, no-any-return]


def _stand_in(layer: nn.Module) -> StandIn:
    found = layer.base_layer
    assert isinstance(found, StandIn), "put there by `host`"
    return found


def _put(tree: nn.Module, path: str, module: nn.Module) -> None:
    *outer, name = path.split(".")
    for part in outer:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
    tree.add_module(name, module)


def _targets(tree: nn.Module, paths: list[str]) -> list[str]:
    """Return the last names of the sites, as users of peft give them, or whole paths where a name is ambiguous."""
    names = {path.rpartition(".")[2] for path in paths}
    inner = {path.rpartition(".")[2] for path, module in tree.named_modules() if not isinstance(module, nn.Linear)}
    return paths if names & inner else sorted(names)


def _own_once(layers: Iterable[nn.Module]) -> None:
    """Leave what several layers share to the first of them; the others keep it as a plain attribute."""
    tensors: set[int] = set()
    modules: set[int] = set()
    for layer in layers:
        for name, child in list(layer.named_children()):
            parameters = [id(parameter) for parameter in child.parameters()]
            held = next(child.buffers(), None) is not None
            shared = id(child) in modules or (not held and tensors.issuperset(parameters))
            if shared and (held or parameters):
                del layer._modules[name]
                vars(layer)[name] = child
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if id(parameter) in tensors:
                del layer._parameters[name]
                vars(layer)[name] = parameter
        own = [id(parameter) for parameter in layer.parameters()]
        assert tensors.isdisjoint(own), "a tuner shares whole parts of its layers"
        tensors.update(own)
        modules.update(id(module) for module in layer.children())
