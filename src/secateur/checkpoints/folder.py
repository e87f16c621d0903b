"""A Hugging Face checkpoint folder on disk: its configuration and the headers of its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.checkpoints.headers import DTYPES as DTYPES
from secateur.checkpoints.headers import WEIGHT_DTYPES as WEIGHT_DTYPES
from secateur.checkpoints.headers import FileHeader
from secateur.checkpoints.headers import TensorHeader as TensorHeader
from secateur.checkpoints.packed import (
    MODEL,
    PACKED,
    Stored,
    dense_tensors,
    packed_tensors,
    plain_file_name,
    read_stored,
)
from secateur.errors import near, refuse
from secateur.families import Sizes, family_names, load_family
from secateur.families.resizing import sizes_of
from secateur.families.stock import base_class, is_headless

_SINGLE: Final = ".safetensors"
_INDEX: Final = ".safetensors.index.json"
INDEX: Final = MODEL + _INDEX
PACKED_INDEX: Final = PACKED + _INDEX
CONFIG: Final = "config.json"
RECORD: Final = "secateur.json"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_MAX_JSON: Final = 64 * 2**20  # bytes; no honest config or index comes near


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; anything else is refused by name."""
    asked = f"reading {path.name}"
    try:
        if path.stat().st_size > _MAX_JSON:
            refuse("bad-json", asked, f"{path} has more than {_MAX_JSON} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        refuse("bad-json", asked, f"{path} is not valid JSON ({error})", "fetch the checkpoint again")
    if not isinstance(content, dict):
        refuse("bad-json", asked, f"{path} holds a {type(content).__name__}, not an object")
    return content


class Folder:
    """The files of a checkpoint, opened for reading one tensor at a time.

    Packed weight files are unpacked on the way: names, files, data types, shapes and values are those of the
    checkpoint that was packed. Where both kinds are there, the dense files count, as for transformers.

    Args:
        path: the folder.

    Attributes:
        is_packed: whether its weight files are packed.

    Raises:
        RequestError: the folder is missing, is no language-model checkpoint Secateur can read, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            found = "it is a file" if path.exists() else "there is no such folder"
            refuse("no-model", f"model {str(path)!r}", found, "name a folder with config.json and safetensors files")
        if not (path / CONFIG).is_file():
            refuse("not-a-model", f"model {str(path)!r}", f"the folder has no {CONFIG}", "name a checkpoint folder")
        self.config = read_json(path / CONFIG)
        _refuse_unsupported(self.config)
        self.layers = self._layers()
        dense = any((path / name).is_file() for name in (INDEX, MODEL + _SINGLE))
        self.is_packed = not dense and any((path / name).is_file() for name in (PACKED_INDEX, PACKED + _SINGLE))
        self._kind = PACKED if self.is_packed else MODEL
        self.weight_map = self._weight_files()
        self._states = self._state_of_files()

    def _layers(self) -> Sizes | None:
        """Sizes of a checkpoint whose layers differ; None for one that is what its configuration says."""
        if "modeling_secateur" not in str(self.config.get("auto_map")):
            return None
        if not (self.path / RECORD).is_file():
            refuse(
                "no-record", f"model {str(self.path)!r}", f"its layers differ, and {RECORD}, which says how, is missing"
            )
        try:
            return sizes_of(read_json(self.path / RECORD)["resize"]["sizes"])
        except (KeyError, TypeError) as error:
            refuse("bad-record", f"reading {RECORD}", f"it does not say how the layers differ ({error!r})")

    def _weight_files(self) -> dict[str, str] | None:
        """File of every tensor as the index says; None for a single file."""
        index = self._kind + _INDEX
        if (self.path / index).is_file():
            weight_map = read_json(self.path / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                refuse("bad-index", index, "no weight_map in it", "fetch the checkpoint again")
            for name in sorted(map(str, weight_map.values())):
                if not plain_file_name(name):
                    refuse("bad-index", index, f"file name {name!r} leaves the folder")
                if not (self.path / name).is_file():
                    refuse("missing-file", index, f"{name} is not in the folder", "fetch the checkpoint again")
            return weight_map
        if (self.path / (self._kind + _SINGLE)).is_file():
            return None
        pickles = sorted(p.name for pattern in _PICKLES for p in self.path.glob(pattern))
        if pickles:
            refuse(
                "pickle-only",
                f"model {str(self.path)!r}",
                f"its weights are only in {', '.join(pickles[:3])}, which is not safetensors",
                "convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
            )
        refuse("not-a-model", f"model {str(self.path)!r}", "the folder has no safetensors file")

    @property
    def files(self) -> list[str]:
        """Names of the weight files, sorted."""
        return [self._kind + _SINGLE] if self.weight_map is None else sorted(set(self.weight_map.values()))

    def _state_of_files(self) -> dict[str, tuple[int, int, int] | None]:
        """Size, time and number of every file that says what the weights are."""
        found: dict[str, tuple[int, int, int] | None] = {}
        for name in (CONFIG, RECORD, self._kind + _INDEX, *self.files):
            try:
                state = (self.path / name).stat()
            except FileNotFoundError:
                found[name] = None
            else:
                found[name] = state.st_size, state.st_mtime_ns, state.st_ino
        return found

    def require_unchanged(self) -> None:
        """Refuse a folder that somebody has written to since it was opened.

        Raises:
            RequestError: naming the file.
        """
        for name, state in self._state_of_files().items():
            if state != self._states[name]:
                found = f"{name} was written to, or taken away, while it was read"
                refuse("source-changed", f"model {str(self.path)!r}", found, "give the command again on a quiet folder")

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """How every tensor is stored, by its name, in the order of the files."""
        found: dict[str, Stored] = {}
        for file in self.files:
            with self._open(file) as handle:
                there = packed_tensors(handle, file) if self.is_packed else dense_tensors(handle, file)
            mapped = self.weight_map
            found.update((name, s) for name, s in there.items() if mapped is None or mapped.get(name) == file)
        absent = set(self.weight_map or ()) - set(found)
        if absent:
            refuse("missing-tensor", self._kind + _INDEX, f"{min(absent)} is in the index but in no file")
        return found

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """Header of every tensor, by its name, in the order of the files."""
        return {name: stored.header for name, stored in self.stored.items()}

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        return sum((self.path / name).stat().st_size for name in self.files)

    @property
    def dense_bytes(self) -> int:
        """Size that all weight files have, or would have if they were not packed."""
        if not self.is_packed:
            return self.bytes
        files = {header.file for header in self.headers.values()}
        members = [[h for h in self.headers.values() if h.file == file] for file in files]
        return sum(FileHeader.of(group).bytes for group in members)

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        path = self.path / file
        try:
            with safe_open(path, framework="pt") as handle:
                yield handle
        except (SafetensorError, OSError) as error:
            refuse(
                "bad-safetensors",
                f"reading {file}",
                f"{path} ({path.stat().st_size} bytes) is truncated or damaged ({error})",
                "fetch the file again",
            )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name on disk; files are opened once each and closed again at the end."""
        by_file: dict[str, list[Stored]] = {}
        for name in names:
            stored = self.stored.get(name)
            if stored is None:
                refuse("missing-tensor", f"tensor {name}", "it is in no file", near(name, self.headers))
            by_file.setdefault(stored.file, []).append(stored)
        for file, members in by_file.items():
            self.require_unchanged()  # of a file that is cut short while it is mapped, the process would die
            with self._open(file) as handle:
                for stored in members:
                    yield stored.header.name, read_stored(handle, stored)


def _refuse_unsupported(config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        refuse("not-a-model", CONFIG, "it has no model_type", "name a transformers checkpoint")
    if "quantization_config" in config or "compression_config" in config:
        scheme = config.get("quantization_config") or config.get("compression_config")
        name = scheme.get("quant_method", "unknown") if isinstance(scheme, dict) else "unknown"
        refuse(
            "quantised",
            f"model of type {kind}",
            f"its weights are quantised ({name})",
            "start from the unquantised checkpoint and quantise the result",
        )
    parts = [key for key in ("text_config", "vision_config", "audio_config", "llm_config") if key in config]
    if parts:
        refuse(
            "multimodal",
            f"model of type {kind}",
            f"it is a multimodal wrapper ({', '.join(parts)} in {CONFIG})",
            "extract the language model into a folder of its own",
        )
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or any(not isinstance(name, str) for name in architectures):
        refuse("bad-config", CONFIG, "architectures is not a list of names")
    known = kind in family_names()
    encoder = known and not load_family(kind).has_head
    causal = not architectures or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    if (encoder or not causal) and not (known and is_headless(config)):
        advice = "Secateur prunes causal language models, and those of the families it knows without their head"
        if encoder:
            base = base_class(kind)
            advice = f"make it a {base}: {base}.from_pretrained(folder).save_pretrained(new_folder)"
        found = f"its class is {', '.join(architectures) or 'not named'}"
        refuse("not-a-language-model", f"model of type {kind}", found, advice)
