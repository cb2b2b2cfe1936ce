"""vLLM's own OpenAI server on a model folder, with none of our code in it; for four_ways.py and the tests."""

import contextlib
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from dpalign.engines.vllm_engine import QUIET

CPU: Final = (
    *("--enforce-eager", "--no-enable-chunked-prefill", "--block-size", "32", "--kv-cache-memory-bytes", "67108864"),
)
STARTS_WITHIN: Final = 600
"""Seconds: few on a free machine, minutes on a busy one."""


@contextlib.contextmanager
def vllm_server(model: Path, name: str, python: str) -> Iterator[str]:
    """The address of `python -m vllm.entrypoints.openai.api_server` (`vllm serve` crashes under the CPU build).

    Raises:
        RuntimeError: it ended, or took too long to start; with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        *("--model", str(model), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "256", "--max-num-batched-tokens", "4096", "--max-num-seqs", "8"),
        *([] if torch.cuda.is_available() else CPU),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | QUIET
    with tempfile.TemporaryFile() as log:
        command = [python, "-m", "vllm.entrypoints.openai.api_server", *words]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + STARTS_WITHIN
            while not _answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"vLLM's server did not start: {log.read()[-3000:].decode(errors='replace')}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
