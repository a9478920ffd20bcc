"""The race: transformers, a full cache and a squeezed one at the same prompt, replayed at the pace that was measured.

    python scripts/race.py                            results/race.html of the traces results/race_*.json
    python scripts/race.py --from a.json b.json       of other traces, which the page lets one choose from
    python scripts/race.py --record                   measure on this machine (minutes), then make the page
    python scripts/race.py --picture results/race.png also take a picture of it, with Chromium

The page is one file that opens from disk. A trace of another device is dropped in as results/race_NAME.json.
"""

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import get_model  # noqa: E402

from commandline import Parser, guarded, positive, thread_count  # noqa: E402
from errors import UserError, optional, place  # noqa: E402
from files import check_output, checked, read_json, read_text, write_json, write_whole  # noqa: E402

PAGE, TEMPLATE, ARTICLE = ROOT / "serving/page.html", ROOT / "scripts/race.html", ROOT / "scripts/article.txt"
QUESTION = "Summarize the article in three sentences."
CONTESTANT = {"name": str, "about": str, "words": [str], "read_ms": [float], "times_ms": [float], "frames": [[int]]}
CONTESTANT |= {"kv_bytes": int, "slot_bytes": int, "plan": ([int], None), "peak_bytes": (int, None)}
CONTESTANT |= {"first_token_s": float, "tokens_per_s": (float, None), "compile_s": float}
FRAMES, FRAMES_PER_S = 40, 6  # of a moving picture
STYLE = """
body { padding: 0 } #views { padding: 1rem 1rem 0 }
.controls, .view details { display: none } .view .words { max-height: 12rem }
"""  # of a picture
TRACE = {"device": str, "threads": int, "date": str, "torch": str, "transformers": str, "command": str}
TRACE |= {"checkpoint": str, "dtype": str, "runs": int, "prompt_tokens": int, "heads": int, "words": [str]}
TRACE |= {"contestants": [CONTESTANT]}


def main(argv: list[str] | None = None) -> int:
    return guarded("race.py", lambda: run(argv))


def run(argv: list[str] | None) -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--from", dest="traces", nargs="+", metavar="F", help="traces (default: results/race_*.json)")
    add("--out", default=str(ROOT / "results/race.html"), metavar="F", help="the page (default: results/race.html)")
    add("--picture", metavar="F", help="a .png of the page, or a .webp that moves")
    add("--record", metavar="F", nargs="?", const="", help="measure into F (default: results/race_DEVICE.json)")
    add("--checkpoint", help="with --record (default: SmolLM2-135M-Instruct, as of make real)")
    add("--prompt-file", metavar="F", help="with --record (default: an article, and a question about it)")
    add("--max-new-tokens", type=positive, default=128, metavar="N")
    add("--budget", type=float, default=0.2, help="of the squeezed cache (default: 0.2)")
    add("--device", default="cpu")
    add("--threads", type=thread_count, metavar="N", help="of the CPU (default: what PyTorch takes)")
    args = parser.parse_args(argv)
    for name in ("out", "picture"):
        if getattr(args, name) is not None:
            check_output(getattr(args, name), f"--{name}")
    if args.picture is not None and Path(args.picture).suffix not in (".png", ".webp"):
        raise UserError(f"--picture {place(args.picture)}: pictures are .png or .webp files")
    if args.record is not None:
        args.traces = [record(args)]
    files = args.traces or sorted(map(str, (ROOT / "results").glob("race_*.json")))
    if not files:
        raise UserError("there is no trace results/race_*.json yet; --record makes one")
    write_whole(args.out, page([read_trace(file) for file in files]))
    print(args.out)
    if args.picture is not None:
        picture(Path(args.out), Path(args.picture))
        print(args.picture)
    return 0


def record(args: Any) -> str:
    """Measure; the path of the trace."""
    from benchmark import traces  # takes seconds

    out = args.record or str(ROOT / f"results/race_{args.device}.json")
    check_output(out, "--record")
    path = args.checkpoint or get_model.get("smollm2")
    prompt = read_text(args.prompt_file) if args.prompt_file else f"{read_text(ARTICLE)}\n{QUESTION}"
    sizes = (args.max_new_tokens, args.budget, args.threads)
    write_json(out, traces.trace(Path(path), args.device, prompt, *sizes))
    return out


def read_trace(file: str) -> dict[str, Any]:
    trace = checked(read_json(file), TRACE, place(file))
    for own in trace["contestants"]:
        steps = len(own["read_ms"]) + len(own["times_ms"])
        if not own["times_ms"] or len(own["times_ms"]) != len(own["words"]) or len(own["frames"]) != steps:
            raise UserError(f"{place(file)}: words, times and frames of {own['name']} do not belong together")
    return trace


def page(traces: list[dict[str, Any]]) -> str:
    """The template with the view of the server's page and the traces in it."""
    text, source = read_text(TEMPLATE), read_text(PAGE)
    for kind, name in (("style", "view-style"), ("script", "view")):
        part = re.search(rf'<{kind} id="{name}">.*?</{kind}>', source, re.DOTALL)[0]
        text = text.replace(f"<!-- {kind} -->", part)
    data = json.dumps(traces, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    empty = '<script type="application/json" id="traces">'
    return text.replace(empty, empty + data)


def picture(page: Path, out: Path) -> None:
    """The contestants at the moment at which the first of them has ended; as a .webp the whole race."""
    optional("playwright")
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="dark", reduced_motion="reduce")
        tab.goto(page.resolve().as_uri())
        tab.add_style_tag(content=STYLE)
        if out.suffix == ".png":
            tab.evaluate("seek(Math.min(...racers.map((racer) => racer.steps.at(-1))))")
            write_whole(out, shot(tab))
        else:
            moving(tab, out)
        browser.close()


def moving(tab: Any, out: Path) -> None:
    """All of it at the same pace for all, and its end for three seconds."""
    from PIL import Image

    end, frames = tab.evaluate("end"), []
    for count in range(FRAMES + 1):
        tab.evaluate(f"seek({end * count / FRAMES})")
        frames.append(Image.open(io.BytesIO(shot(tab))).convert("RGB"))
    size = [min(sizes) for sizes in zip(*(frame.size for frame in frames), strict=True)]
    frames = [frame.crop((0, 0, *size)) for frame in frames]
    durations = [1000 // FRAMES_PER_S] * FRAMES + [3000]
    options = dict(format="WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=40)
    write_whole(out, lambda file: frames[0].save(file, **options))


def shot(tab: Any) -> bytes:
    tab.wait_for_timeout(100)  # the picture is drawn with the next frame
    return tab.locator("#views").screenshot()


if __name__ == "__main__":
    sys.exit(main())
