"""A Hugging Face checkpoint folder on disk: its configuration and the headers of its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import near, refuse
from secateur.families import Sizes
from secateur.families.packing import Shape
from secateur.families.resizing import sizes_of

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WEIGHT_DTYPES: Final = ("F64", "F32", "F16", "BF16")
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
RECORD: Final = "secateur.json"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_MAX_JSON: Final = 64 * 2**20  # bytes; no honest config or index comes near


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    name: str
    file: str
    dtype: str
    shape: Shape

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


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

    Args:
        path: the folder.

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
        self.weight_map = self._weight_files()

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
        if (self.path / INDEX).is_file():
            weight_map = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                refuse("bad-index", INDEX, "no weight_map in it", "fetch the checkpoint again")
            for name in set(weight_map.values()):
                if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
                    refuse("bad-index", INDEX, f"file name {name!r} leaves the folder")
                if not (self.path / name).is_file():
                    refuse("missing-file", INDEX, f"{name} is not in the folder", "fetch the checkpoint again")
            return weight_map
        if (self.path / "model.safetensors").is_file():
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
        return ["model.safetensors"] if self.weight_map is None else sorted(set(self.weight_map.values()))

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """Header of every tensor, by its name on disk, in the order of the files."""
        found: dict[str, TensorHeader] = {}
        for file in self.files:
            with self._open(file) as handle:
                for name in handle.keys():  # noqa: SIM118  (not a mapping)
                    if self.weight_map is not None and self.weight_map.get(name) != file:
                        continue
                    view = handle.get_slice(name)
                    dtype = view.get_dtype()
                    if dtype not in DTYPES:
                        refuse("dtype", f"tensor {name}", f"data type {dtype}", "dequantise the checkpoint first")
                    found[name] = TensorHeader(name, file, dtype, tuple(view.get_shape()))
        absent = set(self.weight_map or ()) - set(found)
        if absent:
            refuse("missing-tensor", INDEX, f"{min(absent)} is in the index but in no file")
        return found

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        return sum((self.path / name).stat().st_size for name in self.files)

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
        by_file: dict[str, list[str]] = {}
        for name in names:
            header = self.headers.get(name)
            if header is None:
                refuse("missing-tensor", f"tensor {name}", "it is in no file", near(name, self.headers))
            by_file.setdefault(header.file, []).append(name)
        for file, members in by_file.items():
            with self._open(file) as handle:
                for name in members:
                    yield name, handle.get_tensor(name)


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
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        refuse(
            "not-a-language-model",
            f"model of type {kind}",
            f"its class is {', '.join(architectures)}",
            "Secateur prunes causal language models",
        )
