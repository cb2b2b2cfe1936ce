"""Prompts an hour from sampling to the selected answers, against a plain script in the style of peers.

Five directions a prompt, 16 answers each, all 80 scored on every head, the best of each direction's 16 selected. The
plain script samples a prompt's directions as one padded batch of `generate(num_return_sequences=16)`, and scores either
in shuffled padded batches of 16 or one answer at a time. It is given the engine's own uniforms, so both sides draw the
same answers, which end at their own lengths; that they select the same is checked first.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpalign.chat import with_system_line
from dpalign.engines.engine import Request
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.paper.direction import rng_for
from dpalign.paper.prompts import render_reward_input
from dpalign.paper.selection import best_of_n, scalarize
from dpalign.rewards.score import ModelScorer, Pair
from dpalign.rows import Message
from harness import Row, clock, main, ratio_of, timed
from models import asked, write_policy, write_reward_model
from sampling import Uniforms
from scoring import naive

COMMAND = "python bench/pipeline.py"
ANGLES = np.radians([0.0, -11.25, -22.5, -33.75, -45.0])
V_VK = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
N = 16
END_LOGIT = 4.3
"""Of the end-of-text token, where the policy's own text lies on average: answers end after some eighty tokens."""
TARGET = 3.0


def policy_that_ends(folder: Path, quick: bool) -> Path:
    """A random policy whose answers end at unequal lengths."""
    write_policy(folder, quick)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        own = model.generate(
            torch.arange(4, 52)[None], do_sample=True, top_k=0, num_return_sequences=4, max_new_tokens=32
        )
        hidden_D = model.model(own).last_hidden_state[:, 48:].mean(dim=(0, 1))  # where its own text lies
        model.lm_head.weight[model.config.eos_token_id] = END_LOGIT * hidden_D / hidden_D.square().sum()
    model.save_pretrained(folder)
    return folder


def requests_of(messages: list[Message], prompt: int) -> list[Request]:
    lines = [f"helpfulness*{100 * a:.0f} verbosity*{100 * b:.0f}" for a, b in V_VK]
    return [
        Request(tuple(with_system_line(messages, line, "world-v1")), N, ("pipeline", prompt, i))
        for i, line in enumerate(lines)
    ]


def selected(rewards_NH: np.ndarray) -> list[int]:
    """The best answer of each direction: objectives read from two heads (Eq. 2)."""
    reward_BNK = rewards_NH[:, :2].astype(np.float64).reshape(len(V_VK), N, 2)
    return best_of_n(scalarize(reward_BNK, V_VK)).tolist()


def ours(engine: TransformersEngine, scorer: ModelScorer, prompts: list[list[Message]], new: int) -> list[list[str]]:
    requests = [request for p, messages in enumerate(prompts) for request in requests_of(messages, p)]
    drawn = list(engine.sample(requests, temperature=1.0, max_new_tokens=new))
    texts = [[answer.text for answers in drawn[5 * p : 5 * p + 5] for answer in answers] for p in range(len(prompts))]
    pairs: list[Pair] = [(prompts[p], text) for p, of_prompt in enumerate(texts) for text in of_prompt]
    reward_PNH = scorer.score(pairs).reshape(len(prompts), 5 * N, -1)
    return [
        [of_prompt[N * i + best] for i, best in enumerate(selected(reward_NH))]
        for of_prompt, reward_NH in zip(texts, reward_PNH, strict=True)
    ]


def one_at_a_time(scorer: ModelScorer, pairs: list[Pair]) -> np.ndarray:
    with torch.inference_mode():
        texts = [render_reward_input(*pair, scorer.reader.form) for pair in pairs]
        given = [scorer.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
        return np.concatenate([scorer.model(input_ids=ids, use_cache=False).logits.float().numpy() for ids in given])


def plain(
    engine: TransformersEngine,
    scorer: ModelScorer,
    prompts: list[list[Message]],
    new: int,
    parts: list[tuple[float, float, float]],
) -> list[list[list[str]]]:
    """Selected with scores in batches of 16, and one at a time; `parts` takes the seconds of sampling and of each."""
    start = clock()
    tokens, model = engine.tokenizer, engine.model
    texts = []
    for p, messages in enumerate(prompts):
        requests = requests_of(messages, p)
        tokens.padding_side = "left"
        rendered = [
            tokens.apply_chat_template(list(r.messages), tokenize=False, add_generation_prompt=True) for r in requests
        ]
        given = tokens(rendered, padding=True, add_special_tokens=False, return_tensors="pt")
        uniform_RT = np.stack([rng_for(*r.key, sample).random(new) for r in requests for sample in range(N)])
        out = model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            num_return_sequences=N,
            max_new_tokens=new,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            logits_processor=[Uniforms(uniform_RT)],
        )[:, given["input_ids"].shape[1] :]
        texts.append(tokens.batch_decode(out, skip_special_tokens=True))
    pairs: list[Pair] = [(prompts[p], text) for p, of_prompt in enumerate(texts) for text in of_prompt]
    sampled = clock()
    in_batches = naive(scorer, pairs)
    batched = clock()
    alone = one_at_a_time(scorer, pairs)
    parts.append((sampled - start, batched - sampled, clock() - batched))
    return [
        [
            [of_prompt[N * i + best] for i, best in enumerate(selected(reward_NH))]
            for of_prompt, reward_NH in zip(texts, rewards.reshape(len(prompts), 5 * N, -1), strict=True)
        ]
        for rewards in (in_batches, alone)
    ]


def compare(given: list[list]) -> None:
    chosen, (batched, alone) = given
    if not chosen == batched == alone:
        raise ValueError("the sides select other answers: no figure")


def rows(quick: bool) -> Iterator[Row]:
    rounds, new, count, size = (2, 8, 1, 96) if quick else (3, 192, 1, 256)
    with tempfile.TemporaryDirectory() as folder:
        source = policy_that_ends(Path(folder) / "policy", quick)
        engine = TransformersEngine(str(source), rows=256)
        options = {"template": "world-v1", "batch_tokens": 16_384, "dtype": "float32"}
        scorer = ModelScorer(str(write_reward_model(Path(folder) / "reward", quick)), **options)
        prompts = [asked(source, size, [], seed=seed).messages for seed in range(count)]
        requests = [request for p, messages in enumerate(prompts) for request in requests_of(messages, p)]
        lengths = [a.tokens for drawn in engine.sample(requests, temperature=1.0, max_new_tokens=new) for a in drawn]
        parts: list[tuple[float, float, float]] = []
        sides = [partial(ours, engine, scorer, prompts, new), partial(plain, engine, scorer, prompts, new, parts)]
        ours_R = timed(sides, rounds, warm=False, check=compare)[:, 0]
        sampling_R, *scoring_R = np.array(parts).T
        rate = 3600 * count / float(np.median(ours_R))
        for i, how in enumerate(("in shuffled padded batches of 16", "one answer at a time")):
            yield Row(
                f"from sampling to selected answers, P={size}, 5 directions of n={N}, scored {how}",
                *ratio_of(sampling_R + scoring_R[i], ours_R),
                target=TARGET,
                peer=f"a plain script: generate(num_return_sequences={N}), scores {how}",
                command=COMMAND,
                note=f"{rate:.0f} prompts/h; answers of {np.mean(lengths):.0f} tokens",
            )


if __name__ == "__main__":
    main(rows, "pipeline")
