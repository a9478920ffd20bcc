"""The picture of the stage `throughput`."""

from pathlib import Path

from benchmark.race import OUT_OF_MEMORY, Row
from errors import UserError, optional, place
from files import write_whole


def check_picture(path: Path, name: str) -> None:
    """UserError unless a picture can be drawn into such a file; `name` is the flag that asks for it."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{name} {place(path)}: pictures are .png, .svg or .pdf files")
    optional("matplotlib")


def draw(rows: list[Row], file: Path) -> None:
    """Tokens per second over the batch; a cross where memory ran out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    lines: dict[str, dict[int, Row]] = {}
    for row in sorted((row for row in rows if "batch" in row), key=lambda row: row["batch"]):
        lines.setdefault(f"{row['shape']}, {row['dtype']}: {row['what']}", {})[row["batch"]] = row
    for label, points in lines.items():
        speeds = {batch: row["tokens_per_s"] for batch, row in points.items() if "tokens_per_s" in row}
        [line] = axis.plot(list(speeds), list(speeds.values()), "o-", label=label)
        failed = [batch for batch, row in points.items() if row.get("failed") == OUT_OF_MEMORY]
        height = max(speeds.values(), default=0)
        axis.plot(failed, [height] * len(failed), "X", color=line.get_color(), markersize=10)
    axis.set(xlabel="batch (X: out of memory)", ylabel="tokens/s", ylim=(0, None))
    axis.set_xscale("log", base=2)
    axis.legend()
    write_whole(file, lambda out: figure.savefig(out, dpi=110, format=file.suffix[1:]))
    plt.close(figure)
