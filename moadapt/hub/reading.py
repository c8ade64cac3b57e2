"""From a foreign folder to what a mixture takes: every key is accounted for, or the adapter is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from moadapt.adapters.family import FamilySpec
from moadapt.adapters.peft_kinds import check_kind
from moadapt.hub.adapter_folder import AdapterFiles, find_folder, open_folder
from moadapt.hub.as_lora import as_lora
from moadapt.hub.as_tuner import as_dora, check_dora
from moadapt.hub.base_mark import check_mark
from moadapt.hub.diagnosis import Diagnosis, Findings
from moadapt.hub.lora_factors import SiteFactors
from moadapt.hub.lora_settings import LoRASettings, settings_of
from moadapt.hub.module_names import ModuleNames
from moadapt.hub.module_reading import Here
from moadapt.hub.pieces import Pieces, sort_pieces
from moadapt.sites import Anatomy, Site, anatomy


@dataclass(frozen=True)
class ReadAdapter:
    """A foreign adapter as a mixture takes it.

    Args:
        spec: Its family, with its own placement.
        tensors: By site and part, such as `model.layers.0.self_attn.q_proj/down`.
        owned: Paths of modules that it has whole.
    """

    spec: FamilySpec
    tensors: Mapping[str, Tensor]
    owned: frozenset[str] = frozenset()


def read_adapter(source: str | Path, base: PreTrainedModel, *, initial: str | Path | None = None) -> ReadAdapter:
    """Read an adapter that the peft library, kohya's or diffusers' trainers wrote.

    Args:
        source: A folder, a `.safetensors` file, or a hub name.
        base: The base that it was trained on, without a mixture.
        initial: The adapter as it was before training, where it was taken off the base's weights in a way that cannot
            be computed again.

    Raises:
        ValueError: Anything of it is refused; the first reasons are said.
    """
    diagnosis, found = examine(source, base, initial=initial)
    diagnosis.check()
    assert found is not None, "what is not refused was read"
    return found


def examine(
    source: str | Path, base: PreTrainedModel, *, initial: str | Path | None = None
) -> tuple[Diagnosis, ReadAdapter | None]:
    """Tell the fate of every key of a foreign adapter, and read it where none is refused.

    Args:
        source: A folder, a `.safetensors` file, or a hub name.
        base: As in `read_adapter`; on the meta device it does to tell fates, but nothing is read then.
        initial: As in `read_adapter`.
    """
    findings = Findings(str(source))
    found = None
    try:
        found = _Examination(findings, base).run(source, initial)
    except ValueError as error:
        findings.refusals.append(str(error))
    return findings.diagnosis(), None if base.device.type == "meta" else found


class _Examination:
    """One look at one adapter.

    Args:
        findings: Takes what is found.
        base: As in `read_adapter`.
    """

    def __init__(self, findings: Findings, base: PreTrainedModel) -> None:
        self._findings, self._base = findings, base
        self._anatomy: Anatomy = anatomy(base)
        every = self._anatomy.of_form("linear", "embedding", "conv2d", unread=True)
        self._sites = {site.path: site for site in every}

    def run(self, source: str | Path, initial: str | Path | None) -> ReadAdapter | None:
        """Return the adapter; None where something was refused."""
        files = open_folder(find_folder(source))
        check_mark(files.metadata, self._base)
        settings = self._settings(files)
        names = ModuleNames(self._base)
        found = sort_pieces(files.tensors, names, self._findings)
        before = None
        if initial is not None:
            before = sort_pieces(open_folder(find_folder(initial)).tensors, names, self._findings)
        if settings.dora or any(own.has("magnitude") for own in found.values()):
            return self._as_dora(found, settings)
        return self._as_lora(found, settings, before)

    def _settings(self, files: AdapterFiles) -> LoRASettings:
        """Read the configuration, and refuse what is no LoRA."""
        findings, config = self._findings, files.config
        findings.kind = "LORA"
        if config is None:
            findings.notes.append("it has no configuration; ranks and scales are those of its tensors")
            return LoRASettings()
        findings.kind = str(config.get("peft_type")).rpartition(".")[2].upper()[:40]
        if findings.kind != "LORA":
            check_kind(findings.kind)
            raise ValueError(f"files of peft's {findings.kind} are not read yet; attach one as PeftTuner and train it")
        settings = settings_of(config)
        findings.refusals += settings.refusals
        findings.notes += settings.notes
        said, own = config.get("base_model_name_or_path"), self._base.config.name_or_path
        if said and own and str(said).rpartition("/")[2] != own.rpartition("/")[2]:
            findings.notes.append(f"it says that it was trained on {str(said)[:100]}; the base given is {own}")
        return settings

    def _as_lora(
        self, found: Mapping[str, Pieces], settings: LoRASettings, before: Mapping[str, Pieces] | None
    ) -> ReadAdapter | None:
        factors, owned = {}, set()
        for path, own in found.items():
            site, module = self._sites.get(path), self._base.get_submodule(path)
            try:
                if before is not None and path not in before and own.has("A"):
                    raise ValueError("the adapter as it was before training has nothing there")
                here = Here(own, site, module, None if before is None else before.get(path)).read(settings)
            except ValueError as error:
                self._findings.refuse(own.names(), str(error), path)
                continue
            self._tell(own, here)
            if here is not None and site is not None:
                factors[site] = here
                owned |= {path} if settings.saves(path, own.written) else set()
        self._note_left_out(settings, found)
        if self._findings.diagnosis().refused:
            return None
        if not factors:
            raise ValueError("it changes no module of the base")
        return ReadAdapter(*as_lora(factors, settings, self._anatomy), frozenset(owned))

    def _tell(self, own: Pieces, here: SiteFactors | None) -> None:
        """Tell the fate of a module's keys."""
        how = "" if here is None else here.how
        taken = {"weight": here is not None and here.whole, "base.bias": here is not None and here.offset is not None}
        for part, key in own.keys.items():
            if taken.get(part, True):
                self._findings.tell([key], "converted" if how else own.fate, own.path, how)
            else:
                self._findings.tell([key], "checked", own.path, "as the base's own")

    def _as_dora(self, found: Mapping[str, Pieces], settings: LoRASettings) -> ReadAdapter | None:
        whole: dict[Site, Pieces] = {}
        for path, own in found.items():
            site = self._sites.get(path)
            try:
                if site is None:
                    raise ValueError(f"no adapter can sit at {path}")
                check_dora(site, own, self._base.get_submodule(path), settings)
            except ValueError as error:
                self._findings.refuse(own.names(), str(error), path)
                continue
            self._findings.tell(own.names(), own.fate, path)
            whole[site] = own
        self._note_left_out(settings, found)
        if self._findings.diagnosis().refused:
            return None
        self._findings.notes.append("it is a DoRA: hosted as one of peft's own tuners, and merged to dense weights")
        return ReadAdapter(*as_dora(whole, settings))

    def _note_left_out(self, settings: LoRASettings, found: Mapping[str, Pieces]) -> None:
        """Note modules that the configuration targets and the file has nothing for."""
        if settings.targets in (None, "all-linear"):
            return
        left = [path for path in self._sites if path not in found and settings.takes(path)]
        if left:
            self._findings.notes.append(
                f"{len(left)} modules that its configuration targets stay as they are, such as {left[0]}"
            )
