"""Models larger than the machine: previews from headers, data-free prunes in bounded memory, and what was foretold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import (
    GIB,
    MIB,
    Goal,
    Result,
    conditions,
    llama_config,
    make_cold,
    measure,
    parser,
    record,
    secateur,
    work_folder,
    write_checkpoint,
    write_ids,
)

RATIO, WITHIN = 0.25, 0.25
SHAPES: Mapping[str, tuple[int, int, int, int]] = {
    "110M": (768, 12, 12, 3072),
    "1B": (2048, 22, 32, 5632),
    "3B": (3200, 26, 32, 8640),
    "13B": (5120, 40, 40, 13824),
    "70B": (8192, 80, 64, 28672),
}
VOCABULARY, GROUPS = 32000, 8
TOKENS = {"110M": (16, 512), "1B": (8, 256), "3B": (8, 128)}


def config_of(name: str, blocks: int | None = None, small: bool = False) -> dict[str, Any]:
    """``config.json`` of a shape; 70 B has 8 key/value heads, as Llama-2's."""
    hidden, layers, heads, ffn = (256, 4, 8, 768) if small else SHAPES[name]
    vocabulary = 512 if small else VOCABULARY
    found = llama_config(hidden, blocks or layers, heads, ffn, vocabulary, 2048, "bfloat16")
    return {**found, "num_key_value_heads": GROUPS} if name == "70B" else found


def write_sparse(folder: Path, config: Mapping[str, Any]) -> int:
    """A checkpoint whose headers are right and whose weights are holes: it takes no disk and reads as zeros."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from secateur.checkpoints.headers import FileHeader, TensorHeader

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(dict(config)))
    files: dict[str, list[TensorHeader]] = {}
    for name, parameter in model.named_parameters():
        block = name.split(".")[2] if name.startswith("model.layers.") else "stem"
        file = f"model-{block}.safetensors"
        files.setdefault(file, []).append(TensorHeader(name, file, "BF16", tuple(parameter.shape)))
    total, weight_map = 0, {}
    for file, headers in files.items():
        start = FileHeader.of(headers)
        with (folder / file).open("wb") as handle:
            handle.write(start.text)
            handle.truncate(start.bytes)
        total += start.bytes
        weight_map.update({header.name: file for header in headers})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def magnitude(model: Path, output: Path) -> list[str]:
    """The prune of the large ones."""
    return secateur(
        "prune", model, "-o", output, "--method", "magnitude", "--ratio", str(RATIO), "--device", "cpu", "--json"
    )


def previewed(command: list[str]) -> tuple[dict[str, Any], float]:
    """What the preview of a prune says, and seconds of its process."""
    run = measure([("preview" if word == "prune" else word) for word in command])
    return run.json, run.seconds


def preview_70b(small: bool, work: Path | None) -> Result:
    """All 80 blocks, from headers."""
    where = conditions()
    with work_folder(work) as folder:
        size = write_sparse(folder / "model", config_of("70B", small=small))
        said, seconds = previewed(magnitude(folder / "model", folder / "out"))
    return Result(
        "big_preview",
        "a 70 B shape from its headers",
        where,
        [Goal(f"`preview` of {size / GIB:.0f} GiB, process included", "< 20 s", f"{seconds:.1f} s", seconds < 20)],
        {"peak_foretold_mib": said["peak_bytes"] // MIB, "seconds_foretold": said["seconds"], **said["achieved"]},
        ["files of the right size and headers whose weights are holes"],
    )


def stream(name: str, blocks: int | None, small: bool, work: Path | None) -> Result:
    """A data-free prune of a large shape, whole or some of its blocks: memory depends on the stem and one block."""
    where, config = conditions(), config_of(name, blocks, small)
    layers = config["num_hidden_layers"]
    with work_folder(work) as folder:
        size = write_sparse(folder / "model", config)
        free, needed = shutil.disk_usage(folder).free, int(size * (1 - RATIO)) + 2 * GIB
        if free < needed and not small:
            raise SystemExit(
                f"{needed / GIB:.0f} GiB of free disk needed, {free / GIB:.0f} GiB free; --blocks takes fewer"
            )
        command = magnitude(folder / "model", folder / "out")
        said, _ = previewed(command)
        run = measure(command)
    assert run.peak_anonymous is not None
    told, peak = said["peak_bytes"], run.peak_anonymous
    what = f"`magnitude --ratio {RATIO}` of {layers} blocks of {name} ({size / GIB:.0f} GiB)"
    return Result(
        f"big_{name.lower()}",
        f"{layers} blocks of a {name} shape, data-free",
        where,
        [
            Goal(f"{what}, peak anonymous memory", "<= 4 GiB", f"{peak / GIB:.2f} GiB", peak <= 4 * GIB),
            foretold(f"{name}, {layers} blocks, `magnitude`: peak memory", told / MIB, peak / MIB, "MiB"),
        ],
        {"seconds": round(run.json["seconds"], 1), "seconds_foretold": said["seconds"], "phases_s": run.phases},
        [
            "the stem and every block have the size of the whole model's; weights are zeros, from holes in the files",
            "the output is written in full",
        ],
    )


def foretold(what: str, told: float, found: float, unit: str) -> Goal:
    """A prediction beside what came."""
    return Goal(
        f"{what}, foretold / measured",
        "0.75 to 1.25",
        f"{told / found:.2f} ({told:,.0f} / {found:,.0f} {unit})",
        abs(told / found - 1) <= WITHIN,
    )


def predictions(name: str, small: bool, work: Path | None) -> Result:
    """What preview foretells of a data-free and of two calibrated prunes."""
    where, goals, figures = conditions(), [], {}
    windows, length = (8, 64) if small else TOKENS[name]
    with work_folder(work) as folder:
        config = config_of(name, small=small)
        write_checkpoint(folder / "model", config)
        data = write_ids(folder / "ids.npy", config["vocab_size"], windows, length)
        more = ["--data", str(data), "--samples", str(windows), "--length", str(length)]
        for method in ("magnitude", "fasp", "slicegpt"):
            command = magnitude(folder / "model", folder / "out")
            command[command.index("magnitude")] = method
            command += more if method != "magnitude" else []
            make_cold(folder / "model")
            said, _ = previewed(command)
            run = measure(command)
            shutil.rmtree(folder / "out")
            assert run.peak_anonymous is not None
            goals.append(
                foretold(f"{name} `{method}`: peak memory", said["peak_bytes"] / MIB, run.peak_anonymous / MIB, "MiB")
            )
            goals.append(foretold(f"{name} `{method}`: seconds", said["seconds"], run.json["seconds"], "s"))
            figures[method] = {"phases_s": run.phases}
    notes = [
        f"{windows} x {length} tokens for the calibrated ones; bfloat16 weights, float32 compute; preview just before"
    ]
    return Result(
        f"big_foretold_{name.lower()}", f"preview against the run, {name} shape", where, goals, figures, notes
    )


def main() -> None:
    """Part by part."""
    parts = ("preview", "70B", "13B", "110M", "1B", "3B")
    options = parser(__doc__ or "")
    options.add_argument("--parts", nargs="*", choices=parts, default=parts, help="all when omitted")
    options.add_argument("--blocks", type=int, default=8, help="of the 80 blocks of the 70 B shape that are pruned")
    arguments = options.parse_args()
    small, work = arguments.small, arguments.work
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    for part in arguments.parts:
        if part == "preview":
            record(preview_70b(small, work), small)
        elif part in ("70B", "13B"):
            record(stream(part, arguments.blocks if part == "70B" else None, small, work), small)
        else:
            record(predictions(part, small, work), small)


if __name__ == "__main__":
    main()
