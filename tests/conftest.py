import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from config import Delta
from decoder import Decoder
from engine import Batch, Engine, Request
from model import ModelConfig, Transformer
from prefill import Prompts, finished, read

# The tensors are small, and threads that wait for each other slow down on a busy machine; for what tests start, too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLCONFIGDIR"] = os.path.join(tempfile.gettempdir(), "squeeze_fast_matplotlib")  # its cache of fonts
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "squeeze_fast_compiled")
os.environ["TRITON_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "squeeze_fast_triton")


def quick(*few, of) -> list:
    """Parameters: all `of` them, those that are not among the few in the slow tests only."""
    return [value if value in few else pytest.param(value, marks=pytest.mark.slow) for value in of]


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


ROOT = Path(__file__).resolve().parent.parent
CACHES = {"__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache"}
strays: list[str] = []  # paths outside of temporary folders that this process has opened to write


def _audit(event: str, args: tuple) -> None:
    """Python tells of every file that it opens, makes, renames or removes."""
    if event == "open":
        path, _, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        # A folder is opened so for a file that never has a name (O_TMPFILE).
        named = isinstance(path, str | bytes | os.PathLike) and not os.path.isdir(path)
        paths = [(path, -1)] if writes and named else []
    elif event in ("os.mkdir", "os.remove"):
        paths = [(args[0], args[-1])]
    elif event == "os.rename":
        paths = [(args[0], args[2]), (args[1], args[3])]
    else:
        paths = [(args[0], -1)] if event == "os.truncate" else []
    for path, folder in paths:  # a relative one is below the open folder, if one is given
        if isinstance(path, str | bytes | os.PathLike):
            base = os.getcwd() if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")
            whole = os.path.join(base, os.fsdecode(path))
            if event == "os.mkdir" and os.path.isdir(whole):
                continue  # it fails
            if event == "open":
                real = os.path.realpath(whole)
            else:  # the link itself is removed or renamed
                real = os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))
            if not (real.startswith(ALLOWED) or CACHES & set(Path(real).parts)):
                strays.append(real)


ALLOWED = (os.path.realpath(tempfile.gettempdir()), "/dev", "/proc")
sys.addaudithook(_audit)


@pytest.fixture(autouse=True)
def _nothing_is_written_elsewhere(tmp_path_factory):
    """Also when the path cannot be opened: a test names only places of its own."""
    own = str(tmp_path_factory.getbasetemp())
    strays.clear()
    yield
    found = [path for path in strays if not path.startswith(own)]
    assert not found, f"a test has written to {found}"


def random_model(dtype: torch.dtype = torch.float64, seed: int = 1, **changes) -> Transformer:
    """A small transformer with every parameter drawn wide, so that attention and norms matter."""
    config = ModelConfig(
        **{
            "model_type": "llama",
            "vocab_size": 97,
            "dim": 40,
            "n_layers": 4,
            "n_heads": 6,
            "n_kv_heads": 2,
            "head_dim": 12,
            "ffn_dim": 56,
            "max_positions": 4096,
            **changes,
        }
    )
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
        fan_in = parameter.shape[-1]
        parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 1.5 * noise * fan_in**-0.5)
    return model


DELTA = Delta(key_heads=2, value_heads=4, key_dim=6, value_dim=10, kernel=4)


def linear_model(n_layers: int = 4, linear: tuple[int, ...] = (0, 2), **changes) -> Transformer:
    """One of gated attention, and of linear attention in some layers, in which what was long ago matters."""
    form = {"delta": DELTA, "attention_gate": True, "qk_norm": "head"}
    model = random_model(n_layers=n_layers, linear=linear, **form | changes)
    for layer in linear:
        model.layers[layer].attention.a_log.sub_(3)
    return model


def random_ids(count: int, seed: int = 2, vocab: int = 97) -> list[int]:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def begun(engine: Engine, requests: list[Request], length: int | None = None, rows: int | None = None, **more) -> Batch:
    """A batch whose prompts have been read and whose first tokens are chosen, before any step."""
    samplings = [request.sampling for request in requests]
    longest = max(request.length for request in requests)
    batch = Batch(engine, rows or len(requests), length or longest, **{"samplings": samplings, **more})
    batch.lag = -1  # no step is started
    for request in requests:
        batch.add(request)
    batch.step()
    if batch.decoder:
        batch.decoder.batch = batch  # which holds the memory for it
    return batch


def appended(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """x [B, T, C] of tokens [B, T] that follow."""
    return torch.cat(list(decoder.append(ids)), dim=1)


@torch.inference_mode()
def after_prompts(model: Transformer, requests: list[Request], policies: list, measures: list | None = None):
    """Logits [R, vocab] and importance [L, R] of prompts of which nothing is kept."""
    prompts = Prompts.of(model, [request.ids for request in requests], [request.length for request in requests])
    return finished(read(model, prompts, policies, lambda *_: None, measures))


@pytest.fixture(scope="session")
def model() -> Transformer:
    return random_model()


@pytest.fixture(scope="module")  # while it runs, its thread has an event loop
def browser():
    """Chromium, headless: the one that the environment's CHROMIUM names, or the system's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if not os.access(chromium, os.X_OK):
        pytest.skip(f"needs Chromium: there is no {chromium}, and CHROMIUM names none")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


# Rotary parameters that depend on the length of a request; with max_positions=32 the threshold is 32 tokens.
BY_LENGTH = [
    {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0},
    {
        "rope_theta": 1e4,
        "rope_type": "longrope",
        "short_factor": [1.0] * 6,
        "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        "original_max_position_embeddings": 32,
        "attention_factor": 1.2,
    },
]
