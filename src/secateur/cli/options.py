"""The options of the commands: each is spelled once, and so is every list of them that commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, get_args

import typer

from secateur.errors import RequestError

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="checkpoint folder or hub id")]
ModelOrRecipeArg = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="checkpoint folder or hub id; may stand in the recipe")
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
MethodOption = Annotated[str | None, typer.Option("--method", help="see: secateur methods")]
RatioOption = Annotated[str | None, typer.Option("--ratio", help="share of all parameters to remove, e.g. 0.3")]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="K=V",
        help="what remains: params, block_params, bytes, flops, kv_bytes, latency or activation",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="calibration text: file, folder, hub data set, - for stdin; of embeddings, pairs"),
]
SamplesOption = Annotated[int | None, typer.Option("--samples", help="calibration windows [default: 128]")]
LengthOption = Annotated[int | None, typer.Option("--length", help="tokens of a window [default: min(2048, context)]")]
FieldOption = Annotated[
    str | None, typer.Option("--text-field", help="field of .jsonl, .parquet, data sets [default: text]")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="k=v", help="option of the method")]
LayoutOption = Annotated[str | None, typer.Option("--layout", help="native or per-layer [default: native]")]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="dense, or bitmask: zeros take no bytes [default: dense]")
]
TextOption = Annotated[str | None, typer.Option("--text", help="held-out text for the perplexity")]
TextsOption = Annotated[
    list[str] | None, typer.Option("--text", help="held-out text for the perplexity; may be given several times")
]
PairsOption = Annotated[
    str | None, typer.Option("--pairs", help="scored sentence pairs (.jsonl), for the rank correlation of embeddings")
]
ContextOption = Annotated[int | None, typer.Option("--context", help="tokens of a perplexity window")]
QuantumOption = Annotated[int | None, typer.Option("--quantum", help="sizes are multiples of it")]
ToleranceOption = Annotated[float | None, typer.Option("--tolerance", help="largest accepted gap to the target")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ... [default: auto]")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="compute type [default: auto]")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="of everything random [default: 0]")]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="YAML file with these options")]
RemoteOption = Annotated[bool, typer.Option("--trust-remote-code", help="let the folder's own code run")]
ForceOption = Annotated[bool, typer.Option("--force", help="move an existing output aside first")]
OutputOption = Annotated[str | None, typer.Option("-o", "--output", metavar="OUT", help="folder to write")]

Options = Mapping[str, Any]
"""Annotated types by the name of the keyword."""

_DATA: Final[Options] = {
    "data": DataOption,
    "samples": SamplesOption,
    "length": LengthOption,
    "text_field": FieldOption,
}
_MEASURE: Final[Options] = {"text": TextOption, "context": ContextOption}
_SIZES: Final[Options] = {"quantum": QuantumOption, "tolerance": ToleranceOption}
_MACHINE: Final[Options] = {"device": DeviceOption, "dtype": DtypeOption, "seed": SeedOption}
_LAST: Final[Options] = {"trust_remote_code": RemoteOption, "force": ForceOption, "as_json": JsonOption}

PRUNE: Final[Options] = {
    "model": ModelOrRecipeArg,
    "output": OutputOption,
    "method": MethodOption,
    "ratio": RatioOption,
    "target": TargetOption,
    **_DATA,
    "set_": SetOption,
    "layout": LayoutOption,
    "format": FormatOption,
    **_MEASURE,
    "pairs": PairsOption,
    **_SIZES,
    **_MACHINE,
    "recipe": RecipeOption,
    **_LAST,
}
COMPARE: Final[Options] = {
    "model": ModelArg,
    "output": OutputOption,
    "methods": Annotated[
        str, typer.Option("--methods", metavar="A,B:k=v,...", help="names, with options after colons")
    ],
    "ratio": Annotated[str, typer.Option("--ratio", help="shares of all parameters to remove")],
    **_DATA,
    "set_": Annotated[
        list[str] | None, typer.Option("--set", metavar="METHOD.k=v", help="option of one of the methods")
    ],
    "layout": Annotated[str | None, typer.Option("--layout", help="native, per-layer or both [default: both]")],
    **_MEASURE,
    **_SIZES,
    **_MACHINE,
    "keep": Annotated[bool, typer.Option("--keep", help="keep the pruned models")],
    "cluster": Annotated[str | None, typer.Option("--cluster", help="ray: spread the cells over a Ray cluster")],
    **_LAST,
}
RECOVER: Final[Options] = {
    "model": ModelOrRecipeArg,
    "output": OutputOption,
    "teacher": Annotated[str | None, typer.Option("--teacher", metavar="MODEL2", help="uncut model to learn from")],
    "method": Annotated[str | None, typer.Option("--method", help="lora or full [default: lora]")],
    "data": Annotated[str | None, typer.Option("--data", help="text to train on: file, folder, hub data set, -")],
    "steps": Annotated[int | None, typer.Option("--steps", help="updates [default: 300]")],
    "epochs": Annotated[float | None, typer.Option("--epochs", help="passes over the data, instead of --steps")],
    "minutes": Annotated[float | None, typer.Option("--minutes", help="stop training by then")],
    "samples": Annotated[int | None, typer.Option("--samples", help="windows to use [default: as the steps need]")],
    "length": LengthOption,
    "text_field": FieldOption,
    "set_": Annotated[list[str] | None, typer.Option("--set", metavar="k=v", help="see: docs/recover.md")],
    **_MEASURE,
    **_MACHINE,
    "recipe": RecipeOption,
    **_LAST,
}
DELTA: Final[Options] = {
    "base": Annotated[str, typer.Argument(metavar="BASE", help="the model that was fine-tuned: folder or hub id")],
    "tuned": Annotated[str, typer.Argument(metavar="TUNED", help="the fine-tune: checkpoint or adapter folder")],
    "output": Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="the delta, e.g. fine.delta")],
    "method": Annotated[
        str | None,
        typer.Option("--method", help="dare, darex_q, magnitude, wanda or structural [default: darex_q with data]"),
    ],
    "ratio": Annotated[str | None, typer.Option("--ratio", help="share of the delta's entries to drop [default: 0.9]")],
    **_DATA,
    "samples": Annotated[int | None, typer.Option("--samples", help="calibration windows [default: 32]")],
    "set_": Annotated[list[str] | None, typer.Option("--set", metavar="k=v", help="see: docs/methods/darex.md")],
    **_MACHINE,
    **_LAST,
}


def takes(options: Options, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, a function of keywords, these options; what is not given is None or False, or as named here."""

    def default(name: str, kind: Any) -> Any:
        value = get_args(kind)[0]
        left_out = False if value is bool else None if NoneType in get_args(value) else Parameter.empty
        return defaults.get(name, left_out)

    def give(command: Callable[..., None]) -> Callable[..., None]:
        parameters = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default(name, kind), annotation=kind)
            for name, kind in options.items()
        ]
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = dict(options)
        return command

    return give


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """``--set k=v`` pairs as a mapping; the schema reads and checks the values."""
    found: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise RequestError("bad-option", f"--set {pair!r}", "not of the form key=value", "e.g. --set spaces=kv")
        found[key.strip()] = value.strip()
    return found


def request_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the API from those of the command line; what was not given is left out."""
    given = {key: value for key, value in values.items() if key not in ("model", "as_json", "set_")}
    given["options"] = _options(values["set_"])
    given["target"] = tuple(values.get("target") or ())
    return {key: value for key, value in given.items() if value is not None and value is not False and value != ()}
