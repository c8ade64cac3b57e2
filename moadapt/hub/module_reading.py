"""What a foreign LoRA does at one module of the base: factors, a module of its own, or nothing but a copy."""

from dataclasses import dataclass, replace
from typing import Any

from moadapt.hub.lora_factors import SiteFactors, factors_at, less, without_start
from moadapt.hub.lora_settings import LoRASettings
from moadapt.hub.pieces import Pieces
from moadapt.hub.whole_modules import change_of_whole, check_copy, matrix, nothing_at, with_bias
from moadapt.sites import Site

_FACTORS = ("A", "B", "embedding_A", "embedding_B", "B.bias", "alpha")


@dataclass(frozen=True)
class Here:
    """One module of the base, and what a file has for it.

    Args:
        pieces: What the file has.
        site: The module as a site; None where no adapter can sit.
        module: The module itself.
        initial: What the adapter had there before training, where that was given.
    """

    pieces: Pieces
    site: Site | None
    module: Any
    initial: Pieces | None = None

    def read(self, settings: LoRASettings) -> SiteFactors | None:
        """Return what the adapter does here; None for a copy of what the base has.

        Args:
            settings: What the configuration says.

        Raises:
            ValueError: It is not taken; the message says why.
        """
        own = self.pieces
        if own.has(*_FACTORS):
            return self._factors(self._site(), settings)
        if settings.saves(own.path, own.written):
            return change_of_whole(self._site(), self.module, own)
        if own.has("base.bias") and not own.has("weight") and settings.biases != "none":
            if self.site is None or self.site.form != "linear":
                raise ValueError(
                    f"the bias of a {type(self.module).__name__} was trained; those of linear layers are taken"
                )
            return with_bias(nothing_at(self.site), self.module, own)
        check_copy(self.module, own)
        return None

    def _factors(self, site: Site, settings: LoRASettings) -> SiteFactors:
        own = self.pieces
        if not settings.takes(own.path, own.written):
            raise ValueError("its configuration does not target this module, so that peft would leave it out silently")
        found = self._without_start(factors_at(site, self.module, own, settings), site, settings)
        if settings.biases != "none":
            found = with_bias(found, self.module, own)
        else:
            check_copy(self.module, own)
        return found

    def _without_start(self, found: SiteFactors, site: Site, settings: LoRASettings) -> SiteFactors:
        if self.initial is not None:
            first = factors_at(site, self.module, self.initial, replace(settings, bias=False))
            return less(found, first.down, first.up, "less what it was before training")
        if settings.start == "plain":
            return found
        if settings.start == "unknown" or site.form != "linear":
            raise ValueError(
                f"its base was changed before training (init_lora_weights={settings.start_name!r}) in a way that "
                "cannot be computed again; give the adapter as it was before training as initial, or ask for a file "
                "that was saved with path_initial_model_for_weight_conversion"
            )
        return without_start(found, site, matrix(self.module), settings.start)

    def _site(self) -> Site:
        if self.site is None:
            raise ValueError(f"no adapter can sit at {self.pieces.path}, a {type(self.module).__name__}")
        return self.site
