"""``secateur``: every command parses, calls the Python API once, and shows what came back.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.options import (
    COMPARE,
    DELTA,
    PRUNE,
    RECOVER,
    ContextOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    ModelArg,
    PairsOption,
    TextsOption,
    request_of,
    takes,
)
from secateur.engine.environment import place_in_environment
from secateur.errors import InternalError
from secateur.version import __version__

app = typer.Typer(
    name="secateur",
    help="Make trained neural networks smaller. The result loads in plain transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Make trained neural networks smaller."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
@takes(PRUNE)
def prune(model: str | None, as_json: bool, **values: Any) -> None:
    """Prune MODEL and write a checkpoint that plain transformers loads, or of an ONNX file a smaller one."""
    values = request_of(values)
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_prune
    from secateur.cli.networks import show_network_prune

    if place_in_environment()[0]:  # the first process tells
        api.prune(model, **values)
        return
    with ConsoleProgress() as progress:
        result = api.prune(model, progress=progress, **values)
    if result.recipe:
        print(f"# recipe of this run\n{result.recipe}", end="", file=sys.stderr)
    _show(result.as_dict(), as_json, show_network_prune if hasattr(result, "refused") else show_prune)


@app.command()
@takes(RECOVER)
def recover(model: str | None, as_json: bool, **values: Any) -> None:
    """Train a cut MODEL for a while (LoRA, full or from a teacher) and write the same kind of checkpoint."""
    values = request_of(values)
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_recover

    with ConsoleProgress() as progress:
        result = api.recover(model, progress=progress, **values)
    _show(result.as_dict(), as_json, show_recover)


@app.command()
@takes(PRUNE)
def preview(model: str | None, as_json: bool, **values: Any) -> None:
    """Show what prune would do, from headers only, and every problem at once."""
    values = request_of(values)
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_preview
    from secateur.cli.networks import show_network_preview

    with ConsoleProgress() as progress:
        result = api.preview(model, progress=progress, **values)
    problems = result["problems"]
    if problems and as_json:
        print_json({**result, "error": problems[0]})
    else:
        _show(result, as_json, show_network_preview if "refused" in result else show_preview)
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
    pairs: PairsOption = None,
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
            pairs=pairs,
            device=device or "auto",
            dtype=dtype or "auto",
            progress=progress,
        )
    _show(result, as_json, show_evaluate)


@app.command()
@takes(COMPARE, methods="all-structured", ratio="0.1,0.2,0.3")
def compare(model: str, as_json: bool, **values: Any) -> None:
    """Prune MODEL with several methods and judge them at equal size: one table, Pareto plots, a report."""
    values = request_of(values)
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
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="OUT", help="the archive, e.g. small.bitsback; of sparse, a folder")
    ],
    form: Annotated[
        str, typer.Option("--form", help="sparse (zeros take no bytes); of sliced models triangular or square")
    ] = "triangular",
    no_check: Annotated[bool, typer.Option("--no-check", help="do not run what comes out of the archive")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL in fewer bytes: its zeros (--form sparse), or as one file the basis of a sliced stream."""
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_pack, show_packed

    with ConsoleProgress() as progress:
        result = api.pack(model, output, form=form, check=not no_check, force=force, progress=progress)
    _show(result, as_json, show_packed if "packed" in result else show_pack)


@app.command()
def unpack(
    archive: Annotated[str, typer.Argument(metavar="PACKED", help="file or folder that is packed")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="folder to write")],
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the checkpoint folder that an archive or a packed folder holds."""
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_unpack

    with ConsoleProgress() as progress:
        result = api.unpack(archive, output, force=force, progress=progress)
    _show(result, as_json, show_unpack)


delta = typer.Typer(name="delta", help="Store a fine-tune as a sparse delta beside its base.", no_args_is_help=True)
app.add_typer(delta)


@delta.command("pack")
@takes(DELTA)
def delta_pack(base: str, tuned: str, output: str, as_json: bool, **values: Any) -> None:
    """Drop most of what TUNED added to BASE, and write the rest as one file."""
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_delta_pack

    with ConsoleProgress() as progress:
        result = api.delta_pack(base, tuned, output, progress=progress, **request_of(values))
    _show(result, as_json, show_delta_pack)


@delta.command("apply")
def delta_apply(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the model that the delta was made on")],
    delta: Annotated[str, typer.Argument(metavar="FILE", help="what secateur delta pack wrote")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="folder to write")],
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the checkpoint folder that BASE with a delta is."""
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_delta_apply

    with ConsoleProgress() as progress:
        result = api.delta_apply(base, delta, output, force=force, progress=progress)
    _show(result, as_json, show_delta_apply)


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
    graph: Annotated[bool, typer.Option("--graph", help="of an ONNX file: its coupled channels, each tried")] = False,
    draw: Annotated[
        str | None, typer.Option("--draw", metavar="FILE", help="of an ONNX file: its channels in colours (.svg, .dot)")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="of an ONNX file: examples of its inputs (.npz)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the sizes of MODEL, its spaces and what each costs."""
    from secateur import api
    from secateur.cli.console import ConsoleProgress, show_inspect
    from secateur.cli.networks import show_network

    with ConsoleProgress() as progress:
        result = api.inspect(model, write_family=write_family, graph=graph, draw=draw, data=data, progress=progress)
    _show(result, as_json, show_network if "format" in result else show_inspect)


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


def print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2, default=str))


def _show(content: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    if as_json:
        print_json(content)
    else:
        show(content)
