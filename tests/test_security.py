"""What comes from elsewhere: chat templates that do not end, and names that lead out of a folder."""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from dpalign.dial.doctor.model import examine
from dpalign.engines import sandbox
from dpalign.engines.sandbox import Unbounded, render
from dpalign.engines.templates import find_own_chat
from dpalign.engines.tokens import PromptReader
from dpalign.rows import Message
from dpalign.runs.modelfolder import Marks, require_weights, weights_files
from dpalign.train.contract import read_contract
from test_chat_models import FAMILIES, tokenizer_of

ASK: list[Message] = [{"role": "user", "content": "Why?"}]
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "loops in loops": NESTED,
    "loops that choose nothing": "{% for i in range(9999) %}{% for j in range(99999) if j < 0 %}"
                                 "{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(200) }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a product": "{{ 'a' * 10 ** 11 }}",
    "lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a joint": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "blocks": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"
              "{% endfor %}",
    "much text": "{% for i in range(9999) %}{{ 'a' * 99999 }}{% endfor %}",
    "a width": "{{ 'a' | center(10 ** 11) }}",
    "a method's width": "{{ 'a'.ljust(10 ** 11) }}",
    "a form": "{{ '%99999999999d' % 1 }}{{ '{:99999999999d}'.format(1) }}",
    "replacing": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x | replace('a', n.x) %}"
                 "{% endfor %}",
    "joining": "{{ (['a' * 99999] * 99999) | join }}",
    "an indent": "{{ ('a\n' * 20000) | indent(9999) }}",
    "a text as an indent": "{{ ('a\n' * 20000) | indent('b' * 9999) }}",
    "wrapped words": "{{ ('a' * 20000) | wordwrap(1, wrapstring='b' * 9999) }}",
    "tabs": "{{ ('\t' * 20000).expandtabs(9999) }}",
    "replacing by name": "{{ ('a' * 20000) | replace(new='b' * 9999, old='a') }}",
    "many widths": "{{ ('{0:9999}' * 20000).format(1) }}",
    "many widths of a filter": "{{ ('%9999d' * 20000) | format(*([1] * 20000)) }}",
    "a width from a value": "{{ '{0:{1}}'.format(1, '99999999') }}",
    "many fields": "{{ ('{0}' * 20000).format('a' * 9999) }}",
    "JSON's indent": "{{ [1] | tojson(indent=99999999) }}",
    "JSON's separators": "{{ ([1] * 20000) | tojson(separators=['b' * 9999, ':']) }}",
    "a separator": "{{ ([1] * 20000) | join('b' * 9999) }}",
    "a method's separator": "{{ ('b' * 9999).join('a' * 20000) }}",
    "a separator of what is read once": "{{ range(20000) | map('string') | join('b' * 9999) }}",
    "one text many times": "{{ range(20000) | map(attribute='no') | map('default', 'b' * 9999) | list }}",
    "letters as texts": "{{ ('a' * 20000).translate({97: 'b' * 9999}) }}",
    "bytes": "{{ 'a'.encode() * 10 ** 9 }}",
    "bytes of a number": "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "a rounding": "{{ 5 | round(10 ** 9, 'floor') }}",
    "links": "{{ ('a.com ' * 20000) | urlize(target='b' * 9999) }}",
    "lists in lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
                      "{{ n.x }}",
    "equal lists in lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}"
                            "{% set n.y = (n.y, n.y) %}{% endfor %}{{ n.x == n.y }}",
    "dicts in dicts": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}"
                      "{% endfor %}{{ n.x | tojson }}",
    "namespaces": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = namespace(a=n.x, b=n.x) %}"
                  "{% endfor %}{{ n.x }}",
    "many long texts": "{% set a = 'a' * 9999999 %}{% set b %}{% for i in range(9999) %}{{ (a ~ i)[:1] }}{% endfor %}"
                       "{% endset %}",
    "many long ends": "{% set a = 'a' * 9999999 %}{% set b %}{% for i in range(9999) %}{{ a[i:] }}{% endfor %}"
                      "{% endset %}",
    "a search from the right": "{{ ('a' * 9999999).rfind('b' + 'a' * 4999999) }}",
    "a date": "{{ strftime_now('%9999999Y' * 999999) }}",
    "another's method": "{{ dict.update(messages[0], {'content': 'no'}) }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks in blocks": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "no division": "{{ 1 // 0 }}",
}  # fmt: skip


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_does_not_end_is_stopped(name: str) -> None:
    with pytest.raises(ValueError, match="chat template"):
        render(BOMBS[name], ASK)


def test_a_long_chat_is_no_endless_one() -> None:
    text = FAMILIES["Qwen 2.5"].text
    long: list[Message] = [{"role": "user", "content": "a" * 2_000_000}, {"role": "assistant", "content": "b"}] * 2
    assert len(render(text, long)) > 4_000_000


def test_a_model_with_an_endless_template_is_refused_by_every_reader(tmp_path: Path) -> None:
    """Before transformers renders it, which would go on."""
    with pytest.raises(ValueError, match="hub/model"):
        find_own_chat(NESTED, Marks({}, frozenset(), frozenset()), {}, "hub/model")
    tokens = tokenizer_of(FAMILIES["Qwen 2.5"])
    tokens.chat_template = NESTED + tokens.chat_template
    tokens.save_pretrained(tmp_path)
    with pytest.raises(Unbounded, match=str(tmp_path)):
        PromptReader.load(str(tmp_path))


def test_a_served_model_with_an_endless_template_is_refused_at_the_start(tmp_path: Path) -> None:
    from dpalign.dial.server.text import Prompts

    tokens = tiny.tokenizer()
    tokens.chat_template = NESTED + tokens.chat_template
    tokens.save_pretrained(tmp_path)
    with pytest.raises(Unbounded, match=str(tmp_path)):
        Prompts(str(tmp_path))


# --- names


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("fastapi", reason="needs the extra dpalign[serve]")
    import api_server

    return api_server.write_policy(tmp_path_factory.mktemp("served") / "policy")


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "reward/../../elsewhere"])
@pytest.mark.parametrize("key", ["reward", "rewards"])
def test_a_contract_names_no_folder_outside_of_its_own(name: str, key: str, policy: Path, tmp_path: Path) -> None:
    content = json.loads((policy / "dpa.json").read_text())
    record = {"name": "r", "kind": "model", "model": "r", "input": "chat", "heads": ["h"], "folder": name}
    (tmp_path / "dpa.json").write_text(json.dumps(content | {key: name if key == "reward" else [record]}))
    with pytest.raises(ValueError, match=r"dpa\.json.*elsewhere"):
        read_contract(tmp_path)


def test_an_index_names_no_file_outside_of_its_folder(policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_bytes((policy / "config.json").read_bytes())
    for place in (folder / "part.safetensors", tmp_path / "part.safetensors"):
        place.write_bytes((policy / "model.safetensors").read_bytes())
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "part.safetensors"}}')
    require_weights(folder)
    index.write_text('{"weight_map": {"a": "../part.safetensors"}}')
    for check in (require_weights, weights_files):
        with pytest.raises(ValueError, match=r"index\.json.*'\.\./part\.safetensors'"):
            check(folder)
    assert any(finding.level == "bad" and "../part" in finding.text for finding in examine(folder))


@pytest.fixture(scope="module")
def running(policy: Path) -> Iterator[Any]:
    import api_server

    with api_server.serving(policy) as server:
        yield server


@pytest.mark.parametrize(
    "path", ["/../server.py", "/%2e%2e/command.py", "/..%2fcommand.py", "/page/../../command.py", "//etc/passwd"]
)
def test_the_page_gives_no_file_outside_of_its_folder(path: str, running: Any) -> None:
    host = running.url.removeprefix("http://")
    for asked, status in ((path, 404), ("/page.js", 200)):
        connection = http.client.HTTPConnection(host, timeout=10)
        connection.request("GET", asked)
        assert connection.getresponse().status == status, asked
        connection.close()
