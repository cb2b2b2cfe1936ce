"""`dpa serve`: the options, loading, and the server's life."""

import argparse
import logging
import math
import re
import signal
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from pydantic import ValidationError

from dpalign.dial import TEMPERATURE
from dpalign.dial.server.engine import Limits, engine_of, require_ranges
from dpalign.engines.knobs import Engines
from dpalign.paper.prompts import RewardInput
from dpalign.runs.environment import API_KEY, settle_threads, take_secret

if TYPE_CHECKING:
    from dpalign.dial.server.service import Service

log = logging.getLogger("dpalign.dial")

LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Names by which a browser on this machine calls a server that has no key."""

LIMITS: Final = {
    "max_tokens": ("N", "most tokens of an answer; also the default of a request (default: %(default)s)"),
    "max_prompt": ("N", "most tokens of a prompt (default: what the model's context holds)"),
    "max_n": ("N", "most answers per request, and most that best_of chooses from (default: %(default)s)"),
    "max_body": ("BYTES", "most bytes of a request (default: %(default)s)"),
    "max_concurrent": ("N", "requests answered at a time; others wait (default: %(default)s)"),
    "max_queue": ("N", "requests that wait; others get 429 (default: %(default)s)"),
    "grace": ("SECONDS", "time for running answers when the server is told to stop (default: %(default)g)"),
}
"""The limits that have an option: the name of its value, and its help."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add = parser.add_argument
    text = "an export, a finished policy's folder, or a run's folder (its last policy)"
    add("model", type=Path, metavar="MODEL", help=text)
    add("--name", metavar="NAME", help="the model's name for clients (default: the folder's)")
    text = "a reward folder or module:function, for /v1/rewards and best_of; of several rewards NAME=SOURCE, "
    text += "once each (default: those inside MODEL, if any)"
    add("--reward", metavar="SOURCE", action="append", default=[], help=text)
    text = "how the reward model reads a chat: chat, dpa-v1 or world-v1 (default: what MODEL's dpa.json says)"
    add("--reward-template", choices=get_args(RewardInput), help=text)
    add("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s, this machine alone)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    text = "a file with the key that clients must give "
    text += f"(default: the environment variable {API_KEY}; without either, none)"
    add("--api-key-file", type=Path, metavar="FILE", help=text)
    text = "a site whose pages may call this server from a browser, such as https://example.org; may be repeated"
    add("--allow-origin", action="append", default=[], metavar="URL", help=text)
    text = "the engine; auto is vLLM where it is installed, else transformers (default: %(default)s)"
    add("--engine", choices=("auto", "transformers", "vllm"), default="auto", help=text)
    text = "data type of the weights: auto, float32, bfloat16 or float16 (default: %(default)s, as stored)"
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=text)
    text = "with vLLM: GPUs that the model is split over (default: 1)"
    add("--tensor-parallel", type=int, metavar="N", help=text)
    text = "with vLLM: share of each GPU for weights and cache; leave room for a reward model "
    add("--gpu-memory", type=float, metavar="SHARE", help=f"{text}(default: {Engines().gpu_memory})")
    text = "with vLLM: most tokens of a prompt and its answer (default: what the model's context holds)"
    add("--max-model-len", type=int, metavar="N", help=text)
    add("--rows", type=int, default=64, metavar="N", help="answers decoded side by side (default: %(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch chooses")
    text = "refuse a message that holds a special token or a turn's tag (default: it is read as plain text)"
    add("--refuse-marks", action="store_true", help=text)
    text = "temperature of a request that states none (default: %(default)s, as in section 3.2)"
    add("--temperature", type=float, default=TEMPERATURE, metavar="T", help=text)
    for name, (metavar, text) in LIMITS.items():
        default = getattr(Limits, name)
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, metavar=metavar, help=text)
    add("--access-log", action="store_true", help="log a line per request; never a key, a prompt or an answer")


def execute(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    """Serve until the process is told to stop.

    Raises:
        ValueError: an option or a folder is wrong, or a library is missing; says what to do.
    """
    limits = limits_of(arguments)
    engine = engine_of(arguments.engine)
    vllm_of(arguments)
    key = api_key(arguments.api_key_file)
    require_policy(arguments)
    for extra, modules in (("serve", ("fastapi", "uvicorn", "prometheus_client")), ("vllm", ("vllm",))):
        missing = [module for module in modules if find_spec(module) is None]
        if missing and (extra == "serve" or engine == "vllm"):
            raise ValueError(f"{missing[0]} is not installed; in a clone: pip install -e '.[{extra}]'")
    settle_threads(arguments.threads, for_torch=True)
    sys.setswitchinterval(0.0005)  # decoding and sending share the interpreter: neither should wait long for the other
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    log.info("engine: %s", engine)
    local = _is_local(arguments.host)
    if not local and key is None:
        log.warning(
            "listening at %s without a key: anyone who reaches this machine can use the model; give --api-key-file",
            arguments.host,
        )
    with _listen(arguments.host, arguments.port) as listening:
        from dpalign.dial.server.app import Server, create_app

        service = build(arguments, limits)
        hosts = LOCAL_NAMES | {arguments.host} if local and key is None else None
        app = create_app(service, key=key, hosts=hosts, origins=arguments.allow_origin)
        server = Server(app, service, access_log=arguments.access_log)

        def stop(*_: object) -> None:
            server.should_exit = True

        # for the time before uvicorn handles these signals, and for when it raises them again at its end
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        server.run(sockets=[listening])


def require_policy(arguments: argparse.Namespace) -> None:
    """Check the model, the name and the sites before anything heavy is imported.

    Raises:
        ValueError: the model takes no directions, its files do not fit each other, or the name or a site is invalid.
    """
    from dpalign.dial.export.source import find_model, require_sound
    from dpalign.train.contract import read_contract

    if arguments.name is not None and ("@" in arguments.name or not arguments.name.strip()):
        raise ValueError(f"--name {arguments.name!r}: a name without '@', which divides it from a direction")
    if arguments.name is not None and not arguments.name.isprintable():
        raise ValueError(f"--name {arguments.name!r}: a name in one line")
    for site in arguments.allow_origin:
        if site != "*" and not re.fullmatch(r"https?://[^/\s]+", site):
            raise ValueError(f"--allow-origin {site!r}: give a site such as https://example.org")
    if read_contract(find_model(arguments.model)[2]) is None:
        cure = "`dpa export` writes one beside a checkpoint whose form is known"
        raise ValueError(f"{arguments.model}: no dpa.json, so this model takes no directions; {cure}")
    require_sound(arguments.model)


def build(arguments: argparse.Namespace, limits: Limits) -> "Service":
    """Load model, dial and reward model.

    Raises:
        ValueError: names the folder, and says what is wrong with it.
    """
    from dpalign.dial.server.service import open_service

    engines, max_model_len = vllm_of(arguments)
    same = ("name", "rows", "engine", "dtype", "reward", "reward_template", "temperature", "refuse_marks")
    options = {name: getattr(arguments, name) for name in same}
    return open_service(arguments.model, limits, engines=engines, max_model_len=max_model_len, **options)


# --- options ---


def limits_of(arguments: argparse.Namespace) -> Limits:
    """The limits that the command line sets. Other numeric options are checked here too.

    Raises:
        ValueError: a value is out of its range.
    """
    limits = Limits(**{name: getattr(arguments, name) for name in LIMITS})
    if arguments.rows < limits.max_n:
        raise ValueError(f"--rows {arguments.rows}: fewer than the {limits.max_n} answers of --max-n")
    if not math.isfinite(limits.grace):
        raise ValueError(f"--grace {limits.grace}: a number of seconds")
    require_ranges(vars(arguments))
    return limits


def vllm_of(arguments: argparse.Namespace) -> tuple[Engines, int | None]:
    """vLLM's options: its share of the GPUs, and the most tokens of a prompt with its answer.

    Raises:
        ValueError: the engine is not vLLM, or a value is out of its range.
    """
    values = {name: getattr(arguments, name) for name in ("tensor_parallel", "gpu_memory", "max_model_len")}
    options = {name: value for name, value in values.items() if value is not None}
    flags = {name: f"--{name.replace('_', '-')} {value}" for name, value in options.items()}
    if options and engine_of(arguments.engine) != "vllm":
        raise ValueError(f"{next(iter(flags.values()))}: a setting of vLLM's, and transformers answers: --engine vllm")
    longest = options.pop("max_model_len", None)
    if longest is not None and longest < 2:
        raise ValueError(f"--max-model-len {longest}: at least 2 tokens, one of a prompt and one of its answer")
    try:
        return Engines(sampling="vllm", **options), longest
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"{flags[str(fault['loc'][0])]}: {fault['msg']}") from None


def api_key(file: Path | None) -> str | None:
    """The key that clients must give, from a file or the environment; None where neither has one.

    Raises:
        ValueError: the file cannot be read, or the key is not one word of ASCII.
    """
    try:
        text = file.read_text(encoding="utf-8") if file is not None else take_secret(API_KEY)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {file}: cannot be read ({error})") from None
    if text is None:
        return None
    key = text.strip()
    if not re.fullmatch(r"[!-~]+", key):
        where = str(file) if file is not None else API_KEY
        raise ValueError(f"{where}: the key must be one word of ASCII letters, digits and signs")
    return key


def _listen(host: str, port: int) -> socket.socket:
    """Bind a socket to the address. This comes before the model is loaded, so that a port in use fails at once.

    Raises:
        ValueError: it cannot be bound.
    """
    listening = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ValueError(f"cannot listen at {host}, port {port}: {error.strerror}; choose another --port") from None
    return listening


def _is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
