"""Bad inputs, as data: what is given, what the message must name, and what must not be left behind.

Each is a file or a number that somebody has spoilt by hand, by accident or by a script. `test_bad_inputs.py` gives them
to `dpa` and to the server. The reward functions that fail stand here too, at the end.
"""

import gzip
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

from dpalign.chat import chat_template
from dpalign.paper.direction import Arc
from dpalign.train.contract import Contract, write_contract

Content = str | bytes | None
"""What a file holds; None stands for an empty folder."""


@dataclass(frozen=True)
class Bad:
    """A command line that must end with code 2."""

    name: str
    words: str
    said: tuple[str, ...]
    """Parts of the message: the file, the key, the value."""
    files: Mapping[str, Content] = field(default_factory=dict)
    make: Callable[[Path], None] | None = None
    """Writes what is more than a file, into the folder of the command."""


@dataclass(frozen=True)
class Request:
    """A request to the server, with the status that must answer it."""

    name: str
    body: Any
    """JSON, or bytes as they are sent."""
    status: int
    said: str
    path: str = "/v1/chat/completions"
    method: str = "POST"


RECIPE: Final = """name = "mine"
seed = 1
launcher = "inprocess"
[model]
base = ""
chat = "world-v1"
[rewards.a]
function = "dpalign.rewards.functions:words"
[rewards.b]
function = "dpalign.rewards.functions:sentences"
[preference]
low = 0
high = 90
"""
"""r.toml, which stands beside every command: rewards that need no label and no model."""


def rows(count: int = 40, **more: Any) -> str:
    """So many good rows, with more columns."""
    return "".join(json.dumps({"prompt": f"Why is {i}?", "response": f"So {i}.", **more}) + "\n" for i in range(count))


# --- knobs: refused by the dry run, which touches nothing ---


def _knob(setting: str, *said: str) -> Bad:
    return Bad(setting, f"run micro --dry-run --out run {shlex.quote(f'--{setting}')}", said)


KNOBS: Final = [
    _knob("world.helpsteer_prompts=-3", "world.helpsteer_prompts is -3", "at least 0"),
    _knob("world.test_prompts=0", "world.test_prompts is 0", "at least 1"),
    _knob("world.ultrafeedback_prompts=1", "world.ultrafeedback_prompts is 1", "at least 2"),
    _knob("world.sft_prompts=0", "world.sft_prompts is 0", "sft.checkpoint"),
    _knob("world.sft_prompts=999999", "world.sft_prompts is 999999", "at most 100,000"),
    _knob("pretrain.steps=-1", "pretrain.steps is -1", "at least 1"),
    _knob("pretrain.heads=0", "pretrain.heads is 0", "at least 1"),
    _knob("pretrain.heads=3", "[pretrain]", "hidden is 32", "heads 3"),
    _knob("pretrain.heads=5", "[pretrain]", "heads 5"),
    _knob("pretrain.layers=0", "pretrain.layers is 0", "at least 1"),
    _knob("pretrain.layers=1000000", "pretrain.layers is 1000000", "at most 1,000"),
    _knob("finetune.warmup_steps=-5", "finetune.warmup_steps is -5", "at least 0"),
    _knob("finetune.lora_rank=-1", "finetune.lora_rank is -1", "at least 0"),
    _knob("finetune.weight_decay=-1", "finetune.weight_decay is -1", "at least 0"),
    _knob("finetune.learning_rate=1e300", "finetune.learning_rate is 1e+300", "at most 1"),
    _knob("finetune.epochs=1e300", "[finetune]", "epochs is 1e+300"),
    _knob("policy.grpo.stretch=0.5", "policy.grpo.stretch is 0.5", "at least 1"),
    _knob("threads=-1", "threads is -1", "at least 0"),
    _knob("threads=1000000", "threads is 1000000", "at most 4,096"),
    _knob("sampling.n=1e30", "sampling.n must be an int", "1e+30"),
    _knob(f"sampling.n={10**30}", "[sampling]", f"n is {10**30}"),
    _knob("sampling.temperature=inf", "sampling.temperature", "inf"),
    _knob("iterations=1000000", "iterations is 1000000", "at most 100"),
    _knob("reward.score_tokens=-1", "reward.score_tokens is -1", "at least 1"),
    _knob("reward.layers=-1", "reward.layers is -1", "at least 0"),
    _knob('heads=["wit","wit"]', "'wit' twice"),
    _knob('heads=["wit/two"]', "'wit/two'"),
    _knob('heads=[""]', "heads has ''"),
    _knob("dpo.beta=-1", "dpo.beta is -1", "above 0"),
    _knob("rl.beta=-1", "rl.beta is -1", "at least 0"),
    _knob("jobs=1000", "jobs is 1000", "at most 256"),
    _knob(f"seed={2**70}", f"seed is {2**70}", "at most 4,294,967,295"),
    _knob("evaluation.directions=1000000000", "evaluation.directions is 1000000000", "at most 1,000"),
    _knob("evaluation.bootstrap=1", "evaluation.bootstrap is 1", "at least 2"),
    _knob("evaluation.bootstrap=1000000000", "evaluation.bootstrap is 1000000000", "at most 100,000"),
    _knob("preference.points=1000000", "preference.points is 1000000", "at most 1,000"),
    _knob("preference.low=1e300", "[preference]", "low is 1e+300"),
    _knob("evaluation.reference=[nan,1.0]", "evaluation.reference[0]", "nan"),
    _knob("engines.gpu_memory=2", "engines.gpu_memory is 2", "at most 1"),
    _knob("data.heldout=1", "data.heldout is 1", "below 1"),
    _knob("sft.checkpoint=a/b/sft", "sft.checkpoint is 'a/b/sft'", "no such folder"),
    _knob("rl.training.checkpoint=./nope", "rl.training.checkpoint is './nope'", "no such folder"),
    Bad(
        "angles beside the arc",
        "compare micro --dry-run --out run --feasibility.angles=[60.0]",
        ("feasibility.angles", "60.0"),
    ),
    Bad("a model that no hub has", "run micro --out run --sft.checkpoint nope/sft", ("sft.checkpoint is 'nope/sft'",)),
    Bad("a base that no hub has", "run micro --out run --model.base nope/base", ("model.base is 'nope/base'",)),
    Bad("no file of pairs", "run micro --out run --reward.pairwise p.jsonl", ("reward.pairwise is 'p.jsonl'",)),
    Bad(
        "no file of a probe",
        "run micro --out run --data.judge 0 --reward.freeze true --reward.probe p.safetensors",
        ("reward.probe is 'p.safetensors'",),
    ),
]


# --- recipe files ---


def _recipe(name: str, text: Content, *said: str) -> Bad:
    return Bad(name, "run r.toml --dry-run --out run", ("r.toml", *said), {"r.toml": text})


RECIPES: Final = [
    _recipe("an empty recipe", "", "name is missing"),
    _recipe("a recipe of bytes", b"\xff\xfe\0", "not UTF-8"),
    _recipe("a folder for a recipe", None, "a folder"),
    _recipe("a recipe cut short", 'name = "mine"\n[sampling', "line 2"),
    _recipe("a key given twice", 'name = "a"\nname = "b"', "line 2"),
    _recipe("lists 200,000 deep", "seed = " + "[" * 200_000 + "]" * 200_000, "not valid TOML"),
    _recipe("tables 200 deep", "a." * 200 + "b = 1", "more than 16 deep"),
    _recipe("a number of 5,000 digits", "name = 'mine'\nseed = " + "9" * 5000, "not valid TOML"),
    _recipe("two megabytes of recipe", "#" * 2_000_000, "1,048,576 characters"),
    _recipe("text for a number", "name = 'mine'\nseed = 'few'", "seed must be an int", '"few"'),
    _recipe("an unknown table", "name = 'mine'\n[samplin]\nn = 1", "samplin", "nearest is sampling"),
    _recipe("a recipe that extends itself", "extends = 'r.toml'\nname = 'mine'", "a circle"),
    _recipe("a name that leaves runs/", "name = '../../x'", "name", "../../x"),
    _recipe("a name with a line's end", 'name = "a\\nb"', "name"),
    _recipe("an empty name", 'name = ""', "name"),
    _recipe("a date for a name", "name = 2024-01-01", "2024-01-01"),
    Bad("no such recipe", "run x/none.toml --dry-run", ("x/none.toml", "no such recipe file")),
    Bad("a device for a recipe", "run /dev/zero --dry-run", ("/dev/zero", "1,048,576 characters")),
    Bad("no such override", "run r.toml --dry-run --samplin.n 3", ("--samplin.n", "nearest is --sampling.n")),
    Bad("an override without a value", "run r.toml --dry-run --sampling.n", ("--sampling.n needs a value",)),
]


# --- data files: refused by the stage that reads them ---


def _data(name: str, file: str, content: Content, *said: str, knob: str = "rows", more: str = "") -> Bad:
    words = f"data r.toml --out made/data --data.{knob} {file} --data.validation_prompts 5 {more}"
    beside: dict[str, Content] = {} if knob == "rows" else {"good.jsonl": rows()}
    return Bad(f"data: {name}", words, said, {file: content} | beside)


def _row(name: str, row: Any, *said: str, more: str = "") -> Bad:
    return _data(name, "m.jsonl", json.dumps(row) + "\n", "m.jsonl, line 1", *said, more=more)


_GZIP: Final = gzip.compress(rows().encode(), mtime=0)
_DEEP: Final = "[" * 200_000 + "]" * 200_000
_GOOD: Final = "--data.rows good.jsonl"
_WIT: Final = "--data.scales {wit=[0,4]}"
_STRAY: Final = "".join(rows(40, wit=wit) for wit in range(1, 6)) + rows(1, wit=8)

DATA: Final = [
    _data("a gzip cut short", "m.jsonl.gz", _GZIP[: len(_GZIP) // 2], "m.jsonl.gz", "not a whole gzip file"),
    _data("a gzip spoilt", "m.jsonl.gz", _GZIP[:40] + b"\0" * 8 + _GZIP[48:], "m.jsonl.gz", "not a whole gzip file"),
    _data("a gzip of another sum", "m.jsonl.gz", _GZIP[:-8] + b"\0" * 8, "m.jsonl.gz", "not a whole gzip file"),
    _data("no gzip", "m.jsonl.gz", rows(), "m.jsonl.gz", "not a whole gzip file"),
    _data("an empty gzip", "m.jsonl.gz", gzip.compress(b""), "m.jsonl.gz", "no rows in it"),
    _data("a line 200,000 deep", "m.jsonl", _DEEP, "m.jsonl, line 1"),
    _data("a row 200,000 deep", "m.jsonl", f'{{"prompt": {_DEEP}}}', "m.jsonl, line 1"),
    _data("a file 200,000 deep", "m.json", _DEEP, "m.json"),
    _data("a line of 17 megabytes", "m.jsonl", '{"prompt": "' + "a" * (17 << 20), "m.jsonl, line 1", "16,777,216"),
    _data("a cell of 17 megabytes", "m.csv", "prompt\n" + "a" * (17 << 20), "m.csv", "16777216"),
    _data("an empty file", "m.jsonl", "", "m.jsonl", "no rows in it"),
    _data("empty lines", "m.jsonl", "\n \n", "m.jsonl", "no rows in it"),
    _data("an empty .json", "m.json", "", "m.json"),
    _data("an empty list", "m.json", "[]", "m.json", "no rows in it"),
    _data("an empty .csv", "m.csv", "", "m.csv", "no rows in it"),
    _data("a .csv of names alone", "m.csv", "prompt,response\n", "m.csv", "no rows in it"),
    _data("an empty .parquet", "m.parquet", b"", "m.parquet"),
    _data("a spoilt .parquet", "m.parquet", b"PAR1" + b"x" * 99 + b"PAR1", "m.parquet"),
    _data("no validation rows", "v.jsonl", "", "v.jsonl", "no rows in it", knob="validation", more=_GOOD),
    _data("no chats", "s.jsonl", "", "s.jsonl", "no rows in it", knob="sft", more=_GOOD),
    _data("no ratings", "h.jsonl", "", "h.jsonl", "no rows in it", knob="helpsteer", more=_GOOD),
    _data("ratings of another form", "h.jsonl", rows(), "h.jsonl, line 1", "helpfulness", knob="helpsteer", more=_GOOD),
    _data("chats without answers", "s.jsonl", '{"prompt": "a"}', "s.jsonl, line 1", knob="sft", more=_GOOD),
    _data("a .csv with a cell too many", "m.csv", "prompt,response\na,b,c\n", "m.csv, row 1"),
    _data("a .csv with a column twice", "m.csv", "prompt,prompt\na,b\n", "m.csv", "'prompt' twice"),
    _data("a .csv in UTF-16", "m.csv", "prompt,response\na,b\n".encode("utf-16"), "m.csv", "UTF-8"),
    _data("a .csv with an open quote", "m.csv", 'prompt,response\n"a,b\n', "m.csv"),
    _data("a .csv with semicolons", "m.csv", "prompt;response\na;b\n", "m.csv, row 1", "prompt;response"),
    _data("a folder of a file's name", "m.jsonl", None, "m.jsonl"),
    _data("an empty folder", "./folder", None, "folder"),
    _data("a file of another kind", "m.txt", "hello", "m.txt", ".jsonl"),
    _data("a line cut short", "m.jsonl", rows() + '{"prompt": "a", "resp', "m.jsonl, line 41"),
    _data("Latin-1", "m.jsonl", '{"prompt": "\xe9"}'.encode("latin1"), "m.jsonl, line 1"),
    _data("an object for a list", "m.json", '{"a": 1}', "m.json", "a list of rows"),
    Bad(
        "data: a saved data set without splits",
        "data r.toml --out made/data --data.rows d",
        ("d/dataset_dict.json",),
        {"d/dataset_dict.json": "{}"},
    ),
    _row("a list for a row", [1, 2], "[1, 2]"),
    _row("nothing for a row", None, "None"),
    _row("NUL in a prompt", {"prompt": "a\0b", "response": "c"}, "prompt is 'a\\x00b'"),
    _row("half a surrogate pair", {"prompt": "\ud800", "response": "c"}, "'\\ud800'"),
    _row("NUL in a chat", {"messages": [{"role": "user", "content": "\0"}]}, "messages[0]", "content"),
    _row("an unknown role", {"messages": [{"role": "bot", "content": "a"}]}, "messages[0]", "'bot'"),
    _row("a number for a content", {"messages": [{"role": "user", "content": 3}]}, "messages[0]", "content is 3"),
    _row("a text for a chat", {"messages": "hi"}, "messages is 'hi'"),
    _row("a number for a prompt", {"prompt": 3, "response": "c"}, "prompt is 3"),
    _row("unknown columns", {"a": 1}, "columns a"),
    _row("a rating in words", {"prompt": "a", "response": "b", "wit": "low"}, "wit is 'low'", more=_WIT),
    _row("a rating off its scale", {"prompt": "a", "response": "b", "wit": 9}, "wit is 9", more=_WIT),
    _data("a rating of 8 among 1 to 5", "m.jsonl", _STRAY, "m.jsonl, line 201", "wit is 8", "[data.scales] wit"),
    _row("a rating of 400 digits", {"prompt": "a", "response": "b", "wit": 10**400}, "wit is 1000", more=_WIT),
    _data("empty prompts alone", "m.jsonl", '{"prompt": " ", "response": "b"}\n', "m.jsonl", "1 empty prompt"),
    _data("a single prompt", "m.jsonl", rows(1), "1 prompts"),
    _data("a scale upside down", "m.jsonl", rows(wit=1), "scales.wit is [4, 0]", more="--data.scales {wit=[4,0]}"),
    _data("a scale of no column", "m.jsonl", rows(), "[data.scales] has wit", more=_WIT),
    Bad("data: no such file", "data r.toml --out made/data --data.rows none.jsonl", ("none.jsonl", "no such file")),
    Bad("data: no such folder", "data r.toml --out made/data --data.rows ./none", ("./none", "no such file or folder")),
    Bad("data: no such variable", "data r.toml --out made/data --data.rows $NOPE/m.jsonl", ("$NOPE/m.jsonl",)),
]


# --- reward functions: tried before any work ---


def _function(name: str, *said: str, source: str = "") -> Bad:
    source = source or f"bad_inputs:{name}"
    text = RECIPE.replace("dpalign.rewards.functions:words", source)
    return Bad(f"function: {name}", "run r.toml --dry-run --out run", (source, *said), {"r.toml": text})


FUNCTIONS: Final = [
    _function("raises", "RuntimeError: no rating", "answer 0 of 2"),
    _function("text", "no numbers", "'good'"),
    _function("numbers_as_text", "no numbers", "'3'"),
    _function("ragged", "no numbers"),
    _function("huge", "1e+30", "1e+12"),
    _function("beyond_float32", "inf"),
    _function("complex_numbers", "no numbers", "complex"),
    _function("not_numbers", "nan"),
    _function("nothing", "shape ()"),
    _function("too_few", "shape (1,)", "2 answers"),
    _function("two_columns", "shape (2, 2)", "1 heads"),
    _function("dates", "no numbers", "datetime"),
    _function("a_generator", "no numbers"),
    _function("of_one_argument", "TypeError"),
    _function("that_leaves", "bad_inputs:that_leaves"),
    _function("without_end", "RecursionError"),
    _function("no_module", "ModuleNotFoundError", source="no_such_module:rate"),
    _function("no_function", "AttributeError", source="bad_inputs:no_such_function"),
    _function("a_number", "is a int", source="bad_inputs:NUMBER"),
    _function("no_form", "module:function", source="bad_inputs"),
]


# --- model folders ---

NAMES: Final = ("helpfulness", "verbosity")
VOCABULARY: Final = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
CLASSIFIER: Final = {"id2label": {"0": "wit", "1": "tact"}, "architectures": ["MistralForSequenceClassification"]}


def write_model(folder: Path, spoil: Callable[[Path], None] = lambda _: None, **config: Any) -> None:
    """A policy with a dial, as small as its files can be; nothing of it can be run."""
    folder.mkdir()
    named = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": len(VOCABULARY), **config}
    tensors = {"model.embed_tokens.weight": np.zeros((len(VOCABULARY), 4), np.float32)}
    if "id2label" in named:
        tensors["score.weight"] = np.zeros((2, 4), np.float32)
    added = [{"id": 2, "content": "</s>", "special": True}]
    files = {
        "config.json": named,
        "tokenizer.json": {"model": {"vocab": VOCABULARY}, "added_tokens": added},
        "tokenizer_config.json": {"eos_token": "</s>", "pad_token": "<unk>"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors")
    (folder / "chat_template.jinja").write_text(chat_template("world-v1", "world-v1", NAMES))
    heads = ("help", "words")
    objectives = {name: (head,) for name, head in zip(NAMES, heads, strict=True)}
    write_contract(folder, Contract("world-v1", "world-v1", objectives, heads, Arc(-45.0, 0.0)))
    spoil(folder)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file."""

    def apply(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return apply


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def reorder(folder: Path) -> None:
    """The objectives of dpa.json the other way round, as a tool may write them that sorts keys."""
    told = json.loads((folder / "dpa.json").read_text())
    told["objectives"] = dict(reversed(told["objectives"].items()))
    (folder / "dpa.json").write_text(json.dumps(told))


def divide(named: str) -> Callable[[Path], None]:
    """An index in place of whole weights, that names some file."""

    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": named}}))

    return apply


ALONE: Final = "--out a/made --policy m --data d --t 0 --condition plain"
USES: Final = {
    "run": "run r.toml --dry-run --out run --sft.checkpoint m",
    "evaluate": f"evaluate r.toml {ALONE} --reward d",
    "sample": f"sample r.toml {ALONE} --half D1",
    "serve": "serve m --port 0",
    "chat": "chat m hello",
    "export": "export m --out mine",
}
"""The commands that take a policy's folder, here m."""


def _model(
    uses: str, name: str, spoil: Callable[[Path], None], *said: str, words: str = "", **config: Any
) -> list[Bad]:
    def make(folder: Path) -> None:
        write_model(folder / "m", spoil, **config)
        (folder / "d").mkdir()
        (folder / "d" / "some").write_text("")

    return [Bad(f"model: {name} ({use})", words or USES[use], said, make=make) for use in uses.split()]


def _listed(*directions: list[int], asked: str = "") -> Bad:
    """A yardstick that lists other directions than are asked for, or a single one."""
    words, spoil = (
        f"steerability m --prompts q.jsonl --out s {asked}",
        edit("dpa.json", distribution="fixed", listed=directions),
    )
    return Bad(words, words, (asked or "m",), {"q.jsonl": rows(2)}, lambda folder: write_model(folder / "m", spoil))


_NO_JSON: Final = replace("config.json", b"{")
_TOO_MANY: Final = edit("tokenizer.json", model={"vocab": VOCABULARY | {"c": 5}})
_CLASSIFIER: Final = (
    "run r.toml --dry-run --out run --rewards.a.function= --rewards.a.model m "
    """--preference.low 0 --objectives '{a = ["a/wit"], b = ["b/score"]}'"""
)
_THREE: Final = {"id2label": {"0": "wit", "1": "tact", "2": "calm"}}
_LETTERS: Final = {"id2label": {"a": "wit", "b": "tact"}}

MODELS: Final = [
    *_model("run evaluate sample serve chat export", "weights cut short", cut, "m/model.safetensors"),
    *_model("run evaluate serve", "weights of bytes", replace("model.safetensors", b"\x80\x04"), "m/model.safetensors"),
    *_model("run evaluate serve", "no weights", remove("model.safetensors"), "m"),
    *_model(
        "run evaluate sample serve chat", "another vocabulary", edit("config.json", vocab_size=9),
        "m/config.json", "vocab_size is 9", "5 rows",
    ),
    *_model("run evaluate serve chat", "a token beyond", _TOO_MANY, "m/tokenizer.json", "'c' is token 5", "of 5"),
    *_model("serve chat", "objectives in another order", reorder, "m/dpa.json", "verbosity, helpfulness"),
    *_model("serve export", "a contract cut short", replace("dpa.json", b'{"format": 2'), "m/dpa.json"),
    *_model("serve", "a contract 200,000 deep", replace("dpa.json", _DEEP.encode()), "m/dpa.json"),
    *_model("serve", "no contract", remove("dpa.json"), "m", "dpa.json"),
    *_model("serve", "a template that is none", replace("chat_template.jinja", b"{% if %}"), "m", "chat template"),
    *_model("run serve chat", "no configuration", remove("config.json"), "m"),
    *_model("run serve", "a configuration cut short", _NO_JSON, "m/config.json"),
    *_model("run", "a configuration 200,000 deep", replace("config.json", _DEEP.encode()), "m/config.json"),
    *_model("run", "a list for a configuration", replace("config.json", b"[]"), "m/config.json"),
    *_model("run", "an index of nothing", divide("gone.safetensors"), "'gone.safetensors'"),
    *_model("run", "an index of another folder", divide("../m.safetensors"), "'../m.safetensors'"),
    *_model("run", "a reward model as a policy", lambda _: None, "ForSequenceClassification", **CLASSIFIER),
    *_model("export", "a classifier", lambda _: None, "m/config.json", "ForSequenceClassification", **CLASSIFIER),
    *_model("run", "a label too many", lambda _: None, "id2label names 3", words=_CLASSIFIER, **CLASSIFIER | _THREE),
    *_model("run", "labels by letters", lambda _: None, "m: ", "id2label", words=_CLASSIFIER, **CLASSIFIER | _LETTERS),
    _listed([1, 0], [1, -1], asked="--directions 3"),
    _listed([1, -1]),
]  # fmt: skip


# --- command lines ---


def _command(words: str, *said: str, files: Mapping[str, Content] | None = None) -> Bad:
    return Bad(words, words, said, files or {})


_NEW: Final = "new x.toml --machine cpu --model a/b --reward sentences"
_ALPACA: Final = "alpaca-eval --out a --instructions i.json"
_ASK: Final = {"i.json": '[{"instruction": "a"}]'}
_SAMPLE: Final = "sample r.toml --out a/made --policy none --data none --half D1 --condition plain"

COMMANDS: Final = [
    _command("rnu", "'rnu'", "run"),
    _command("run", "RECIPE"),
    _command("run r.toml more", "more"),
    _command("run r.toml --out run --until nowhere", "'nowhere'"),
    _command("run r.toml --out", "--out"),
    _command(f"{_SAMPLE} --t 1 --half D3", "--half", "'D3'"),
    _command(f"{_SAMPLE} --t=-1", "--t -1"),
    _command(f"{_SAMPLE} --t 9999", "--t 9999"),
    _command(f"{_SAMPLE} --t 1", "input policy", "none"),
    _command("data r.toml --out a/data --world none", "input world", "none"),
    _command("world world --out a/World", "a/World"),
    _command("world world --out r.toml/world", "r.toml"),
    _command("plan r.toml --gpus 0", "--gpus 0"),
    _command("plan r.toml --price nan", "--price nan"),
    _command("plan r.toml --assume prompts=1e308", "prompts=1e308"),
    _command("plan r.toml --mfu training=2", "training=2"),
    _command("export none --out mine", "none"),
    _command("export r.toml --out mine", "r.toml"),
    _command("export . --out mine --iteration -1", "--iteration -1"),
    _command("export . --out mine --license 'mit\nother: x'", "--license 'mit\\nother: x'"),
    _command("export . --out mine --name 'a\nb'", "--name 'a\\nb'"),
    _command("export . --out mine --name ''", "--name ''"),
    _command("serve none", "none"),
    _command("serve . --grace nan", "--grace nan"),
    _command("serve . --grace inf", "--grace inf"),
    _command("serve . --grace -1", "--grace -1"),
    _command("serve . --threads -1", "--threads -1"),
    _command("serve . --port 99999", "--port 99999"),
    _command("serve . --temperature nan", "--temperature nan"),
    _command("serve . --rows 0", "--rows 0"),
    _command("serve . --max-tokens 0", "--max-tokens 0"),
    _command("serve . --max-queue -1", "--max-queue -1"),
    _command("serve . --api-key-file none", "--api-key-file none"),
    _command("serve . --allow-origin example", "--allow-origin 'example'"),
    _command("serve . --name 'a\nb'", "--name 'a\\nb'"),
    _command("serve . --name a@b", "--name 'a@b'"),
    _command("chat", "MODEL"),
    _command("chat none hello", "none"),
    _command("chat . ''", "empty question"),
    _command("chat . hello --threads -1", "--threads -1"),
    _command("chat . hello --temperature nan", "--temperature nan"),
    _command("chat . hello --max-tokens 0", "--max-tokens 0"),
    _command(f"chat . hello --seed {2**70}", f"--seed {2**70}"),
    _command("chat --url nowhere hello", "--url nowhere"),
    _command("combine one --out made", "1 run"),
    _command("combine one two --out made", "one/report/summary.json"),
    _command("convert-reward none --out made", "none"),
    _command("new r.toml", "r.toml", "exists already"),
    _command("new x.txt", "x.txt", ".toml"),
    _command(f"{_NEW} --data a/b", "'sentences'", "at least two"),
    _command(f"{_NEW} --reward words --data none", "'none'"),
    _command(f"{_NEW} --reward words --data m.jsonl", "m.jsonl", "no rows in it", files={"m.jsonl": ""}),
    _command(f"{_ALPACA} none", "none", files=_ASK),
    _command(f"{_ALPACA} --angles nan", "'nan'", files=_ASK),
    _command(f"{_ALPACA} --limit 0", "--limit", files=_ASK),
    _command(_ALPACA, "i.json", "no instructions", files={"i.json": "[]"}),
    _command("smollm2 --out r.toml", "r.toml"),
    _command("verify nowhere", "nowhere"),
    _command("reproduce nowhere", "nowhere"),
    _command("taste nowhere", "nowhere"),
    _command("taste nowhere --choices 0", "--choices 0"),
    _command("steerability nowhere --prompts q.jsonl --out s", "q.jsonl"),
    _command("steerability --url http://127.0.0.1:1 --prompts q.jsonl --out s", "--by"),
]  # fmt: skip

EVERY: Final = [*KNOBS, *RECIPES, *DATA, *FUNCTIONS, *MODELS, *COMMANDS]


# --- requests ---


def _ask(name: str, said: str, status: int = 400, **fields: Any) -> Request:
    question = {"model": "mine", "messages": [{"role": "user", "content": "name fox."}]}
    return Request(name, question | fields, status, said)


def _says(name: str, content: Any, said: str = "messages", role: str = "user") -> Request:
    return _ask(name, said, messages=[{"role": role, "content": content}])


_ANSWER: Final = {"messages": [{"role": "user", "content": "name fox."}], "response": 3}

REQUESTS: Final = [
    Request("no body", b"", 400, "JSON"),
    Request("a body cut short", b'{"model": "mi', 400, "JSON"),
    Request("a body 200,000 deep", _DEEP.encode(), 400, "body"),
    Request("a body of bytes", b"\xff\xfe\0", 400, "body"),
    Request("a body of 5,000 digits", b'{"n": ' + b"9" * 5000 + b"}", 400, "body"),
    Request("a list for a body", [], 400, "JSON"),
    Request("a body of 2 megabytes", b" " * (2 << 20), 413, "1048576"),
    Request("a route that is none", {}, 404, "/v1/complete", path="/v1/complete", method="GET"),
    Request("a method that is none", {}, 405, "DELETE", method="DELETE"),
    Request("an answer that is no text", _ANSWER, 400, "response", path="/v1/rewards"),
    _ask("another model", "'other'", 404, model="other"),
    _ask("no messages", "messages", messages=[]),
    _ask("a text for messages", "messages", messages="hi"),
    _ask("ids for messages", "messages", messages=[0, 1]),
    _says("an unknown role", "hi", role="bot"),
    _says("an answer at the end", "hi", role="assistant"),
    _says("no content", None),
    _says("a number for a content", 3),
    _says("an empty prompt", ""),
    _says("a prompt of spaces", " \n"),
    _says("NUL in a prompt", "a\0b"),
    _says("half a surrogate pair", "\ud800"),
    _says("an image", [{"type": "image_url", "image_url": {"url": "x"}}]),
    _ask("no tokens", "max_tokens", max_tokens=0),
    _ask("too many tokens", "max_tokens", max_tokens=10**9),
    _ask("a negative temperature", "temperature", temperature=-1),
    _ask("text for a temperature", "temperature", temperature="hot"),
    _ask("too many answers", "n", n=10**6),
    _ask("a seed of 70 bits", "seed", seed=2**70),
    _ask("an empty stop", "stop", stop=[""]),
    _ask("an unknown objective", "'wit'", preference={"wit": 1}),
    _ask("no direction", "zero", preference={"helpfulness": 0, "verbosity": 0}),
    _ask("text for an angle", "angle", angle="low"),
    _ask("two directions", "angle", angle=1, preference={"helpfulness": 1}),
    _ask("no such field", "'angel'", angel=1),
    _ask("tools", "tools", tools=[{"type": "function"}]),
]


# --- reward functions that fail ---

NUMBER: Final = 3


def raises(prompts: list[str], responses: list[str]) -> Any:
    raise RuntimeError("no rating")


def that_leaves(prompts: list[str], responses: list[str]) -> Any:
    raise SystemExit(0)


def text(prompts: list[str], responses: list[str]) -> Any:
    return ["good" for _ in responses]


def numbers_as_text(prompts: list[str], responses: list[str]) -> Any:
    return ["3" for _ in responses]


def ragged(prompts: list[str], responses: list[str]) -> Any:
    return [[1.0] * (i + 1) for i in range(len(responses))]


def huge(prompts: list[str], responses: list[str]) -> Any:
    return [1e30 for _ in responses]


def beyond_float32(prompts: list[str], responses: list[str]) -> Any:
    return [1e300 for _ in responses]


def complex_numbers(prompts: list[str], responses: list[str]) -> Any:
    return np.array([1 + 2j for _ in responses])


def not_numbers(prompts: list[str], responses: list[str]) -> Any:
    return [float("nan") for _ in responses]


def nothing(prompts: list[str], responses: list[str]) -> Any:
    return None


def too_few(prompts: list[str], responses: list[str]) -> Any:
    return [1.0]


def two_columns(prompts: list[str], responses: list[str]) -> Any:
    return [[1.0, 2.0] for _ in responses]


def dates(prompts: list[str], responses: list[str]) -> Any:
    return np.array(["2024-01-01" for _ in responses], dtype="datetime64[D]")


def a_generator(prompts: list[str], responses: list[str]) -> Any:
    return (1.0 for _ in responses)


def of_one_argument(prompts: list[str]) -> Any:
    return [1.0 for _ in prompts]


def without_end(prompts: list[str], responses: list[str]) -> Any:
    return without_end(prompts, responses)
