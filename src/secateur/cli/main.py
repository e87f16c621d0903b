"""``secateur``: every command parses, calls the Python API once, and shows what came back.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.errors import InternalError, RequestError, SecateurError
from secateur.version import __version__

app = typer.Typer(
    name="secateur",
    help="Make trained neural networks smaller. The result loads in plain transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
        "--target", metavar="K=V", help="what remains: params, block_params, bytes, flops, kv_bytes or latency"
    ),
]
DataOption = Annotated[
    str | None, typer.Option("--data", help="calibration text: file, folder, hub data set, - for stdin")
]
SamplesOption = Annotated[int | None, typer.Option("--samples", help="calibration windows [default: 128]")]
LengthOption = Annotated[int | None, typer.Option("--length", help="tokens of a window [default: min(2048, context)]")]
FieldOption = Annotated[
    str | None, typer.Option("--text-field", help="field of .jsonl, .parquet, data sets [default: text]")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="k=v", help="option of the method")]
LayoutOption = Annotated[str | None, typer.Option("--layout", help="native or per-layer [default: native]")]
TextOption = Annotated[str | None, typer.Option("--text", help="held-out text for the perplexity")]
TextsOption = Annotated[
    list[str] | None, typer.Option("--text", help="held-out text for the perplexity; may be given several times")
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


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Make trained neural networks smaller."""
    if version:
        print(__version__)
        raise typer.Exit


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """``--set k=v`` pairs as a mapping; values are read as YAML scalars, the schema checks them."""
    found: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise RequestError("bad-option", f"--set {pair!r}", "not of the form key=value", "e.g. --set spaces=kv")
        found[key.strip()] = None if value.lower() == "none" else value.strip()
    return found


def _request(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the API from those of the command line; what was not given is left out."""
    given = {key: value for key, value in values.items() if key not in ("model", "as_json", "set_")}
    given["options"] = _options(values["set_"])
    given["target"] = tuple(values.get("target") or ())
    return {key: value for key, value in given.items() if value is not None and value is not False and value != ()}


@app.command()
def prune(
    model: ModelOrRecipeArg = None,
    output: OutputOption = None,
    method: MethodOption = None,
    ratio: RatioOption = None,
    target: TargetOption = None,
    data: DataOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    text_field: FieldOption = None,
    set_: SetOption = None,
    layout: LayoutOption = None,
    text: TextOption = None,
    context: ContextOption = None,
    quantum: QuantumOption = None,
    tolerance: ToleranceOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = None,
    recipe: RecipeOption = None,
    trust_remote_code: RemoteOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prune MODEL and write a checkpoint that plain transformers loads."""
    values = _request(locals())
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_prune

    with ConsoleProgress() as progress:
        result = api.prune(model, progress=progress, **values)
    print(f"# recipe of this run\n{result.recipe}", end="", file=sys.stderr)
    _show(result.as_dict(), as_json, show_prune)


@app.command()
def recover(
    model: ModelOrRecipeArg = None,
    output: OutputOption = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL2", help="uncut model to learn from")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="lora or full [default: lora]")] = None,
    data: Annotated[str | None, typer.Option("--data", help="text to train on: file, folder, hub data set, -")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="updates [default: 300]")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="passes over the data, instead of --steps")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="stop training by then")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="windows to use [default: as the steps need]")
    ] = None,
    length: LengthOption = None,
    text_field: FieldOption = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="k=v", help="see: docs/recover.md")] = None,
    text: TextOption = None,
    context: ContextOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = None,
    recipe: RecipeOption = None,
    trust_remote_code: RemoteOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a cut MODEL for a while (LoRA, full or from a teacher) and write the same kind of checkpoint."""
    values = _request(locals())
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_recover

    with ConsoleProgress() as progress:
        result = api.recover(model, progress=progress, **values)
    _show(result.as_dict(), as_json, show_recover)


def _with_options_of_prune(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the arguments of ``prune``."""
    command.__signature__ = signature(prune, eval_str=True)  # type: ignore[attr-defined]
    command.__annotations__ = dict(prune.__annotations__)
    return command


@app.command()
@_with_options_of_prune
def preview(model: str | None, as_json: bool, **values: Any) -> None:
    """Show what prune would do, from headers only, and every problem at once."""
    values = _request(values)
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_preview

    with ConsoleProgress() as progress:
        result = api.preview(model, progress=progress, **values)
    problems = result["problems"]
    if problems and as_json:
        _print_json({**result, "error": problems[0]})
    else:
        _show(result, as_json, show_preview)
    if problems:
        raise typer.Exit(2)


@app.command()
def evaluate(
    model: ModelArg,
    text: TextsOption = None,
    context: ContextOption = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL2", help="measure another beside it")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="lm-eval tasks, task files or folders of them, separated by commas")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure MODEL: perplexity, parameters, bytes, FLOPs, speed."""
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_evaluate

    with ConsoleProgress() as progress:
        result = api.evaluate(
            model,
            text=text or (),
            context=context,
            against=against,
            tasks=[name for name in (tasks or "").split(",") if name],
            device=device or "auto",
            dtype=dtype or "auto",
            progress=progress,
        )
    _show(result, as_json, show_evaluate)


@app.command()
def compare(
    model: ModelArg,
    output: OutputOption = None,
    methods: Annotated[
        str, typer.Option("--methods", metavar="A,B:k=v,...", help="names, with options after colons")
    ] = "all-structured",
    ratio: Annotated[str, typer.Option("--ratio", help="shares of all parameters to remove")] = "0.1,0.2,0.3",
    data: DataOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    text_field: FieldOption = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="METHOD.k=v", help="option of one of the methods")
    ] = None,
    layout: Annotated[str | None, typer.Option("--layout", help="native, per-layer or both [default: both]")] = None,
    text: TextOption = None,
    context: ContextOption = None,
    quantum: QuantumOption = None,
    tolerance: ToleranceOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = None,
    keep: Annotated[bool, typer.Option("--keep", help="keep the pruned models")] = False,
    trust_remote_code: RemoteOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prune MODEL with several methods and judge them at equal size: one table, Pareto plots, a report."""
    values = _request(locals())
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_compare

    with ConsoleProgress() as progress:
        result = api.compare(model, progress=progress, **values)
    failed = [cell for cell in result["cells"] if cell["state"] == "failed"]
    if not failed:
        _show(result, as_json, show_compare)
        return
    asked = f"{len(failed)} of {len(result['cells'])} cells of the comparison"
    hint = "the same command runs them again"
    error = InternalError("failed-cells", asked, f"failed, the first with: {failed[0]['why']}", hint)
    _show({**result, "error": error.as_dict()}, as_json, show_compare)
    print(f"secateur: {error}", file=sys.stderr)
    raise typer.Exit(1)


@app.command()
def export(
    model: ModelArg,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="NAME.gguf or NAME.onnx")],
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, float16, bfloat16")] = "auto",
    no_check: Annotated[bool, typer.Option("--no-check", help="do not run the file in its runtime")] = False,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="a GGUF file that takes token ids")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL for llama.cpp or onnxruntime, and check there that it computes the same."""
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_export

    with ConsoleProgress() as progress:
        result = api.export(
            model,
            output,
            dtype=dtype,
            check=not no_check,
            tokenizer=not no_tokenizer,
            force=force,
            progress=progress,
        )
    _show(result, as_json, show_export)


@app.command()
def pack(
    model: ModelArg,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="the archive, e.g. small.bitsback")],
    form: Annotated[str, typer.Option("--form", help="triangular, or square as published")] = "triangular",
    no_check: Annotated[bool, typer.Option("--no-check", help="do not run what comes out of the archive")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL, whose stream was sliced, as one file that spends no bits on its basis."""
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_pack

    with ConsoleProgress() as progress:
        result = api.pack(model, output, form=form, check=not no_check, force=force, progress=progress)
    _show(result, as_json, show_pack)


@app.command()
def unpack(
    archive: Annotated[str, typer.Argument(metavar="FILE", help="what secateur pack wrote")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="folder to write")],
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the checkpoint folder that an archive holds."""
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_unpack

    with ConsoleProgress() as progress:
        result = api.unpack(archive, output, force=force, progress=progress)
    _show(result, as_json, show_unpack)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one method, with its options")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the methods, or describe one."""
    from secateur import api
    from secateur.cli.console import show_methods

    _show(api.methods(name), as_json, show_methods)


@app.command()
def families(as_json: JsonOption = False) -> None:
    """List the architectures and what can be cut in each."""
    from secateur import api
    from secateur.cli.console import show_families

    _show(api.families(), as_json, show_families)


@app.command()
def inspect(
    model: ModelArg,
    write_family: Annotated[
        str | None, typer.Option("--write-family", metavar="FILE", help="write the family file that describes MODEL")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the sizes of MODEL, its spaces and what each costs."""
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_inspect

    with ConsoleProgress() as progress:
        result = api.inspect(model, write_family=write_family, progress=progress)
    _show(result, as_json, show_inspect)


@app.command()
def demo(
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="folder for the results")
    ] = "secateur-demo",
    as_json: JsonOption = False,
) -> None:
    """Prune the embedded model with several methods and print a table."""
    from secateur.cli.console import ConsoleProgress, show_demo
    from secateur.demo import run_demo

    with ConsoleProgress() as progress:
        result = run_demo(Path(output), progress)
    _show(result, as_json, show_demo)


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2, default=str))


def _show(content: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    if as_json:
        _print_json(content)
    else:
        show(content)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and turns every failure into its message and exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    try:
        code = app(words, prog_name="secateur", standalone_mode=False)
        if code == 130:  # what typer makes of an interrupt inside a command
            raise KeyboardInterrupt
    except SecateurError as error:
        code = _fail(error.as_dict(), str(error), error.exit_code, as_json)
    except (KeyboardInterrupt, typer.Abort):
        message = "interrupted; the same command resumes"
        code = _fail({"code": "interrupted", "asked": "", "found": message, "hint": ""}, message, 130, as_json)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line
            message = error.format_message()
            content = {"code": "usage", "asked": " ".join(words), "found": message, "hint": "see: secateur --help"}
            code = _fail(content, f"{message} See: secateur --help", 2, as_json)
        else:
            if os.environ.get("SECATEUR_DEBUG"):
                raise
            found = f"{type(error).__name__}: {error}"
            hint = "set SECATEUR_DEBUG=1 for the traceback"
            content = {"code": "internal", "asked": " ".join(words), "found": found, "hint": hint}
            code = _fail(content, f"{found} ({hint})", 1, as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(content: dict[str, str], message: str, code: int, as_json: bool) -> int:
    if as_json:
        _print_json({"error": content})
    print(f"secateur: {message}", file=sys.stderr)
    return code
