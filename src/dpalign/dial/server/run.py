"""`dpa serve`: the options, and the parts put together."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dpalign.dial.server.limits import Limits
from dpalign.engines.knobs import Engines
from dpalign.run.environment import settle_threads

if TYPE_CHECKING:
    from dpalign.dial.server.answering import Service
    from dpalign.dial.server.generation import Generator
    from dpalign.dial.server.rewards import Rewards
    from dpalign.paper.prompts import RewardTemplate
    from dpalign.train.contract import Contract

KEY: Final = "DPA_API_KEY"
"""The environment variable with the API key."""

LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add = parser.add_argument
    limits = Limits()
    text = "an export, a finished policy's folder, or a run's folder: its last policy"
    add("model", type=Path, metavar="MODEL", help=text)
    text = "its name for clients (default: the folder's)"
    add("--name", metavar="NAME", help=text)
    text = "a reward folder, for /v1/rewards and best_of (default: the one inside MODEL, if any)"
    add("--reward", metavar="DIR", help=text)
    text = "how the reward model reads a chat: dpa-v1 or world-v1 (default: what MODEL's dpa.json says)"
    add("--reward-template", choices=("dpa-v1", "world-v1"), help=text)
    add("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s, this machine alone)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    text = f"a file with the key that clients must give (default: the environment variable {KEY}; without either, none)"
    add("--api-key-file", type=Path, metavar="FILE", help=text)
    text = "a site whose pages may call this server from a browser, such as https://example.org; any number of times"
    add("--allow-origin", action="append", default=[], metavar="URL", help=text)
    text = "what answers; auto is vLLM where it is installed, else transformers (default: %(default)s)"
    add("--engine", choices=("auto", "transformers", "vllm"), default="auto", help=text)
    text = "of the weights: auto, float32, bfloat16 or float16 (default: %(default)s, as they are stored)"
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=text)
    text = "with vLLM: GPUs that the model is split over (default: 1)"
    add("--tensor-parallel", type=int, metavar="N", help=text)
    text = "with vLLM: share of each GPU that it may take, weights and cache; leave room for a reward model "
    add("--gpu-memory", type=float, metavar="SHARE", help=f"{text}(default: {Engines().gpu_memory})")
    text = "with vLLM: most tokens of a prompt and its answer (default: what the model's context holds)"
    add("--max-model-len", type=int, metavar="N", help=text)
    add("--rows", type=int, default=64, metavar="N", help="answers decoded side by side (default: %(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads; 0 leaves the choice to torch")
    text = "of a request that states none (default: %(default)s, as in section 3.2)"
    add("--temperature", type=float, default=0.7, metavar="T", help=text)
    text = "most tokens of an answer, and what a request gets that states none (default: %(default)s)"
    add("--max-tokens", type=int, default=limits.max_tokens, metavar="N", help=text)
    text = "most tokens of a prompt (default: what the model's context holds)"
    add("--max-prompt", type=int, default=limits.max_prompt, metavar="N", help=text)
    text = "most answers to a request, and most that best_of chooses from (default: %(default)s)"
    add("--max-n", type=int, default=limits.max_n, metavar="N", help=text)
    add("--max-body", type=int, default=limits.max_body, metavar="BYTES", help="of a request (default: %(default)s)")
    text = "requests answered at a time; others wait (default: %(default)s)"
    add("--max-concurrent", type=int, default=limits.max_concurrent, metavar="N", help=text)
    text = "requests that wait; others are sent away with 429 (default: %(default)s)"
    add("--max-queue", type=int, default=limits.max_queue, metavar="N", help=text)
    text = "how long running answers have when the server is told to stop (default: %(default)g)"
    add("--grace", type=float, default=limits.grace, metavar="SECONDS", help=text)
    add("--access-log", action="store_true", help="write a line a request; never a key, a prompt or an answer")


def serve(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Answer until told to stop.

    Raises:
        ValueError: an option, a folder or a missing library; says what to do.
    """
    if overrides:
        raise ValueError(f"serve takes no knobs of a recipe: {' '.join(overrides)}")
    limits = limits_of(arguments)
    engine = engine_of(arguments.engine)
    vllm_of(arguments)
    key = api_key(arguments.api_key_file)
    _need("fastapi", "uvicorn", "prometheus_client")
    if engine == "vllm":
        _need("vllm")
    settle_threads(arguments.threads, for_torch=True)
    from dpalign.dial.server.server import is_local, listen, run

    sys.setswitchinterval(0.0005)  # decoding and sending share the interpreter: neither should wait long for the other
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("dpalign.dial").info("answers by %s", engine)
    listening = listen(arguments.host, arguments.port)
    local = is_local(arguments.host)
    if not local and key is None:
        logging.getLogger("dpalign.dial").warning(
            "listening at %s without a key: anyone who reaches this machine can use the model; give --api-key-file",
            arguments.host,
        )
    with listening:
        from dpalign.dial.server.api import create_app

        service = build(arguments, limits)
        guard = create_app(
            service,
            key=key,
            hosts=LOCAL_NAMES | {arguments.host} if local and key is None else None,
            origins=arguments.allow_origin,
        )
        run(guard, service, listening, access_log=arguments.access_log)


def build(arguments: argparse.Namespace, limits: Limits) -> "Service":
    """Load model, dial and reward model.

    Raises:
        ValueError: what is wrong with which folder.
    """
    from dpalign.dial.dial import Dial
    from dpalign.dial.export.card_figures import front_of
    from dpalign.dial.export.source import find_source, opened
    from dpalign.dial.server.answering import Service

    name, _, contract_folder = opened(arguments.model)
    name = arguments.name or name
    if "@" in name or not name.strip():
        raise ValueError(f"--name {name!r}: a name without '@', which divides it from a direction")
    dial = Dial.load(contract_folder)
    source = find_source(arguments.model, None, None, None)
    dial = replace(dial, population=source.contract.population, front=source.contract.front or front_of(source))
    rewards = open_rewards(arguments, source.model, source.contract)
    generator = open_generator(arguments, source.model)
    return Service(name, dial, generator, limits, rewards=rewards, temperature=arguments.temperature)


def open_rewards(arguments: argparse.Namespace, model: Path, contract: "Contract") -> "Rewards | None":
    """The reward model that is named, or the one that an export has inside.

    Raises:
        ValueError: it cannot be read, or nobody says how it reads a chat.
    """
    own = model / contract.reward if contract.reward else None
    source = arguments.reward or (str(own) if own is not None and own.is_dir() else None)
    if source is None:
        return None
    from dpalign.dial.export.source import weights_folder
    from dpalign.dial.server.rewards import Rewards

    template: RewardTemplate | None = arguments.reward_template or contract.reward_template
    if template is None:
        raise ValueError(f"{model}: does not say how its reward model reads a chat; give --reward-template")
    return Rewards(str(weights_folder(Path(source))), contract, template, arguments.dtype)


def open_generator(arguments: argparse.Namespace, model: Path) -> "Generator":
    match engine_of(arguments.engine):
        case "vllm":
            from dpalign.dial.server.vllm_generator import VllmGenerator

            settings, longest = vllm_of(arguments)
            return VllmGenerator(
                str(model), rows=arguments.rows, settings=settings, dtype=arguments.dtype, max_model_len=longest
            )
        case _:
            from dpalign.dial.server.batching import BatchingGenerator

            return BatchingGenerator(str(model), rows=arguments.rows, dtype=arguments.dtype)


def engine_of(asked: str) -> str:
    """What answers: "auto" is vLLM where it is installed."""
    from importlib.util import find_spec

    return asked if asked != "auto" else "vllm" if find_spec("vllm") else "transformers"


def limits_of(arguments: argparse.Namespace) -> Limits:
    """The limits that the command line sets.

    Raises:
        ValueError: one that no server can keep.
    """
    names = ("max_tokens", "max_prompt", "max_n", "max_body", "max_concurrent", "max_queue", "grace")
    limits = Limits(**{name: getattr(arguments, name) for name in names})
    if arguments.rows < limits.max_n:
        raise ValueError(f"--rows {arguments.rows}: fewer than the {limits.max_n} answers of --max-n")
    if not 0 <= arguments.temperature <= 2:
        raise ValueError(f"--temperature {arguments.temperature}: 0 to 2")
    if not 0 <= arguments.port < 65536:
        raise ValueError(f"--port {arguments.port}: 0 to 65535")
    return limits


def vllm_of(arguments: argparse.Namespace) -> tuple[Engines, int | None]:
    """What the command line says of vLLM: its share of the GPUs, and the longest prompt with its answer.

    Raises:
        ValueError: it says so of another engine, or what vLLM cannot do.
    """
    given = {name: getattr(arguments, name) for name in ("tensor_parallel", "gpu_memory", "max_model_len")}
    asked = {name: value for name, value in given.items() if value is not None}
    if engine_of(arguments.engine) != "vllm":
        if asked:
            flag = f"--{next(iter(asked)).replace('_', '-')}"
            raise ValueError(f"{flag} is a setting of vLLM's, and transformers answers: give --engine vllm")
        return Engines(), None
    longest = asked.pop("max_model_len", None)
    if longest is not None and longest < 2:
        raise ValueError(f"--max-model-len {longest}: at least 2 tokens, one of a prompt and one of its answer")
    try:
        return Engines(sampling="vllm", **asked), longest
    except ValueError as error:  # it names a recipe's knob first
        knob, _, problem = str(error).partition(" ")
        raise ValueError(f"--{knob.replace('_', '-')} {problem}") from None


def api_key(file: Path | None) -> str | None:
    """The key that clients must give, from a file or the environment; None where neither is given.

    Raises:
        ValueError: it is empty, or more than a word.
    """
    given = file.read_text(encoding="utf-8") if file is not None else os.environ.pop(KEY, None)
    if given is None:
        return None
    key = given.strip()
    if not re.fullmatch(r"[!-~]+", key):
        where = str(file) if file is not None else KEY
        raise ValueError(f"{where}: the key must be one word of ASCII letters, digits and signs")
    return key


def _need(*modules: str) -> None:
    from importlib.util import find_spec

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        extra = "vllm" if missing == ["vllm"] else "serve"
        raise ValueError(f"{missing[0]} is not installed; pip install -e '.[{extra}]'")
