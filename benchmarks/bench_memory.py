"""Calibrated prunes of a 1.3 B Llama shape in bfloat16: peak anonymous memory of the command."""

from __future__ import annotations

from pathlib import Path

from common import (
    GIB,
    MIB,
    Goal,
    Result,
    conditions,
    llama_config,
    measure,
    parser,
    record,
    secateur,
    work_folder,
    write_checkpoint,
    write_ids,
)

RATIO = 0.25
METHODS = ("slicegpt", "fasp")


def measured(method: str, windows: int, small: bool, work: Path | None) -> Result:
    """One process of the command line, watched from outside."""
    windows, length = (8, 64) if small else (windows, 2048)
    hidden, layers, heads, ffn, vocab = (64, 2, 4, 160, 512) if small else (2048, 24, 16, 5504, 32000)
    where = conditions()
    with work_folder(work, 12 * GIB) as folder:
        config = llama_config(hidden, layers, heads, ffn, vocab, 2048, "bfloat16")
        size = write_checkpoint(folder / "model", config)
        data = write_ids(folder / "ids.npy", vocab, windows, length)
        command = secateur(
            "prune", folder / "model", "-o", folder / "pruned", "--method", method, "--ratio", str(RATIO)
        )
        command += [
            "--data",
            str(data),
            "--samples",
            str(windows),
            "--length",
            str(length),
            "--device",
            "cpu",
            "--json",
        ]
        run = measure(command)
    assert run.peak_anonymous is not None
    allowed = size // 3 + 2 * GIB
    return Result(
        "memory" if method == "slicegpt" else f"memory_{method}",
        "memory of a calibrated prune, 1.3 B parameters",
        where,
        [
            Goal(
                f"`{method} --ratio {RATIO}` over {windows} x {length} tokens, peak anonymous memory",
                f"<= checkpoint / 3 + 2 GiB = {allowed / MIB:,.0f} MiB",
                f"{run.peak_anonymous / MIB:,.0f} MiB",
                run.peak_anonymous <= allowed,
            )
        ],
        {
            "checkpoint_mib": round(size / MIB),
            "peak_as_the_command_reports_mib": round(run.json["peak_rss_bytes"] / MIB),
            "wall_s": round(run.seconds, 1),
            "phases_s": run.phases,
        },
        [
            f"hidden {hidden}, {layers} layers, {heads} heads, ffn {ffn}, vocabulary {vocab}, bfloat16 weights, "
            "float32 compute, random weights and token ids",
            "RssAnon of the process, read from outside every 10 ms; pages of mapped files are not in it",
        ],
    )


def main() -> None:
    """Method by method."""
    options = parser(__doc__ or "")
    options.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="all when omitted")
    options.add_argument("--windows", type=int, default=16, help="of 2048 tokens each")
    arguments = options.parse_args()
    for method in arguments.methods:
        record(measured(method, arguments.windows, arguments.small, arguments.work), arguments.small)


if __name__ == "__main__":
    main()
