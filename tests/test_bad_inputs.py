"""Every bad input of `bad_inputs.py` is refused by name, with code 2, and leaves nothing half-written."""

import asyncio
import gzip
import json
import shlex
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bad_inputs import EVERY, RECIPE, REQUESTS, Bad, Request, rows, write_model
from dpalign import cli
from dpalign.recipe import Recipe, changed
from dpalign.rows import Message
from dpalign.runs.tables import leaves

KEPT = {".lock", "log.txt", "environment.json", ".digests.json"}
"""What a folder of stages has beside them, whatever becomes of a stage."""


def prepare(bad: Bad, folder: Path) -> None:
    (folder / "r.toml").write_text(RECIPE)
    for name, content in bad.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if bad.make is not None:
        bad.make(folder)


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks git and the installed packages what they are."""
    monkeypatch.setattr("dpalign.runs.folder.describe_environment", lambda: {})


def test_the_table_has_more_than_a_hundred_bad_inputs_each_of_its_own_name() -> None:
    names = [bad.name for bad in (*EVERY, *REQUESTS)]
    assert len(set(names)) == len(names) > 110


@pytest.mark.parametrize("bad", EVERY, ids=lambda bad: bad.name[:70])
def test_a_bad_input_is_refused_by_name_and_leaves_nothing_half_written(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(bad, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(shlex.split(bad.words))
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert "Traceback" not in printed.err
    message = printed.err.rpartition("dpa: ")[2]
    assert [part for part in bad.said if part not in message] == [], message
    left = [Path(name) for name in contents(tmp_path) - before]
    assert [path for path in left if path.name not in KEPT and ".stage" not in path.parts] == []
    if not any(word in bad.words for word in ("made/data", "a/made")):  # no stage has begun
        assert left == []
        assert not any((tmp_path / name).exists() for name in ("run", "mine", "made", "a"))


@pytest.mark.parametrize(
    "words",
    [
        "run r.toml --dry-run --out run",
        "run micro --dry-run --out run",
        "compare micro --dry-run --out run",
        "run r.toml --dry-run --out run --sft.checkpoint m",
        "data r.toml --out made/data --data.rows m.jsonl --data.validation_prompts 5",
        "data r.toml --out made/data --data.rows m.jsonl --data.validation m.jsonl.gz",
    ],
)
def test_what_the_table_spoils_is_accepted_whole(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"m.jsonl": rows(), "m.jsonl.gz": gzip.compress(rows(5).encode())}
    prepare(Bad("", "", (), files, lambda folder: write_model(folder / "m")), tmp_path)
    monkeypatch.chdir(tmp_path)
    cli.main(shlex.split(words))
    assert capsys.readouterr().out


def test_the_model_that_the_table_spoils_is_sound(tmp_path: Path) -> None:
    from dpalign.dial.export.source import require_sound
    from dpalign.runs.modelfolder import require_fit

    write_model(tmp_path / "m")
    require_fit(tmp_path / "m")
    require_sound(tmp_path / "m")


def test_no_number_of_a_recipe_may_be_a_trillion() -> None:
    recipe = Recipe(name="x")
    numbers = [
        key
        for key, value in leaves(recipe.as_mapping())
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    assert len(numbers) > 100
    for key in numbers:
        with pytest.raises(ValueError, match=rf"{key.rpartition('.')[2]} is 1000000000000"):
            changed(recipe, {key: 10**12})


# --- requests ---


class Silent:
    """An engine that must not be asked, and a tokenizer of words."""

    context = 64
    load: Mapping[str, float] = {"rows": 0, "waiting": 0, "steps": 0}
    failed = False

    @property
    def prompts(self) -> "Silent":
        return self

    @property
    def tokenizer(self) -> "Silent":
        return self

    def get_vocab(self) -> dict[str, int]:
        return {"name": 0, "fox.": 1}

    async def ids(self, messages: Sequence[Message], preference: Mapping[str, float] | None) -> list[int]:
        return list(range(sum(len(message["content"].split()) for message in messages)))

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def stream(self, prompt: Sequence[int], sampling: Any) -> AsyncGenerator[list[Any], None]:
        raise AssertionError("a bad request has come to the engine")
        yield []


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("fastapi", reason="needs the extra dpalign[serve]")
    pytest.importorskip("httpx2", reason="needs the extra dpalign[dev]")
    from dpalign.dial.dial import Dial
    from dpalign.dial.server.app import create_app
    from dpalign.dial.server.engine import Limits
    from dpalign.dial.server.service import Service

    folder = tmp_path_factory.mktemp("model") / "m"
    write_model(folder)
    return create_app(Service("mine", Dial.load(folder), Silent(), Limits(max_n=8)))


@pytest.mark.parametrize("bad", REQUESTS, ids=lambda bad: bad.name)
def test_a_bad_request_is_refused_in_openais_shape(app: Any, bad: Request) -> None:
    import httpx2

    async def ask() -> Any:
        content = bad.body if isinstance(bad.body, bytes) else json.dumps(bad.body).encode()
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            headers = {"content-type": "application/json"}
            return await client.request(bad.method, bad.path, content=content, headers=headers)

    answer = asyncio.run(ask())
    error = answer.json()["error"]
    assert answer.status_code == bad.status, error
    assert bad.said in f"{error['message']} {error['param']}"
    assert error["type"] == "invalid_request_error"
