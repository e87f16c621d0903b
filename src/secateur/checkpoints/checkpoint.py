"""A checkpoint as canonical tensors: names on disk are translated to the stock modules' and on to roles.

The translation knows four things, all from the family file: the base-model prefix that a file may lack, modules
renamed on disk, experts that lie one by one on disk and stacked in the module, and tied heads that a file may repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from secateur.checkpoints.embedding import Embedding, embedding_of
from secateur.checkpoints.folder import CONFIG, WEIGHT_DTYPES, Folder, TensorHeader
from secateur.errors import RequestError, refuse
from secateur.families import Architecture, Block, Family, Packed, canonical_name, load_family

HEAD = canonical_name(None, "head", "weight")
EMBEDDING = canonical_name(None, "embedding", "weight")


class Checkpoint:
    """A folder read through its architecture.

    Args:
        folder: its files.
        family: of its architecture; looked up from ``model_type`` when omitted.

    Attributes:
        packed: packed tensors on disk of every place, with their names there.
        passthrough: tensors on disk that are no parameter of the stock model (buffers, unknown ones).
        repeated_head: name on disk of a head stored beside the embedding it is tied to.

    Raises:
        RequestError: the files do not hold what ``config.json`` describes; every problem is in ``problems`` first.
    """

    def __init__(self, folder: Folder, family: Family | None = None) -> None:
        self.folder = folder
        _require_so_many_blocks(folder, family)
        self.architecture = Architecture(folder.config, family, folder.layers)
        self.packed: dict[Block, list[Packed]] = {}
        self.repeated_head: str | None = None
        self.problems: list[RequestError] = []
        self._separate_untied_head()
        for place in self.architecture.places:
            self.packed[place] = [d for p in self.architecture.packed_of(place) for d in self._on_disk(p)]
        present = self._on_disk_as_is(self.architecture.unmapped)
        self.problems += [self._missing(name) for name in self.architecture.unmapped if name not in present]
        self._check_shapes()

    @classmethod
    def open(cls, path: Path, family: Family | None = None) -> Checkpoint:
        """Open a folder and refuse it unless every tensor is there as described."""
        checkpoint = cls(Folder(path), family)
        if checkpoint.problems:
            raise checkpoint.problems[0]
        return checkpoint

    @cached_property
    def embedding(self) -> Embedding | None:
        """How the model makes one vector of a text; None where it predicts tokens instead."""
        return embedding_of(self.folder, self.architecture.family)

    def require_tokens(self, asked: str) -> None:
        """Refuse what only a model can do that predicts tokens."""
        if self.embedding is not None:
            found = f"{str(self.folder.path)!r} makes embeddings and predicts no tokens"
            refuse("embeddings", asked, found, "a causal language model; embeddings are measured with --pairs FILE")

    # -- names -----------------------------------------------------------------------------------------------------

    def _spellings(self, name: str) -> tuple[str, ...]:
        """How a module's tensor may be called on disk: as it is, or without the base-model prefix."""
        base = self.architecture.family.blocks.partition(".")[0] + "."
        return (name, name.removeprefix(base)) if name.startswith(base) else (name,)

    def _on_disk(self, packed: Packed) -> list[Packed]:
        """The tensors on disk that hold ``packed``; without them, a problem."""
        found = self._find(packed)
        if not found:
            self.problems.append(self._missing(packed.name))
        return found

    def _missing(self, name: str) -> RequestError:
        asked = f"parameter {name} of {self.architecture.family.model_type}"
        return RequestError("missing-tensor", asked, "it is in no file of the folder", "fetch the checkpoint again")

    def _find(self, packed: Packed) -> list[Packed]:
        """The tensors on disk that hold ``packed``, under the first spelling found; none where there are none."""
        headers = self.folder.headers
        for form in (*self._disk_forms(packed), [packed]):
            for spelled in zip(*(self._spellings(p.name) for p in form), strict=True):
                if all(name in headers for name in spelled):
                    return [replace(p, name=name) for p, name in zip(form, spelled, strict=True)]
        return []

    def _disk_forms(self, packed: Packed) -> Iterator[list[Packed]]:
        """Other arrangements on disk that the family file knows for a module's tensor."""
        prefix, place, local = self.architecture.family.blocks + ".", "", packed.name
        if packed.name.startswith(prefix):
            number, _, local = packed.name.removeprefix(prefix).partition(".")
            place = f"{prefix}{number}."
        module, _, kind = local.rpartition(".")
        alone = self.architecture.family.disk.get(local)
        renamed = alone or self.architecture.family.disk.get(module)
        if isinstance(alone, str):
            yield [replace(packed, name=f"{place}{alone}")]
        elif isinstance(renamed, str):
            yield [replace(packed, name=f"{place}{renamed}.{kind}")]
        elif renamed is not None:
            yield [
                Packed(f"{place}{template.replace('{e}', str(expert))}.weight", ((name,),))
                for expert, group in enumerate(packed.parts)
                for template, name in zip(renamed, group, strict=True)
            ]

    def _separate_untied_head(self) -> None:
        """A head stored beside a tied embedding is a repeat when equal; when not, transformers does not tie either."""
        if not self.architecture.sizes.tied:
            return
        packed = self.architecture.packed.values()
        head, embedding = (next((p for p in packed if n in p.canonical), None) for n in (HEAD, EMBEDDING))
        repeats = head and self._find(head)
        if not repeats:
            return
        for table in self._find(embedding) if embedding else ():
            tensors = dict(self.folder.read([repeats[0].name, table.name]))
            if torch.equal(tensors[repeats[0].name], tensors[table.name]):
                self.repeated_head = repeats[0].name
                return
        layers = None if self.folder.layers is None else self.folder.layers.untied()
        untied = {**self.architecture.raw, "tie_word_embeddings": False}
        self.architecture = Architecture(untied, self.architecture.origin, layers)

    def _check_shapes(self) -> None:
        shapes = self.architecture.shapes
        for packed in (p for group in self.packed.values() for p in group):
            header, expected = self.folder.headers[packed.name], packed.shape(shapes)
            if header.shape != expected:
                found = f"the file holds {list(header.shape)}, config.json asks for {list(expected)}"
                self.problems.append(RequestError("shape", f"tensor {packed.name}", found))
            elif header.dtype not in WEIGHT_DTYPES and not self.architecture.is_index(packed):
                found = f"its data type is {header.dtype}"
                self.problems.append(
                    RequestError("quantised", f"tensor {packed.name}", found, "start from the unquantised checkpoint")
                )

    # -- tensors ---------------------------------------------------------------------------------------------------

    @cached_property
    def passthrough(self) -> list[TensorHeader]:
        """Tensors on disk that belong to no parameter of the stock model."""
        known = {p.name for group in self.packed.values() for p in group} | {self.repeated_head}
        return [header for name, header in self.folder.headers.items() if name not in known]

    def rest(self) -> dict[str, Tensor]:
        """What the stock model takes from the files besides what roles describe: buffers, and parameters of no role."""
        names = self._on_disk_as_is((*self.architecture.unmapped, *self.architecture.buffers))
        tensors = dict(self.folder.read(names.values()))
        return {name: tensors[spelled] for name, spelled in names.items()}

    def _on_disk_as_is(self, names: Iterable[str]) -> dict[str, str]:
        """Names on disk of tensors of the stock model that the family file does not describe, where they are there."""
        found = ((name, s) for name in names for s in self._spellings(name) if s in self.folder.headers)
        return dict(found)

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """Data type on disk of every canonical tensor, indices apart."""
        return {
            name: self.folder.headers[p.name].dtype
            for group in self.packed.values()
            for p in group
            for name in p.canonical
            if not self.architecture.is_index(p)
        }

    @property
    def params(self) -> int:
        """Elements of the tensors that the stock model declares as parameters, shared storage counted once."""
        described = {p.name for group in self.packed.values() for p in group if not self.architecture.is_index(p)}
        names = described.union(self._on_disk_as_is(self.architecture.unmapped).values())
        return sum(self.folder.headers[name].elements for name in names)

    def read(self, place: Block, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Canonical tensors of one place, checked to be finite.

        Args:
            place: block index, or None for the stem.
            names: canonical names wanted; all of the place when omitted.
        """
        wanted = None if names is None else set(names)
        group = [p for p in self.packed[place] if wanted is None or wanted.intersection(p.canonical)]
        found = dict(self.folder.read(p.name for p in group))
        result: dict[str, Tensor] = {}
        for packed in group:
            require_finite(packed.name, found[packed.name])
            result.update(packed.unpack(found[packed.name], self.architecture.shapes))
        return result if wanted is None else {name: result[name] for name in result if name in wanted}


def _require_so_many_blocks(folder: Folder, family: Family | None) -> None:
    """Refuse a configuration with more blocks than there are tensors, before the stock class builds them all."""
    key = (family or load_family(str(folder.config.get("model_type")))).sizes.get("blocks")
    said = folder.config.get(str(key))
    if isinstance(said, int) and said > len(folder.headers):
        found = f"it asks for {said} blocks, and the files hold {len(folder.headers)} tensors"
        refuse("bad-config", f"{CONFIG} of {str(folder.path)!r}", found, "fetch the checkpoint again")


def require_finite(name: str, tensor: Tensor, hint: str = "the checkpoint is damaged or its training diverged") -> None:
    """Refuse a tensor with NaN or infinity, naming it."""
    if not tensor.numel() or not tensor.is_floating_point():
        return
    extremes = torch.stack(torch.aminmax(tensor))  # one pass, no copy in another type; NaN comes through
    if not torch.isfinite(extremes).all():
        bad = int((~torch.isfinite(tensor)).sum())
        refuse(
            "not-finite",
            f"tensor {name}",
            f"{bad} of its {tensor.numel()} values are NaN or infinite",
            hint,
        )
