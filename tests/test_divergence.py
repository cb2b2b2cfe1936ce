"""The KL divergence from SFT: log-probabilities of answers, the stage, and what the report makes of it."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tiny
from conftest import MICRO
from dpalign.engines.log_probs import log_probs
from dpalign.engines.tokens import PromptReader
from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.divergence import by_prompt, divergences
from dpalign.measure.points import Rewards
from dpalign.measure.summary import Summary
from dpalign.measure.system import System
from dpalign.pipeline.plan.count import make
from dpalign.pipeline.runner import dry_run, execute, take
from dpalign.pipeline.steps import steps
from dpalign.recipe import Recipe, changed, load
from dpalign.rows import CANDIDATES, DIVERGENCES, PROMPTS, prompt_id, read_rows, user_prompt, write_rows
from dpalign.runs.folder import Run
from dpalign.runs.ledger import read_ledger
from dpalign.stages.divergence import LEFT_OUT, divergence
from dpalign.stages.evaluate import Evaluation
from dpalign.stages.stage import Step
from recorded import Reads, reads_recorded, undeclared

RECIPE = changed(load(MICRO), {"evaluation.divergence": 2})
QUESTIONS = ("name owl.", "explain fox, tea and iron.", "explain rain, salt and wolf.")
SYSTEM = {"role": "system", "content": "helpfulness*97 verbosity*-26"}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with other weights than `tiny_folder`, and the same tokenizer."""
    return tiny.write_model(tmp_path_factory.mktemp("other") / "model", tiny.tokenizer(), scale=0.3, seed=5)


# Log-probabilities of answers


class Coin:
    """A model that finds tokens 0, 1 and 2 likely by 1/2, 1/4 and 1/4, whatever stands before them."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=6))

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> Any:
        logits = torch.tensor([0.5, 0.25, 0.25]).log()
        return SimpleNamespace(logits=logits.expand(len(input_ids), logits_to_keep, 3))


def of_coin(rows: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[float]:
    model: Any = Coin()
    return log_probs(model, rows, temperature=temperature, batch_tokens=8, source="coin").tolist()


def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens() -> None:
    """1/2 x 1/4 = 1/8, and 1/2 x 1/2 x 1/4 = 1/16; an empty answer is certain."""
    rows = [([0], [0, 1]), ([2, 2], [0, 0, 2]), ([1], [])]
    assert of_coin(rows) == pytest.approx([np.log(1 / 8), np.log(1 / 16), 0.0])
    assert of_coin([]) == []


def test_a_temperature_sharpens_as_it_does_in_sampling() -> None:
    """At 1/2 the chances are squared: 1/4, 1/16, 1/16 of 3/8 in all, so 2/3, 1/6, 1/6."""
    assert of_coin([([0], [0, 1])], temperature=0.5) == pytest.approx([np.log(2 / 3 * 1 / 6)])


def test_what_exceeds_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="coin: a prompt and its answer are 7 tokens long, and its context is 6"):
        of_coin([([0, 1, 2], [0, 0, 0, 0])])


def test_memory_that_is_short_for_the_longest_row_is_refused_without_reading_the_others_again() -> None:
    read: list[int] = []

    class Small(Coin):
        """A coin with room for rows of 3 tokens."""

        def __call__(self, input_ids: torch.Tensor, logits_to_keep: int, **more: Any) -> Any:
            read.append(input_ids.shape[1])
            if input_ids.shape[1] > 3:
                raise MemoryError
            return super().__call__(input_ids, logits_to_keep, **more)

    model: Any = Small()
    rows = [([0], [0, 1]), ([0], [0, 1]), ([0, 1], [0, 1, 2])]
    with pytest.raises(ValueError, match="coin: 5 tokens a forward"):
        log_probs(model, rows, temperature=1.0, batch_tokens=5, source="coin")
    assert read == [3, 3, 5]


def alone(model: PreTrainedModel, prompt: list[int], answer: list[int], temperature: float) -> float:
    """One row without padding, all its logits read."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0].double() / temperature
    log_p = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    return float(log_p.gather(1, torch.tensor(answer)[:, None]).sum())


def test_padded_rows_are_read_as_each_is_alone(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="float32").eval()
    rng = np.random.default_rng(1)
    sizes = [(3, 5), (20, 1), (7, 30), (1, 12), (15, 15)]
    rows = [(rng.integers(9, 60, p).tolist(), rng.integers(9, 60, a).tolist()) for p, a in sizes]
    each = [alone(model, *row, 0.7) for row in rows]
    for tokens in (1, 50, 1000):
        assert log_probs(model, rows, temperature=0.7, batch_tokens=tokens, source="") == pytest.approx(each, abs=2e-4)


def test_an_answer_is_read_in_the_tokens_that_sampling_goes_on_with(tiny_folder: Path) -> None:
    reader = PromptReader.load(str(tiny_folder))
    ids = reader.prompt_ids(user_prompt("name owl."))
    prompt, whole = reader.answered(user_prompt("name owl."), "owl is wise.", ended=True)
    _, cut = reader.answered(user_prompt("name owl."), "owl is wise.", ended=False)
    assert prompt == ids
    assert whole == [*cut, reader.ends[0]]
    back = reader.answer(whole)
    assert (back.text, back.tokens, back.finished) == ("owl is wise.", len(whole), True)
    assert reader.answered(user_prompt("name owl."), "", ended=True)[1] == [reader.ends[0]]


# The stage


def row(question: str, response: str, sample: int, tokens: int, asked: Any = None) -> dict[str, Any]:
    chat = user_prompt(question)
    return {
        "prompt_id": prompt_id(chat), "t": 1, "condition_index": 0, "sample": sample, "condition_kind": "direction",
        "condition": [1.0, 0.0], "messages": asked or chat, "response": response, "tokens": tokens,
        "finished": bool(response) and tokens < RECIPE.sampling.max_new_tokens,
    }  # fmt: skip


def measured(
    folder: Path, policy: Path, sft: Path, rows: Sequence[dict[str, Any]], recipe: Recipe = RECIPE
) -> tuple[Path, list[dict[str, Any]]]:
    """The stage on some answers; its folder, and the rows that it wrote."""
    prompts = [{"prompt_id": prompt_id(c), "messages": c, "split": "validation"} for c in map(user_prompt, QUESTIONS)]
    write_rows(folder / "data" / "prompts" / "part-00000.parquet", prompts, PROMPTS)
    by_id = sorted(rows, key=lambda one: str(one["prompt_id"]))
    for i in (0, 1):  # two shards: the first prompt, and the others
        part = [one for one in by_id if (one["prompt_id"] == by_id[0]["prompt_id"]) == (i == 0)]
        write_rows(folder / "evaluated" / "answers" / f"part-{i:05d}.parquet", part, CANDIDATES)
    inputs = {"policy": policy, "sft": sft, "evaluate": folder / "evaluated", "data": folder / "data"}
    with Run.open(folder / "run", None, {"git_commit": None}) as run:
        take(recipe, run, Step("divergence-one", divergence, inputs))
    out = folder / "run" / "divergence-one"
    return out, list(read_rows(out, DIVERGENCES))


ANSWERS = [row(q, text, s, 6) for q in QUESTIONS for s, text in enumerate(("fox is red.", "tea is hot and iron."))]


def test_a_model_does_not_diverge_from_itself(tmp_path: Path, tiny_folder: Path) -> None:
    """On the first two of three prompts, by hash; the answers to the third are counted, not read."""
    out, rows = measured(tmp_path, tiny_folder, tiny_folder, ANSWERS)
    assert len(rows) == 4
    assert {one["prompt_id"] for one in rows} == set(sorted({one["prompt_id"] for one in ANSWERS})[:2])
    assert [one["log_policy"] for one in rows] == pytest.approx([one["log_sft"] for one in rows], abs=1e-6)
    assert all(one["log_policy"] < -5 for one in rows)
    ledger = read_ledger(out)
    assert ledger["counts"] == {"in": 6, "out": 4, "filtered": {LEFT_OUT: 2}}
    assert ledger["tokens"] == {"sampled": 0, "scored": 0, "trained": 0}
    assert by_prompt(out) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_the_policy_reads_its_dial_and_sft_reads_the_prompt_plainly(
    tmp_path: Path, tiny_folder: Path, other: Path
) -> None:
    """Each log-probability is that of one forward over the chat that the model was asked."""
    plain = user_prompt(QUESTIONS[0])
    asked = [SYSTEM, *plain]
    _, (found,) = measured(tmp_path, other, tiny_folder, [row(QUESTIONS[0], "owl is wise.", 0, 6, asked)])
    tokens = AutoTokenizer.from_pretrained(tiny_folder)
    answer = [*tokens("owl is wise.", add_special_tokens=False)["input_ids"], tokens.eos_token_id]
    for folder, chat, name in ((other, asked, "log_policy"), (tiny_folder, plain, "log_sft")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        ids = tokens.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert found[name] == pytest.approx(alone(model, ids, answer, RECIPE.evaluation.temperature), abs=2e-4)
    assert found["tokens"] == len(answer)


def test_a_cut_answer_has_no_end_and_an_empty_one_has(tmp_path: Path, tiny_folder: Path) -> None:
    longest = RECIPE.sampling.max_new_tokens
    rows = [row(QUESTIONS[0], "owl is", 0, longest), row(QUESTIONS[0], "owl is", 1, 4), row(QUESTIONS[0], "", 2, 1)]
    _, found = measured(tmp_path, tiny_folder, tiny_folder, rows)
    cut, whole, empty = (one["tokens"] for one in found)
    assert (cut, empty) == (whole - 1, 1)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "of 3 answers are read in other tokens than they were drawn in" in log


def test_the_mean_over_sampled_answers_estimates_the_divergence(tiny_folder: Path, other: Path) -> None:
    """Over all answers of one token, weighed by the policy's own chances, it is the divergence itself."""
    readers = [PromptReader.load(str(folder)) for folder in (other, tiny_folder)]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval() for folder in (other, tiny_folder)]
    chats = ([SYSTEM, *user_prompt(QUESTIONS[0])], user_prompt(QUESTIONS[0]))
    every = range(models[0].config.vocab_size)
    log_p, log_q = (
        log_probs(
            model, [(reader.prompt_ids(chat), [token]) for token in every],
            temperature=0.7, batch_tokens=4096, source="",
        )
        for model, reader, chat in zip(models, readers, chats, strict=True)
    )  # fmt: skip
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-4)
    assert np.exp(log_q).sum() == pytest.approx(1, abs=1e-4)
    drawn = np.random.default_rng(0).choice(len(log_p), 4000, p=np.exp(log_p) / np.exp(log_p).sum())
    ratio = log_p - log_q
    kl = float(np.exp(log_p) @ ratio)
    assert kl > 0.1
    assert ratio[drawn].mean() == pytest.approx(kl, abs=4 * ratio[drawn].std() / np.sqrt(4000))


def test_what_cannot_be_measured_is_refused(tmp_path: Path, tiny_folder: Path, other: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.divergence is 0"):
        measured(tmp_path, tiny_folder, tiny_folder, ANSWERS, changed(RECIPE, {"evaluation.divergence": 0}))
    with pytest.raises(ValueError, match="divergence is 5 and temperature 0"):
        Evaluation(divergence=5, temperature=0.0)
    assert Evaluation(temperature=0.0).divergence == 0


# In a run


def test_by_prompt_is_the_mean_over_its_answers(tmp_path: Path) -> None:
    """Prompt a: (3 + 1) / 2 = 2. Prompt b: 5."""
    keys = {"t": 1, "condition_index": 0, "tokens": 4}
    rows = [
        {"prompt_id": "b", "sample": 0, "log_policy": -5.0, "log_sft": -10.0},
        {"prompt_id": "a", "sample": 0, "log_policy": -7.0, "log_sft": -10.0},
        {"prompt_id": "a", "sample": 1, "log_policy": -9.0, "log_sft": -10.0},
    ]
    write_rows(tmp_path / "part-00000.parquet", [keys | one for one in rows], DIVERGENCES)
    assert by_prompt(tmp_path).tolist() == [2.0, 5.0]
    evaluated = tmp_path / "evaluate-x"
    system = Rewards(System("X"), ("a", "b"), None, np.zeros((2, 1, 1, 2)), folder=evaluated)
    inputs = {"evaluate-x": evaluated, "divergence-x": tmp_path, "data": tmp_path, "evaluate-y": tmp_path / "y"}
    found = divergences(inputs, [system], Bootstrap(replicates=100))
    assert found["X"].value == 3.5
    assert (found["X"].low, found["X"].high) == (2.0, 5.0)
    assert divergences({"evaluate-x": evaluated}, [system], Bootstrap(replicates=100)) == {}


def test_every_evaluated_policy_has_a_divergence_where_the_recipe_asks_for_it() -> None:
    planned = {step.name: step for step in steps(RECIPE, compared=True)}
    assert planned["divergence-policy-2"].inputs == {
        "policy": "policy-2", "sft": "sft", "evaluate": "evaluate-policy-2", "data": "data",
    }  # fmt: skip
    names = {name.removeprefix("divergence-") for name in planned if name.startswith("divergence-")}
    assert {"policy-1", "policy-2", "steerlm-d2", "sft", "dpo-1", "rl-1-1", "rsf-1"} <= names
    assert not {name for name in names if name.startswith(("soup", "sft-best"))}  # they have no policy of their own
    assert {f"divergence-{name}" for name in names} <= set(planned["report"].inputs)
    without = changed(RECIPE, {"evaluation.divergence": 0})
    assert not [step.name for step in steps(without, compared=True) if step.stage is divergence]


def test_two_models_read_the_sampled_answers_and_the_plan_counts_it() -> None:
    """100 of 2,000 prompts with 20 answers each, by two models: 4,000 readings of 220 + 300 tokens."""
    load_ = make(changed(Recipe(name="paper"), {"evaluation.divergence": 100})).loads["divergence-policy-1"]
    assert load_.read == pytest.approx(2 * 100 * 20 * 520)
    assert load_.scoring > 2 * 7e9 * load_.read  # two FLOPs a weight and token, of about 7 billion
    assert (load_.answers, load_.scored, load_.trained) == (0, 0, 0)
    most = make(changed(Recipe(name="paper"), {"evaluation.divergence": 9999})).loads["divergence-policy-1"]
    assert most.read == pytest.approx(2 * 2000 * 20 * 520)


def test_a_finished_run_gets_its_divergences_and_nothing_else_is_redone(micro_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(micro_run, tmp_path / "micro"))
    recipe = load(MICRO, ["--evaluation.divergence", "3"])
    todo = [step.name for step, verdict in dry_run(recipe, run) if verdict != "done"]
    evaluated = [step.name.partition("-")[2] for step in steps(recipe) if step.name.startswith("evaluate-")]
    assert todo == [*(f"divergence-{name}" for name in evaluated), "report"]
    reads: Reads = {}
    with reads_recorded(reads):
        execute(recipe, run)
    assert undeclared(reads) == {}
    for name in evaluated:
        answers = len(list(read_rows(run / f"evaluate-{name}" / "answers", CANDIDATES)))
        counts = read_ledger(run / f"divergence-{name}")["counts"]
        assert (counts["in"], counts["out"]) == (answers, answers // 2)  # 3 of 6 prompts
        assert len({one["prompt_id"] for one in read_rows(run / f"divergence-{name}", DIVERGENCES)}) == 3
    summary = Summary.model_validate_json((run / "report" / "summary.json").read_text())
    assert all(one.divergence for one in summary.systems.values())
    assert summary.systems["SFT"].divergence.value == pytest.approx(0, abs=1e-4)
    assert all(abs(summary.systems[f"DPA t={t}"].divergence.value) > 1e-3 for t in (0, 1, 2))
    assert [step.name for step, verdict in dry_run(recipe, run) if verdict != "done"] == []
    steered = {"policy": run / "policy-1", "sft": run / "sft", "evaluate": run / "evaluate-policy-2"}
    with (
        pytest.raises(ValueError, match=r"policy-2 drew these answers, not .*policy-1; give the policy that did"),
        Run.open(run, None) as opened,
    ):
        take(recipe, opened, Step("divergence-wrong", divergence, steered | {"data": run / "data"}))
    shutil.copytree(run / "policy-2", run / "policy-copied")  # the same weights in another place drew the same answers
    with Run.open(run, None) as opened:
        copied = steered | {"policy": run / "policy-copied", "data": run / "data"}
        take(recipe, opened, Step("divergence-copied", divergence, copied))
    copy, first = (list(read_rows(run / f"divergence-{name}", DIVERGENCES)) for name in ("copied", "policy-2"))
    assert copy == first
