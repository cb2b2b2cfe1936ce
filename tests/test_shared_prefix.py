"""A prompt read once for all its answers: the same rewards and logits as when each answer has it to itself."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MistralForSequenceClassification,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from dpalign.engines import attention as sharing
from dpalign.engines import decoding
from dpalign.engines.attention import (
    Packed,
    Prefix,
    Unsupported,
    attention,
    merge,
    reason_not_to_share,
    sharing_attention,
)
from dpalign.engines.decoding import CopyingDecoder, SharedDecoder, closing
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.rewards.score import ModelScorer
from dpalign.rewards.shared_prefix import cannot_share, forwards, groups_of, score_shared
from dpalign.rows import user_prompt
from test_scoring import write_classifier

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "num_labels": 3,
}
MODELS = {
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=11),
    "llama, a head a key": LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "llama, one key for all": LlamaConfig(**SMALL | {"num_key_value_heads": 1}),
    "qwen2, one layer with a window": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=11, max_window_layers=1, layer_types=None
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "gemma2 without soft-capping": Gemma2Config(
        **SMALL, head_dim=16, sliding_window=11, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "gemma3, windows in turn": Gemma3TextConfig(
        **SMALL,
        head_dim=16,
        sliding_window=11,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi, rotating half": PhiConfig(**SMALL, partial_rotary_factor=0.5),
}


def classifier(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(MODELS[name], dtype=dtype).eval()


def rows_of(prompts: int = 3, answers: int = 5) -> tuple[list[list[int]], list[int]]:
    """Token rows in no order: 3 prompts of 13 to 29 tokens with 5 answers of 1 to 20, and one with a single answer."""
    rng = np.random.default_rng(0)
    rows, keys = [], []
    for prompt in range(prompts + 1):
        head = rng.integers(3, 97, size=13 + 8 * prompt).tolist()
        for _ in range(answers if prompt < prompts else 1):
            rows.append(head + rng.integers(3, 97, size=rng.integers(1, 21)).tolist())
            keys.append(prompt)
    order = rng.permutation(len(rows))
    return [rows[i] for i in order], [keys[i] for i in order]


@torch.inference_mode()
def one_by_one(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits.float() for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_rewards_equal_those_of_each_answer_read_with_its_prompt(name: str) -> None:
    """In one forward, and in forwards of 60 tokens, where prompts are cut off from some of their answers."""
    model = classifier(name)
    before = model.config._attn_implementation
    rows, keys = rows_of()
    assert cannot_share(model) is None
    expected_NH = one_by_one(model, rows)
    assert expected_NH.std(dim=0).min() > 0.3  # they differ: a wrong order or a blind answer would show
    for budget in (10_000, 60, 1):
        torch.testing.assert_close(score_shared(model, rows, keys, budget), expected_NH, atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == before


def test_in_bfloat16_rewards_agree_to_its_precision() -> None:
    model = classifier("mistral", torch.bfloat16)
    rows, keys = rows_of()
    assert cannot_share(model) is None
    plain_NH, shared_NH = one_by_one(model, rows), score_shared(model, rows, keys, 10_000)
    exact_NH = one_by_one(classifier("mistral"), rows)
    assert (shared_NH - exact_NH).abs().mean() < 1.5 * (plain_NH - exact_NH).abs().mean()


def test_what_a_prompts_answers_have_in_common_is_found_in_their_tokens() -> None:
    """A tokenizer may merge across the boundary; the shortest answer keeps a token of its own, and so does a twin."""
    rows = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [7, 7], [1, 2, 3], [7, 7]]
    groups = groups_of(rows, ["a", "a", "b", "a", "b"])
    assert [(g.prefix.ids, g.members) for g in groups] == [([1, 2], [3, 1, 0]), ([7], [2, 4])]
    assert groups_of([[1, 2]], ["alone"])[0].prefix.ids == []
    assert groups_of([[5], [6, 7]], ["a", "a"])[0].prefix.ids == []


def test_forwards_read_a_prompt_once_and_hold_no_more_tokens_than_allowed() -> None:
    """Prompts of 4 tokens, answers of 3: 14 tokens hold a prompt and 3 answers, then 2 answers and a prompt with 1."""
    rows = [[1, 2, 3, 4, 10 + n, 20, 30] for n in range(5)] + [[5, 6, 7, 8, 10 + n, 20, 30] for n in range(2)]
    groups = groups_of(rows, [0] * 5 + [1] * 2)
    held = list(forwards(groups, rows, 14))
    assert [[g.members for g in forward] for forward in held] == [[[0, 1, 2]], [[3, 4], [5]], [[6]]]
    assert [g.prefix.keep for g in groups] == [True, True]
    assert [[g.members for g in f] for f in forwards(groups, rows, 1)] == [[[n]] for n in range(7)]
    assert len(list(forwards(groups, rows, 1000))) == 1
    assert list(forwards([], [], 10)) == []


def test_a_prompt_is_read_once_however_many_forwards_its_answers_take() -> None:
    model = classifier("mistral")
    rows, keys = rows_of(prompts=1, answers=12)
    group = max(groups_of(rows, keys), key=lambda group: len(group.members))
    read = []
    model.model.register_forward_pre_hook(
        lambda _, __, named: read.append(named["input_ids"].numel()), with_kwargs=True
    )
    score_shared(model, rows, keys, 40)
    shared = len(group.prefix.ids)
    assert len(read) > 3
    assert sum(read) == sum(map(len, rows)) - (len(group.members) - 1) * shared


def test_threads_take_turns_with_a_model() -> None:
    """Its attention is replaced meanwhile: a thread that put it back under another would spoil that one's scores."""
    model = classifier("mistral")
    rows, keys = rows_of()
    expected_NH = one_by_one(model, rows)
    with ThreadPoolExecutor(4) as threads:
        for reward_NH in threads.map(lambda _: score_shared(model, rows, keys, 60), range(12)):
            torch.testing.assert_close(reward_NH, expected_NH, atol=1e-4, rtol=1e-4)
    with sharing_attention(model), pytest.raises(Unsupported, match="keywords"):
        one_by_one(model, rows)


def test_a_model_that_cannot_share_says_why() -> None:
    """Soft-capping, an encoder, a head that does not read the last token, positions that stretch with the batch."""
    small = SMALL | {"head_dim": 16}
    capped = AutoModelForSequenceClassification.from_config(Gemma2Config(**small, sliding_window=11)).eval()
    assert "softcap" in str(cannot_share(capped))
    bert = BertForSequenceClassification(BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}))
    assert "last token" in str(cannot_share(bert.eval()))
    stretched = LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert "dynamic" in str(cannot_share(AutoModelForSequenceClassification.from_config(stretched).eval()))
    odd = MistralConfig(
        **SMALL, sliding_window=None, layer_types=["full_attention", "chunked_attention", "full_attention"]
    )
    assert "chunked_attention" in str(cannot_share(AutoModelForSequenceClassification.from_config(odd).eval()))


class Ahead(MistralForSequenceClassification):
    """A model with positions of its own, in steps of two: its numbers differ where a prompt is shared."""

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        if options.get("position_ids") is None:
            options["position_ids"] = torch.arange(1, input_ids.shape[1] + 1)[None] * 2
        return super().forward(input_ids, **options)


def test_a_model_whose_numbers_would_differ_does_not_share() -> None:
    model = Ahead(MODELS["mistral"]).eval()
    assert "differ by" in str(cannot_share(model))
    plain, numbers = classifier("mistral"), torch.ones(2, 3)

    def reason(theirs: torch.Tensor, layers: int = 3) -> str | None:
        return reason_not_to_share(plain, lambda _: ([numbers], dict.fromkeys(range(layers))), lambda _: [theirs])

    assert reason(numbers) is None
    assert reason(numbers * torch.nan) is not None
    assert reason(numbers, layers=2) is not None  # a layer did not attend


@pytest.mark.parametrize("width", [8, 6])
def test_attention_over_two_sets_of_keys_is_merged_from_each(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the softmax over both; queries that see none of the second set keep the first alone.

    Values of another width than the keys have no fused kernel: plain products, here three queries at a time.
    """
    monkeypatch.setattr(sharing, "BLOCK", 3)
    torch.manual_seed(0)
    query = torch.randn(2, 4, 7, 8)
    (key, value), (key2, value2) = ([torch.randn(2, 2, size, d) for d in (8, width)] for size in (7, 5))
    mask = torch.rand(7, 5) > 0.4
    mask[2] = False
    own = attention(query, key, value, 0.3, causal=True)
    other = attention(query, key2, value2, 0.3, mask=mask)
    seen = torch.cat([torch.ones(7, 7, dtype=torch.bool).tril(), mask], dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([key, key2], dim=2),
        torch.cat([value, value2], dim=2),
        attn_mask=seen,
        scale=0.3,
        enable_gqa=True,
    )
    torch.testing.assert_close(merge(*own, *other), expected, atol=1e-5, rtol=1e-5)
    assert torch.isneginf(other[1][:, :, 2]).all()


@pytest.mark.parametrize("window", [None, 4])
def test_in_the_final_layer_only_what_is_read_attends(window: int | None) -> None:
    """Two prompts with answers of unequal length, one that was read before, and one without answers."""
    before = Prefix([1, 2, 3, 4, 5])
    groups: list[tuple[Prefix, list[list[int]]]] = [
        (Prefix([1, 2, 3, 4, 5, 6, 7]), [[1], [1, 2, 3], [1, 2, 3, 4, 5, 6]]),
        (before, [[1, 2], [3, 4, 5]]),
        (Prefix([1, 2, 3, 4]), []),
    ]
    generator = torch.Generator().manual_seed(0)
    before.cache = {0: (torch.randn(2, 5, 8, generator=generator), torch.randn(2, 5, 8, generator=generator))}
    everywhere, final = Packed(groups, torch.device("cpu")), Packed(groups, torch.device("cpu"), final=0)
    size = everywhere.ids_1T.shape[1]
    query, key, value = (torch.randn(1, heads, size, 8, generator=generator) for heads in (4, 2, 2))
    out, at_ends = (packed.attend(0, query, key, value, 0.35, window) for packed in (everywhere, final))
    last = final.last_N
    torch.testing.assert_close(at_ends[0, last], out[0, last])
    assert len(last) == 6
    others = sorted(set(range(size)) - set(last.tolist()) - {6})  # 6 ends a prompt: attending there costs one query
    assert not at_ends[0, others].any()


@pytest.mark.parametrize("name", MODELS)
def test_decoding_against_shared_prompts_gives_the_logits_of_copied_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of unequal length join, answers end, all of a prompt's and once all there are, windows are passed.

    Shelves of 4, 8, 16, 32 and 64 tokens: answers that joined at different steps stand on one of them.
    """
    monkeypatch.setattr(decoding, "ROOM", 4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    assert decoding.cannot_share(model) is None
    rng = np.random.default_rng(0)
    joining = {0: ([5, 17, 12], [2, 3, 2]), 3: ([20], [3]), 5: ([9, 1], [1, 4]), 20: ([14], [2]), 50: ([7, 8], [2, 1])}
    ending = {4: {1}, 6: {2, 3, 4}, 9: {0}, 13: {8, 14}, 49: set(range(17))}
    decoders = SharedDecoder(model), CopyingDecoder(model, pad=0)
    rows: list[int] = []
    together, joined = set(), 0
    with torch.inference_mode():
        for step in range(60):
            if dead := ending.get(step):
                order = closing([row not in dead for row in rows])
                for decoder in decoders:
                    decoder.keep(order)
                rows = [rows[i] for i in order]
            if rows:
                token_R = torch.tensor([3 + (31 * row + 7 * step) % 94 for row in rows])
                shared, copying = (decoder.read(token_R) for decoder in decoders)
                torch.testing.assert_close(shared, copying, atol=2e-4, rtol=2e-4)
            if step in joining:
                sizes, copies = joining[step]
                prompts = [rng.integers(3, 97, size=size).tolist() for size in sizes]
                shared, copying = (decoder.join(prompts, copies) for decoder in decoders)
                torch.testing.assert_close(shared, copying, atol=1e-4, rtol=1e-4)
                rows += range(joined, joined + sum(copies))
                joined += sum(copies)
            together.add(len(rows))
    assert (joined, sorted(rows)) == (20, [17, 18, 19])
    assert max(together) > 10


def test_a_model_that_keeps_no_keys_is_refused_by_name() -> None:
    model = AutoModelForCausalLM.from_config(Lfm2Config(**SMALL, layer_types=["conv", "full_attention", "conv"]))
    with pytest.raises(ValueError, match=r"lfm2 .*LinearAttentionLayer"):
        CopyingDecoder(model, 0)


def test_a_scorer_warns_once_where_prompts_are_not_shared(
    tmp_path: Path, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Positions that stretch with a batch; a model that shares, and one that is told not to, give no warning."""
    folder = write_classifier(tiny_folder, tmp_path / "model", sliding_window=8)
    options: dict[str, Any] = {"template": "world-v1", "batch_tokens": 512, "dtype": "float32"}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    stretched = write_classifier(tiny_folder, tmp_path / "stretched", rope_parameters=rope)
    with caplog.at_level(logging.WARNING):
        assert ModelScorer(str(folder), **options).shares
        assert not ModelScorer(str(folder), **options, share_prefix=False).shares
        assert TransformersEngine(str(tiny_folder), rows=2).shares
        assert not caplog.records
        scorer = ModelScorer(str(stretched), **options)
        pairs = [(user_prompt("name fox."), answer) for answer in ("fox.", "tea is hot.", "owl")]
        scorer.score(pairs)
        scorer.score(pairs)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert str(stretched) in warning
    assert "dynamic" in warning
