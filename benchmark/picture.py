"""The pictures of the stages `throughput` and `real`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    axis, save = _page(file)
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
    save()


def draw_real(rows: list[Row], file: Path) -> None:
    """Tokens per second of several rows together, by what holds the weights and the cache: a bar per contestant."""
    axis, save = _page(file, (9, 4))
    bars: dict[str, dict[str, Row]] = {}
    for row in (row for row in rows if row.get("job") == "rows"):
        what, _, cache = row["what"].partition(", ")
        bars.setdefault(what, {})[f"{row['precision']}{', ' * bool(cache)}{cache}"] = row
    groups = list(dict.fromkeys(group for own in bars.values() for group in own))
    width = 0.8 / max(len(bars), 1)
    for index, (what, own) in enumerate(bars.items()):
        places = [groups.index(group) + (index - (len(bars) - 1) / 2) * width for group in own]
        drawn = axis.bar(places, [row.get("tokens_per_s", 0) for row in own.values()], width, label=what)
        axis.bar_label(drawn, fmt="%.0f", fontsize=8)
    about = next((row for own in bars.values() for row in own.values()), {"batch": 0, "prompt_tokens": 0})
    axis.set(ylabel=f"tokens/s, {about['batch']} rows of {about['prompt_tokens']:,} tokens and more")
    axis.set_xticks(range(len(groups)), groups)
    axis.legend(loc="upper left", ncols=2, fontsize=8)
    axis.margins(y=0.25)
    save()


def _page(file: Path, inches: tuple[float, float] = (6, 4)) -> tuple[Any, Callable[[], None]]:
    """Axes, and what writes them into the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=inches, layout="constrained")

    def save() -> None:
        write_whole(file, lambda out: figure.savefig(out, dpi=110, format=file.suffix[1:]))
        plt.close(figure)

    return axis, save
