"""A merge from files to files: a saved mixture and its base's folder in, a folder of the merged base out, site by site.

Neither base nor adapters are ever in memory as a whole: one new file is, and the site that is merged. What is finished
is kept beside the place of the result under the name `OUT.unfinished`, whose `merging.json` tells what is done, and the
same merge goes on from there; the folder takes its place when all is there.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.adapters.delta import Delta, NotMergeable
from moadapt.adapters.family import FamilySpec
from moadapt.bases import base_folder, outline
from moadapt.fingerprint import of_samples, sampled
from moadapt.merging.checkpoint import INDEX, Checkpoint, Stored, as_type, bytes_of
from moadapt.merging.deltas import Spectrum
from moadapt.merging.folding import as_stored
from moadapt.merging.merged_sites import MergedSites
from moadapt.merging.method import MergeMethod, Merging
from moadapt.merging.plan import served, why
from moadapt.merging.report import MergeReport, rank_curve
from moadapt.merging.site_adapters import SiteAdapters
from moadapt.mixture import Mixture, build_banks
from moadapt.registry import MERGES
from moadapt.sites import Site
from moadapt.specs import bind, fields_of
from moadapt.storage import StoredMixture

_STATE = "merging.json"
Progress = Callable[[int, int], None]
"""Told after every new file how many bytes of the base are done, and of how many."""


def merge_stored(
    mixture: str | Path,
    base: str | Path,
    out: str | Path,
    method: str | MergeMethod,
    *,
    task: str | None = None,
    tasks: Sequence[str] | None = None,
    max_error: float | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    shard_size: str = "1GB",
    progress: Progress = lambda done, whole: None,
    **options: Any,
) -> MergeReport:
    """Merge a saved mixture into its base, from files to files.

    Args:
        mixture: Folder that `Mixture.save` wrote.
        base: A registered short name or a folder of the base, with safetensors.
        out: Folder to make; a merge that was interrupted goes on.
        method: Short name of a merge method that looks at no rows, with its options, or the method itself.
        task: The one task that the merge serves.
        tasks: Tasks that it serves; None for all.
        max_error: Bound on the relative error of every site; known where routing is the same for all that it serves.
        rank: To which every merged change is cut; None keeps all of it.
        dtype: Number type of the weights; None keeps that of each.
        shard_size: Most that a new file takes, such as `1GB`, which is also what memory must hold.
        progress: Told after every new file.
        options: Of the method.

    Raises:
        MergeRefusedError: A site's error passes the bound; nothing is left.
        ValueError: The base is another one, the folder exists already, or the merge needs rows or the whole base.
    """
    chosen: MergeMethod = method if isinstance(method, MergeMethod) else bind(MERGES.get(method), options)
    stream = _Stream(Path(mixture), Path(base_folder(str(base))), Path(out).resolve(), chosen, rank, dtype)
    return stream.run(served(stream.mixture, task, tasks), bytes_of(shard_size), max_error, progress)


@dataclass
class _Stream:
    """One merge from files to files.

    Args:
        stored: Folder of the mixture.
        source: Folder of the base.
        out: Folder to make.
        method: How to merge.
        rank: To which changes are cut.
        dtype: Number type of the weights.
    """

    stored: Path
    source: Path
    out: Path
    method: MergeMethod
    rank: int | None
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        if self.out.exists():
            raise ValueError(f"{self.out} exists already; give the path of a folder to be made")
        self._samples: dict[str, str] = {}
        self._last: tuple[str, list[Delta]] = "", []

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base without weights, bare."""
        return outline(str(self.source))

    @cached_property
    def adapters(self) -> StoredMixture:
        """The saved mixture."""
        return StoredMixture(self.stored)

    @cached_property
    def mixture(self) -> Mixture:
        """The mixture on the base without weights, detached; its routers are real."""
        mixture = Mixture(self.base, self.adapters.spec).eval()
        mixture.refuse_scoped()
        self.adapters.fill_routers(mixture)
        mixture.detach()
        return mixture

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base's files."""
        assert self.mixture.sites, "which is detached by now"
        return Checkpoint(self.source, self.base)

    @property
    def unfinished(self) -> Path:
        """Where what is done is kept."""
        return self.out.with_name(f"{self.out.name}.unfinished")

    def run(self, tasks: tuple[str, ...], size: int, max_error: float | None, progress: Progress) -> MergeReport:
        """Merge, or go on with it."""
        merging = Merging(self.mixture, tasks)
        self._check(merging, max_error)
        self._sites = MergedSites(merging, self.method.prepare(merging), self.rank)
        shards = self.checkpoint.shards(size)
        self._begin({"tasks": list(tasks), "size": size})
        whole = sum(each.bytes for shard in shards for each in shard)
        for number, shard in enumerate(shards):
            name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            if name not in self._state["files"]:
                self._write(name, shard)
                report = self._report(merging)
                if max_error is not None and report.worst > max_error:
                    shutil.rmtree(self.unfinished)
                report.require(max_error)
            progress(sum(each.bytes for done in shards[: number + 1] for each in done), whole)
        report = self._report(merging)
        self._finish()
        return report

    def _check(self, merging: Merging, max_error: float | None) -> None:
        name = MERGES.name_of(type(self.method))
        varies = merging.fixed is None and self.mixture.spec.router is not None
        if self.method.always_reads_rows or (self.method.reads_rows and varies):
            raise ValueError(
                f"merge {name!r} looks at rows, for which the whole base must run; merge in memory, or by a method "
                "that asks no router, such as uniform or ties"
            )
        if varies and max_error is not None:
            raise ValueError("how far this merge is from the routing shows on rows alone; leave max_error out")
        for adapter in self.mixture.spec.adapters():
            family = type(adapter.spec)
            if not adapter.spec.mergeable:
                raise NotMergeable(
                    f"{adapter.name} of family {family.__name__} is no change of weights; keep the mixture"
                )
            if family.banks.__func__ is not FamilySpec.banks.__func__:  # type: ignore[attr-defined]
                raise ValueError(f"{family.__name__} shares tensors over sites; merge in memory, without streaming")
        none = dict.fromkeys(self._parameters, b"")
        own = of_samples(self.base, none)
        self.adapters.check_base({part: own[part] for part in ("class", "structure")})

    def _begin(self, settings: Mapping[str, Any]) -> None:
        """Take up what was done with the same settings and files, or begin anew."""
        files = [file.stat() for file in sorted(self.stored.iterdir())]
        key = {
            **settings,
            "method": [MERGES.name_of(type(self.method)), fields_of(self.method)],
            "rank": self.rank,
            "dtype": str(self.dtype),
            "mixture": [[file.st_size, file.st_mtime_ns] for file in files],
            "base": self.checkpoint.state(),
        }
        key = json.loads(json.dumps(key))
        found = self.unfinished / _STATE
        self._state: dict[str, Any] = {"key": key, "files": {}, "sites": {}, "spectra": {}, "samples": {}}
        if found.is_file() and (before := json.loads(found.read_text())).get("key") == key:
            self._state = before
            return
        if self.unfinished.exists() and not found.is_file() and any(self.unfinished.iterdir()):
            raise ValueError(f"{self.unfinished} is in the way, and no merge left it; move it away")
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished.mkdir(parents=True)
        self._note()

    def _note(self) -> None:
        self._replace(_STATE, lambda file: file.write_text(json.dumps(self._state)))

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write a file under another name first, so that what bears its own name is whole."""
        fresh = self.unfinished / f".{name}"
        try:
            write(fresh)
            os.replace(fresh, self.unfinished / name)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise

    def _write(self, name: str, shard: Sequence[Stored]) -> None:
        """Merge what belongs into one new file, write it, and note that it is done."""
        tensors = {each.key: self._merged(each) for each in shard}
        self._replace(name, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
        self._state["files"][name] = {
            "keys": list(tensors),
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        }
        self._state["samples"] |= self._samples
        self._state["sites"] |= self._sites.errors
        for path, spectra in self._sites.spectra.items():
            self._state["spectra"][path] = [spectrum.values.tolist() for spectrum in spectra]
        self._note()

    def _merged(self, each: Stored) -> Tensor:
        """Return a tensor of the base with the change of its site added, in float32 or finer, rounded once."""
        weight = each.read()
        if each.name in self._parameters:
            self._samples[each.name] = sampled(weight).hex()
        path, _, own = each.name.rpartition(".")
        site = self._site_at.get(path)
        changes = (
            [] if site is None else [change for d in self._deltas(site) if (change := _change_of(d, own)) is not None]
        )
        if not changes:
            return as_type(weight, self.dtype).contiguous()
        module = self.base.get_submodule(path)
        tied = self._names[id(getattr(module, own))]
        if len(tied) > 1:
            raise ValueError(
                f"{path} shares its {own} ({', '.join(tied)}); merging would change both; untie the base first"
            )
        exact = torch.promote_types(weight.dtype, torch.float32)
        turned = changes if own == "bias" else [as_stored(module, change) for change in changes]
        wanted = weight.to(exact) + sum(change.to(exact) for change in turned)
        return wanted.to(self.dtype or weight.dtype).contiguous()

    @cached_property
    def _site_at(self) -> dict[str, Site]:
        return {site.path: site for site in self.mixture.sites}

    @cached_property
    def _parameters(self) -> set[str]:
        return {name for name, _ in self.base.named_parameters()}

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        """Names of each parameter, of which tied ones have several."""
        found: dict[int, list[str]] = {}
        for name, parameter in self.base.named_parameters(remove_duplicate=False):
            found.setdefault(id(parameter), []).append(name)
        return found

    def _deltas(self, site: Site) -> list[Delta]:
        """Merge a site; that of the last tensor is remembered, as weight and bias mostly lie side by side."""
        if self._last[0] != site.path:
            module = self._real(site)
            banks = build_banks({site: self.mixture.sites[site]}, {site: module})[site]
            for bank in banks:
                self.adapters.fill_bank(site, bank.eval())
            deltas = self._sites.merge(SiteAdapters(site, banks, len(self.mixture.experts)))
            if any(delta.bias is not None for delta in deltas) and getattr(module, "bias", None) is None:
                raise ValueError(f"{site.path} has no bias, and would get one; merge in memory, without streaming")
            self._last = site.path, deltas
        return self._last[1]

    def _real(self, site: Site) -> nn.Module:
        """Return the module of a site with its weights."""
        module = copy.deepcopy(self.base.get_submodule(site.path)).to_empty(device="cpu")
        for name, parameter in module.named_parameters():
            parameter.data = self._stored[f"{site.path}.{name}"].read()
        return module.requires_grad_(False)

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        return {each.name: each for each in self.checkpoint.tensors}

    def _report(self, merging: Merging) -> MergeReport:
        """Return what is known of the sites that are done."""
        known = merging.fixed is not None
        errors = self._state["sites"] if known else {}
        exact = known and not any(errors.values())
        found = self._state["spectra"].items()
        spectra = {path: [Spectrum(torch.tensor(values)) for values in own] for path, own in found}
        name = MERGES.name_of(type(self.method))
        reason = why(merging, name, self.rank, exact=exact)
        return MergeReport(name, merging.tasks, exact, reason, sites=errors, rank=self.rank, curve=rank_curve(spectra))

    def _finish(self) -> None:
        """Put what belongs to the weights beside them, and let the folder take its place.

        Raises:
            ValueError: The values are those of another base; nothing is left.
        """
        missed = [site.path for site in self.mixture.sites if site.path not in self._state["sites"]]
        assert not missed, f"{missed[:3]} were merged"
        try:
            found = {name: bytes.fromhex(told) for name, told in self._state["samples"].items()}
            self.adapters.check_base(of_samples(self.base, found))
        except ValueError:
            shutil.rmtree(self.unfinished)
            raise
        files = self._state["files"]
        index = {
            "metadata": {"total_size": sum(each["bytes"] for each in files.values())},
            "weight_map": {key: name for name, each in files.items() for key in each["keys"]},
        }
        self._replace(INDEX, lambda file: file.write_text(json.dumps(index, indent=2)))
        for other in self.checkpoint.others():
            shutil.copyfile(other, self.unfinished / other.name)
        if self.dtype is not None:
            config = json.loads((self.unfinished / "config.json").read_text())
            config |= {"dtype": str(self.dtype).removeprefix("torch.")}
            config.pop("torch_dtype", None)
            self._replace("config.json", lambda file: file.write_text(json.dumps(config, indent=2)))
        (self.unfinished / _STATE).unlink()
        self.unfinished.rename(self.out)


def _change_of(delta: Delta, own: str) -> Tensor | None:
    """Return what a delta adds to one parameter of its module, if anything."""
    if own == "bias":
        return delta.bias
    part = delta.parameters.get(own) if delta.parameters else delta if own == "weight" else None
    return part.weight() if part is not None and part.moves_weight else None
