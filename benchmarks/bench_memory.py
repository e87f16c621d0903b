"""Calibrated SliceGPT on a 1.3 B Llama shape in bfloat16: peak anonymous memory of the command."""

from __future__ import annotations

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


def main() -> None:
    """One process of the command line, watched from outside."""
    arguments = parser(__doc__ or "").parse_args()
    small = arguments.small
    windows, length = (8, 64) if small else (16, 2048)
    hidden, layers, heads, ffn, vocab = (64, 2, 4, 160, 512) if small else (2048, 24, 16, 5504, 32000)
    where = conditions()
    with work_folder(arguments.work, 8 * GIB) as work:
        config = llama_config(hidden, layers, heads, ffn, vocab, 2048, "bfloat16")
        size = write_checkpoint(work / "model", config)
        data = write_ids(work / "ids.npy", vocab, windows, length)
        command = secateur(
            "prune", work / "model", "-o", work / "pruned", "--method", "slicegpt", "--ratio", str(RATIO)
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
    record(
        Result(
            "memory",
            "memory of a calibrated prune, 1.3 B parameters",
            where,
            [
                Goal(
                    f"`slicegpt --ratio {RATIO}` over {windows} x {length} tokens, peak anonymous memory",
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
        ),
        small,
    )


if __name__ == "__main__":
    main()
