"""A model's own chat template: the real ones that TRL ships, from the line's place to the last label of an answer."""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

import tiny
from conftest import MICRO
from dpalign import Policy, cli
from dpalign.chat import OwnChat, base_text, render_chat, with_system_line
from dpalign.dial import golden
from dpalign.dial.dial import Dial
from dpalign.dial.doctor.model import examine
from dpalign.dial.server.text import Prompts
from dpalign.engines.engine import Request
from dpalign.engines.sandbox import TODAY, render
from dpalign.engines.templates import find_own_chat
from dpalign.engines.tokens import PromptReader, chat_text, continued, end_ids, keep_own_chat, marks_of, turn_of
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.paper.direction import Preference
from dpalign.pipeline.runner import execute
from dpalign.pipeline.steps import steps
from dpalign.recipe import load
from dpalign.rows import CONVERSATIONS, Message, read_rows
from dpalign.runs.ledger import read_ledger
from dpalign.runs.modelfolder import Marks, read_marks, template_of
from dpalign.train.contract import read_contract
from dpalign.train.knobs import Training
from dpalign.train.rl import configuration, reinforce
from dpalign.train.sft import IGNORED, sft_trainer, tokenize
from trainings import SMALL, context, one_update

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TWO = ("helpfulness", "verbosity")
ASK: Message = {"role": "user", "content": "Why is the sky blue?"}
ANSWER: Message = {"role": "assistant", "content": "Air scatters blue."}
AGAIN: Message = {"role": "user", "content": "And at dusk?"}
KIND: Message = {"role": "system", "content": "Be kind."}
CHATS: list[list[Message]] = [[ASK], [KIND, ASK], [ASK, ANSWER, AGAIN], [KIND, ASK, ANSWER, AGAIN]]
TEXTS = ["Why is the sky blue? Air scatters blue. And at dusk? Be kind.", string.printable, *tiny.TEXTS]

MISTRAL = """\
{{- bos_token }}{% for message in messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {{- "[INST] " + message["content"] + " [/INST]" }}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
"""The form of Mistral 7B Instruct v0.1 to v0.3, which TRL has none of."""


@dataclass(frozen=True)
class Family:
    """A family's template, and the tokens that its tokenizers have."""

    template: str
    end: str
    eos: str
    special: Sequence[str] = ()
    plain: Sequence[str] = ()
    """One token each, and kept in decoded text."""
    bos: str | None = None
    place: str = "system"
    lead: str = ""
    opening: str = ""
    switches: dict[str, Any] = field(default_factory=dict)
    sentencepiece: bool = False

    @property
    def text(self) -> str:
        path = TEMPLATES / f"{self.template}.jinja"
        if self.template != "mistral" and not path.is_file():
            pytest.skip(f"the installed TRL has no {path.name}")
        return MISTRAL if self.template == "mistral" else path.read_text(encoding="utf-8")


def chatml(template: str, **more: Any) -> Family:
    plain = ("<think>", "</think>")
    return Family(template, "<|im_end|>", "<|im_end|>", ("<|endoftext|>", "<|im_start|>"), plain, **more)


LLAMA = ("<|start_header_id|>", "<|end_header_id|>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")
HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>")
DEEPSEEK = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")
SENTENCE_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
THINK = ("<think>", "</think>")
FAMILIES = {
    "Llama 3": Family("llama3", "<|eot_id|>", "<|eot_id|>", LLAMA, bos="<|begin_of_text|>"),
    "Llama 3.1": Family("llama3_1", "<|eot_id|>", "<|eot_id|>", LLAMA, bos="<|begin_of_text|>"),
    "Llama 3.2": Family("llama3_2", "<|eot_id|>", "<|eot_id|>", LLAMA, bos="<|begin_of_text|>",
                        switches={"date_string": "1 Jan 2026"}),
    "Qwen 2.5": chatml("qwen2_5"),
    "Qwen3, thinking": chatml("qwen3", lead="<think>\n\n</think>\n\n"),
    "Qwen3, not thinking": chatml("qwen3", switches={"enable_thinking": False}),
    "Qwen3 2507": chatml("qwen3_instruct_2507"),
    "Qwen3.5, thinking": chatml("qwen3_5_think", lead="\n</think>\n\n"),
    "Qwen3.5, not thinking": chatml("qwen3_5_think", switches={"enable_thinking": False}),
    "Gemma 1": Family("gemma", "<end_of_turn>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), bos="<bos>",
                      place="user", sentencepiece=True),
    "Gemma 3": Family("gemma3", "<end_of_turn>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), bos="<bos>",
                      sentencepiece=True),
    "Gemma 4": Family("gemma4", "<turn|>", "<eos>", ("<|turn>", "<turn|>"), bos="<bos>", sentencepiece=True),
    "Phi 3": Family("phi3", "<|end|>", "<|endoftext|>", PHI, bos="<s>", sentencepiece=True),
    "Phi 3.5": Family("phi3_5", "<|end|>", "<|endoftext|>", PHI, bos="<s>", sentencepiece=True),
    "Cohere": Family("cohere", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", COHERE, bos="<BOS_TOKEN>"),
    "Cohere 2": Family("cohere2", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
                       (*COHERE, "<|START_RESPONSE|>", "<|END_RESPONSE|>"), bos="<BOS_TOKEN>"),
    "DeepSeek R1 distill": Family("deepseek_r1_distill", SENTENCE_END, SENTENCE_END, DEEPSEEK, THINK, bos=BEGIN,
                                  lead="\n</think>\n\n"),
    "DeepSeek V3": Family("deepseekv3", SENTENCE_END, SENTENCE_END, DEEPSEEK, THINK, bos=BEGIN,
                          lead="\n</think>\n\n"),
    "GLM 4 MoE": Family("glm4moe", "<|endoftext|>", "<|endoftext|>",
                        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"), THINK,
                        lead="\n<think></think>\n"),
    "GLM 4 MoE, not thinking": Family("glm4moe", "<|endoftext|>", "<|endoftext|>",
                                      ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"), THINK,
                                      lead="\n", switches={"enable_thinking": False}),
    "GPT-OSS": Family("gptoss", "<|return|>", "<|return|>", HARMONY, opening="<|channel|>final<|message|>"),
    "Nemotron 3, not thinking": chatml("nemotron_3_nano", switches={"enable_thinking": False}),
    "LFM2": chatml("lfm2", bos="<|startoftext|>"),
    "LFM2.5": chatml("lfm2_2_5", bos="<|startoftext|>"),
    "Muse": Family("muse_glimmer", "<|eot|>", "<|eot|>", ("<|start|>", "<|message|>"), bos="<|begin|>",
                   opening=" to=user<|message|>"),
    "Mistral Instruct": Family("mistral", "</s>", "</s>", ("[INST]", "[/INST]"), bos="<s>", place="user", lead=" ",
                               sentencepiece=True),
}  # fmt: skip
every_family = pytest.mark.parametrize("name", list(FAMILIES))


@cache
def trained(sentencepiece: bool, legacy: bool = False) -> str:
    """A tokenizer's JSON: a byte-level BPE, or one that writes spaces as SentencePiece does.

    Args:
        legacy: every piece of text after a special token gets a space, as in the first Llamas.
    """
    if sentencepiece:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if legacy:
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        space = decoders.Replace("\u2581", " ")
        tokenizer.decoder = decoders.Sequence(
            [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [chr(c) for c in range(33, 127)]
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("\n", "") for text in TEXTS] * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:1] if sentencepiece else []  # bytes are tokens of the model
    return json.dumps(content)


def tokenizer_of(family: Family, legacy: bool = False) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with the family's special tokens and its template; pad is the end of text."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained(family.sentencepiece, legacy)),
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.eos,
    )
    special = [AddedToken(token, special=True, normalized=False) for token in (*family.special, family.end)]
    if family.end.count("<") > 1:
        special.pop()
    fast.add_tokens(special, special_tokens=True)
    fast.add_tokens([AddedToken(token, normalized=False) for token in family.plain])
    fast.chat_template = family.text
    return fast


def asked(tokens: PreTrainedTokenizerFast, messages: Sequence[Message], **given: Any) -> str:
    text: str = tokens.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **given)
    return text


@pytest.fixture(autouse=True)
def one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some templates write today's date: transformers' clock stands where ours does."""
    from transformers.utils import chat_template_utils

    class Clock:
        now = staticmethod(lambda: TODAY)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock, raising=True)
    chat_template_utils._compile_jinja_template.cache_clear()


# --- the line


@every_family
def test_the_line_stands_once_after_the_users_own_words_or_opens_the_first_turn(name: str) -> None:
    family = FAMILIES[name]
    tokens, plain = tokenizer_of(family), tokenizer_of(family)
    own = keep_own_chat(tokens, family.switches, name, "dpa-v1", TWO)
    assert (own.place, own.opening) == (family.place, family.opening)
    line = Dial(TWO, "dpa-v1", "model").line(Preference.from_angle(-30, TWO))
    for messages in CHATS:
        if family.place == "system" or messages[0]["role"] != "system":
            assert asked(tokens, messages) == asked(plain, messages, **family.switches) + family.opening
        text = asked(tokens, messages, angle=-30)
        assert text == asked(tokens, messages, preference=Preference.from_angle(-30, TWO).weights)
        assert text == asked(tokens, with_system_line(messages, line, "model"))
        assert text.count(line) == 1
        assert text.index(line) < text.index(ASK["content"])
        if messages[0]["role"] == "system":
            assert f"{KIND['content']}\n{line}" in text
        if family.place == "user":
            assert f"{line}\n\n{ASK['content']}" in text


@every_family
def test_python_and_jinja_write_the_same_prompt(name: str) -> None:
    family = FAMILIES[name]
    tokens = tokenizer_of(family)
    own = keep_own_chat(tokens, family.switches, name, "fig1", TWO)
    dial, form = Dial(TWO, "fig1", "model"), golden.Form(marks_of(tokens).named, own)
    for messages in CHATS:
        for angle in (0, -17, -45):
            meant = golden.expected(dial, messages, dial.read(angle=angle), form)
            assert meant == render(tokens.chat_template, messages, angle=angle, **form.tokens)
            assert meant == asked(tokens, messages, angle=angle)


@every_family
def test_a_policys_template_gives_the_models_own_back(name: str) -> None:
    family = FAMILIES[name]
    tokens = tokenizer_of(family)
    once = keep_own_chat(tokens, family.switches, name)
    with pytest.raises(ValueError, match="takes no preference"):
        chat_text(tokens, [ASK], angle=-10)
    assert base_text(tokens.chat_template).removesuffix("\n") == family.text.removesuffix("\n")
    again = keep_own_chat(tokens, family.switches, name, "dpa-v1", TWO)
    assert again == replace(once, base=again.base)
    assert keep_own_chat(tokens, family.switches, name, "dpa-v1", TWO) == again


def test_a_switch_is_a_default_that_a_caller_may_override() -> None:
    family = FAMILIES["Qwen3, not thinking"]
    tokens, plain = tokenizer_of(family), tokenizer_of(family)
    keep_own_chat(tokens, family.switches, "Qwen3", "dpa-v1", TWO)
    assert asked(tokens, [ASK]).endswith("<think>\n\n</think>\n\n")
    assert asked(tokens, [ASK], enable_thinking=True) == asked(plain, [ASK], enable_thinking=True)


def test_tools_go_on_working_beside_the_line() -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": {}}}
    for name in ("Qwen 2.5", "Llama 3.1"):
        tokens = tokenizer_of(FAMILIES[name])
        keep_own_chat(tokens, {}, name, "dpa-v1", TWO)
        text = asked(tokens, [ASK], angle=-30, tools=[tool])
        assert '"weather"' in text
        assert text.count("helpfulness*87") == 1


def test_texts_in_parts_as_servers_send_them_carry_the_line_too() -> None:
    """vLLM hands over lists of parts where a template reads them; Gemma 3 reads a system message's first part alone."""
    tokens = tokenizer_of(FAMILIES["Gemma 3"])
    keep_own_chat(tokens, {}, "Gemma 3", "dpa-v1", TWO)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in (KIND, ASK)]
    assert asked(tokens, parts, angle=-30) == asked(tokens, [KIND, ASK], angle=-30)
    assert asked(tokens, parts[1:], angle=-30).count("helpfulness*87") == 1
    reads_parts = replace(find_own_chat(tokens.chat_template, marks_of(tokens), {}, ""), place="user")
    tokens.chat_template = reads_parts.template("dpa-v1", TWO)
    assert asked(tokens, parts, angle=-30) == asked(tokens, [KIND, ASK], angle=-30)


def test_a_template_that_drops_system_messages_has_the_line_in_the_users_turn() -> None:
    text = FAMILIES["Gemma 1"].text.replace("{{ raise_exception('System role not supported') }}", "")
    tokens = tokenizer_of(FAMILIES["Gemma 1"])
    tokens.chat_template = text.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    assert asked(tokens, [KIND, ASK]) == asked(tokens, [ASK])
    assert keep_own_chat(tokens, {}, "deaf", "dpa-v1", TWO).place == "user"
    assert asked(tokens, [ASK], angle=-30).count("helpfulness*87") == 1


def test_the_line_can_stand_before_the_users_words_where_a_template_has_a_system_turn() -> None:
    """As the recipe asks; the template goes on writing its own default system message."""
    name, family = "Qwen3, not thinking", FAMILIES["Qwen3, not thinking"]
    tokens = tokenizer_of(family)
    own = keep_own_chat(tokens, family.switches, name, "world-v1", TWO, place="user")
    assert own.place == "user"
    text = tokens.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True, angle=0)
    assert f"user\nhelpfulness*100 verbosity*0\n\n{ASK['content']}<|im_end|>" in text
    line = with_system_line([ASK], "helpfulness*100 verbosity*0", "model")
    assert tokens.apply_chat_template(own.placed(line), tokenize=False, add_generation_prompt=True) == text
    with pytest.raises(ValueError, match=r"system's turn .* leave model\.place out"):
        keep_own_chat(tokenizer_of(FAMILIES["Gemma 1"]), {}, "Gemma 1", place="system")


@pytest.mark.parametrize(
    "base",
    [
        "  \n{{ messages[0]['content'] }}\n\n",
        "\n{%- if true %}\n  x {{ messages[-1]['content'] }}\n{% endif %} \n",
        "{# c #}\ny",
    ],
)
def test_white_space_around_the_models_own_text_stays(base: str) -> None:
    for opening in ("", "<|channel|>"):
        own = OwnChat(base, opening=opening)
        wrapped = own.template()
        assert render(wrapped, [ASK]) == render(base, [ASK]) + opening
        assert render(wrapped, [ASK], False) == render(base, [ASK], False)
        assert render(base_text(wrapped), [ASK]) == render(base, [ASK])


# --- tokens


@every_family
def test_training_sampling_and_serving_read_the_same_tokens(name: str, tmp_path: Path) -> None:
    """A policy's folder, asked by a direction; training's own row has the line in a system message."""
    family = FAMILIES[name]
    tokens = tokenizer_of(family)
    keep_own_chat(tokens, family.switches, name, "dpa-v1", TWO)
    tokens.save_pretrained(tmp_path)
    reader, served = PromptReader.load(str(tmp_path), family.switches), Prompts(str(tmp_path))
    direction = Preference.from_angle(-30, TWO)
    line = Dial(TWO, "dpa-v1", "model").line(direction)
    for messages in CHATS:
        lined = with_system_line(messages, line, "model")
        row: dict[str, Any] = {"messages": lined, "response": ANSWER["content"]}
        (trained_row,) = tokenize([row], tokens, Training(loss_on="answer"))
        learnt = [label for label in trained_row["labels"] if label != IGNORED]
        prompt = trained_row["input_ids"][: -len(learnt)]
        assert trained_row["labels"] == [IGNORED] * len(prompt) + learnt
        assert prompt + learnt == trained_row["input_ids"]
        assert prompt == reader.prompt_ids(lined) == served._ids(messages, direction.weights)
        assert prompt == tokens.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False, angle=-30
        )
        if family.bos and "bos_token" in family.text:
            assert prompt.count(tokens.bos_token_id) == 1
        written = tokens.decode(learnt, skip_special_tokens=False)
        assert written.removeprefix(" ") == f"{family.lead.removeprefix(' ')}{ANSWER['content']}{family.end}"
        assert learnt[-1] == reader.ends[0]
        assert reader.answer(learnt).text == ANSWER["content"]
        assert reader.answer(learnt).whole
    served.close()


@every_family
def test_an_answer_is_written_as_the_models_own_template_writes_it(name: str) -> None:
    """Up to its end; but where a thinking template writes a past answer in another form than it asks for."""
    family = FAMILIES[name]
    plain, tokens = tokenizer_of(family), tokenizer_of(family)
    keep_own_chat(tokens, family.switches, name)
    turn = turn_of(tokens)
    assert (turn.lead, turn.end) == (family.lead, family.end)
    whole: str = plain.apply_chat_template([ASK, ANSWER], tokenize=False, **family.switches)
    said = asked(tokens, [ASK]) + turn.written(ANSWER["content"])
    if name.startswith("DeepSeek"):
        assert said.replace("<think>\n\n</think>\n\n", "") == whole
    elif name.startswith("GLM"):
        assert said == f"{whole}<|endoftext|>"  # its own ends nowhere: the next turn's token does
    else:
        assert whole.startswith(said)
        assert whole[len(said) :].strip() in ("", family.eos)


def test_an_answer_that_brings_its_thoughts_is_trained_as_it_was_drawn() -> None:
    for name in ("Qwen3, thinking", "Qwen3.5, thinking", "DeepSeek R1 distill"):
        tokens = tokenizer_of(FAMILIES[name])
        keep_own_chat(tokens, {}, name)
        turn, reader = turn_of(tokens), PromptReader(tokens, end_ids(tokens, None))
        thoughts = "<think>\nHm.\n</think>\n\nAir." if name == "Qwen3, thinking" else "Hm.\n</think>\n\nAir."
        for text in (thoughts, "Air."):
            _, ids = continued(tokens, asked(tokens, [ASK]), turn.written(text))
            assert reader.answer(ids).text == text
        assert turn.written(thoughts) == thoughts + turn.end


@pytest.mark.parametrize("legacy", [False, True])
def test_a_sentencepiece_answer_gains_no_space(legacy: bool) -> None:
    """Zephyr's tag ends with a line break: what follows is the first word of a line, and not of a text."""
    family = replace(FAMILIES["Mistral Instruct"], special=())
    tokens = tokenizer_of(family, legacy)
    tokens.chat_template = "{{ bos_token }}<|user|>\n{{ messages[0]['content'] }}</s>\n" + (
        "{% for m in messages[1:] %}<|assistant|>\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    (row,) = tokenize([{"messages": [ASK], "response": "Air scatters."}], tokens, Training(loss_on="answer"))
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert not tokens.convert_ids_to_tokens(learnt)[0].startswith("\u2581")
    assert row["input_ids"] == tokens(asked(tokens, [ASK]) + "Air scatters.</s>", add_special_tokens=False)["input_ids"]
    alone = tokens("Air scatters.</s>", add_special_tokens=False)["input_ids"]
    assert tokens.convert_ids_to_tokens(alone)[0].startswith("\u2581")


def test_a_token_that_would_cross_the_border_is_cut_there() -> None:
    tokens = tokenizer_of(FAMILIES["Qwen 2.5"])
    tokens.add_tokens(["\n\n"])
    prompt = "<|im_start|>assistant\n"
    whole = tokens(f"{prompt}\nAir", add_special_tokens=False)["input_ids"]
    asked_ids, learnt = continued(tokens, prompt, "\nAir")
    assert asked_ids == tokens(prompt, add_special_tokens=False)["input_ids"]
    assert whole[: len(asked_ids)] != asked_ids
    assert tokens.decode(learnt) == "\nAir"
    metaspace = tokenizer_of(replace(FAMILIES["Mistral Instruct"], special=()))
    asked_ids, learnt = continued(metaspace, "Answer: ", "Air")
    assert metaspace.convert_ids_to_tokens(learnt)[0][0] == "A"
    assert metaspace.decode(asked_ids + learnt) == "Answer: Air"


# --- ends


def write_llama(folder: Path, tokens: PreTrainedTokenizerFast, **config: Any) -> Path:
    """A tiny random Llama whose configuration knows the tokenizer's end of text alone."""
    set_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 1024, "vocab_size": len(tokens)}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1, eos_token_id=tokens.eos_token_id, **config))
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def apart(template: str = "qwen2_5") -> Family:
    """ChatML whose end of a turn is no eos_token, as in Qwen's base models; eos is pad too."""
    return replace(chatml(template), eos="<|endoftext|>", special=("<|im_start|>", "<|im_end|>", "<|stop|>"))


def test_generation_stops_at_every_end_and_at_nothing_else(tmp_path: Path) -> None:
    """The template's end, the tokenizer's, and those that the model's generation_config names."""
    tokens = tokenizer_of(apart())
    folder = write_llama(tmp_path / "m", tokens)
    known = tokens.get_vocab()
    GenerationConfig(eos_token_id=[known["<|stop|>"]]).save_pretrained(folder)
    engine = TransformersEngine(str(folder), {}, rows=64)
    ends = ["<|im_end|>", "<|endoftext|>", "<|stop|>"]
    assert engine.reader.stop == tuple(ends)
    with torch.no_grad():
        head = engine.model.lm_head.weight
        head.copy_(head * 0.05)
    (answers,) = engine.sample([Request((ASK,), 64, (1,))], temperature=1.0, max_new_tokens=200)
    assert 10 < sum(answer.finished for answer in answers) < 64
    drawn = [answer.tokens for answer in answers]
    assert all(answer.finished or answer.tokens == 200 for answer in answers)
    assert max(drawn) == 200
    for end in ends:
        ids = tokens("Air.", add_special_tokens=False)["input_ids"]
        assert engine.reader.answer([*ids, known[end]]) == replace(engine.reader.answer(ids), tokens=len(ids) + 1,
                                                                     finished=True)  # fmt: skip


def test_a_trained_folder_stops_where_its_template_does_and_trains_its_end_though_pad_is_eos(tmp_path: Path) -> None:
    tokens = tokenizer_of(replace(apart(), eos="<|im_end|>"))
    assert tokens.pad_token == tokens.eos_token == "<|im_end|>"
    keep_own_chat(tokens, {}, "tiny")
    folder = write_llama(tmp_path / "m", tokens)
    rows = list(tokenize(tiny.CHATS, tokens, Training(loss_on="answer")))
    training = SMALL.model_copy(update={"steps": 1, "context": 512, "batch": 6, "micro_batch": 6})
    how = context(tmp_path / "out", training, folder, tokens)
    update = one_update(folder, lambda model: sft_trainer(model, rows, how))
    (forward,) = update.forwards
    learnt = [[label for label in labels if label != IGNORED] for labels in forward["labels"].tolist()]
    assert sorted(learnt) == sorted([x for x in row["labels"] if x != IGNORED] for row in rows)
    assert all(labels[-1] == tokens.eos_token_id for labels in learnt)
    lengths = sorted(len(row["input_ids"]) for row in rows)
    assert sorted(forward["attention_mask"].sum(dim=1).tolist()) == lengths


def test_reinforcement_ends_answers_where_sampling_does(tmp_path: Path) -> None:
    tokens = tokenizer_of(apart())
    keep_own_chat(tokens, {}, "tiny")
    folder = write_llama(tmp_path / "m", tokens)
    training = SMALL.model_copy(update={"steps": 1, "batch": 32, "micro_batch": 32})
    how = context(tmp_path / "out", training, folder, tokens)
    seen: list[list[int]] = []

    def reward(completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
        seen.extend(list(ids) for ids in completion_ids)
        return [0.0] * len(completion_ids)

    config = configuration(how, samples=32, max_new_tokens=150, beta=0.0)
    reinforce(how, [[ASK]], config, reward)
    ends = end_ids(tokens, None)
    assert ends == [tokens.convert_tokens_to_ids("<|im_end|>"), tokens.eos_token_id]
    assert {ids[-1] for ids in seen if len(ids) < 150} <= set(ends)
    assert any(ids[-1] == ends[0] for ids in seen)
    assert not any(end in ids[:-1] for ids in seen for end in ends)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == ends


@pytest.mark.vllm
def test_vllm_reads_and_ends_as_the_transformers_engine_does(tmp_path: Path) -> None:
    from dpalign.engines.knobs import Engines
    from dpalign.engines.vllm_engine import Vllm, VllmEngine

    tokens = tokenizer_of(replace(apart(), template="gemma", special=("<start_of_turn>", "<end_of_turn>")))
    folder = write_llama(tmp_path / "m", tokens, head_dim=32)
    ours = TransformersEngine(str(folder), {}, rows=16)
    assert ours.reader.stop == ("<end_of_turn>", "<|endoftext|>")
    line = "helpfulness*87 + verbosity*-50"
    lined = [with_system_line([{"role": "user", "content": f"{text}?"}], line, "model") for text in "abcdefgh"]
    requests = [Request(tuple(messages), 1, (i,)) for i, messages in enumerate(lined)]
    settings = Engines(sampling="vllm", scoring="vllm")
    vllm = VllmEngine(Vllm(str(folder), settings, rows=16, prompt_tokens=64, max_new_tokens=64), {})
    for temperature in (0.0, 1.0):
        answers = [
            [one for (one,) in engine.sample(requests, temperature=temperature, max_new_tokens=400)]
            for engine in (ours, vllm)
        ]
        assert [vllm.reader.prompt_ids(messages) for messages in lined] == list(map(ours.reader.prompt_ids, lined))
        if temperature == 0:
            assert answers[0] == answers[1]
        else:
            assert all(any(answer.finished for answer in of_engine) for of_engine in answers)
            assert all(answer.finished or answer.tokens == 400 for of_engine in answers for answer in of_engine)
    vllm.close()


# --- what is refused


ASKED_ALONE = "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('users only') }}{% endif %}"
PLAIN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
GO = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no chats') }}", "no chats"),
        ("{% for m in messages %}", "no Jinja"),
        (ASKED_ALONE + "?{% endfor %}", "a system message is refused .*users only.*; before the user's first words it"),
        (ASKED_ALONE + "{{ m['content'] }}{% endfor %}", "users only"),
        (PLAIN.replace("m['content'] }}", "m['content'] | upper }}") + GO, "a system message is written 0 times"),
        (PLAIN.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}") + GO, "2 times"),
        (PLAIN.replace("{% for", "{% set messages = messages | rejectattr('role', 'eq', 'assistant') | list %}{% for"),
         "answer .* altered or not at all"),
        (PLAIN.replace("}}<|im_end|>", "}}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}<|im_end|>"),
         "answer .* twice"),
        (PLAIN.replace("<|im_end|>", "[end]") + GO, r"ends an answer with '\[end\]', which is no single token"),
        ("{% for m in messages %}{{ m['content'] | reverse }}{% endfor %}", "0 times"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_carry_the_dial_is_refused_before_any_work(
    template: str | None, why: str, tmp_path: Path
) -> None:
    tokens = tokenizer_of(FAMILIES["Qwen 2.5"])
    folder = write_llama(tmp_path / "m", tokens)
    if template is None:
        (folder / "chat_template.jinja").unlink()
    else:
        (folder / "chat_template.jinja").write_text(template)
    recipe = load(MICRO, ["--model.base", str(folder), "--model.chat", "model", "--sft.checkpoint", str(folder)])
    with pytest.raises(ValueError, match=why) as error:
        steps(recipe)
    assert str(error.value).startswith(f"{folder}: ")
    assert 'model.chat = "zephyr"' in str(error.value)


def test_a_model_of_the_hub_is_looked_at_when_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run needs no network; a run fetches the tokenizer's files alone before anything else."""
    theirs = tmp_path / "theirs"
    tokenizer_of(FAMILIES["Qwen 2.5"]).save_pretrained(theirs)
    (theirs / "chat_template.jinja").write_text("{{ raise_exception('no chats') }}")
    asked_for: list[str] = []

    def download(name: str, allow_patterns: Sequence[str], revision: str | None) -> str:
        asked_for.append(name)
        assert revision is None
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        return str(theirs)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    recipe = load(MICRO, ["--model.base", "them/model", "--model.chat", "model", "--sft.checkpoint", "them/model"])
    assert steps(recipe)
    assert asked_for == []
    with pytest.raises(ValueError, match=r"them/model: its chat template .* no chats"):
        execute(recipe, tmp_path / "run")
    assert asked_for == ["them/model"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava_next"])
def test_templates_of_image_models_that_read_no_plain_text_are_refused(name: str) -> None:
    family = Family(name, "<end_of_utterance>", "<end_of_utterance>", ("<|im_start|>",))
    with pytest.raises(ValueError, match=f"{name}: its chat template cannot carry the dial"):
        keep_own_chat(tokenizer_of(family), {}, name)


def test_a_switch_that_the_template_does_not_read_is_refused() -> None:
    tokens = tokenizer_of(FAMILIES["Qwen3, thinking"])
    for name in ("enable_thinkin", "messages", "eos_token"):
        with pytest.raises(ValueError, match=f"model.chat_kwargs has '{name}', .*nearest: 'enable_thinking'|known: "):
            keep_own_chat(tokens, {name: False}, "Qwen3")


def test_switches_go_with_the_models_own_template(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='chat = "model"'):
        load(MICRO, ["--model.chat_kwargs.enable_thinking", "false"])
    with pytest.raises(ValueError, match="trained from scratch has no template"):
        steps(load(MICRO, ["--model.chat", "model"]))
    recipe = load(MICRO, ["--model.chat", "model", "--model.chat_kwargs", '{enable_thinking = false, tone = "dry"}'])
    assert recipe.model.chat_kwargs == {"enable_thinking": False, "tone": "dry"}
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert load(tmp_path / "again.toml") == recipe


def test_tokens_read_from_files_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    for name, family in FAMILIES.items():
        tokens = tokenizer_of(family)
        tokens.save_pretrained(tmp_path / name)
        assert read_marks(tmp_path / name) == marks_of(AutoTokenizer.from_pretrained(tmp_path / name)), name


# --- a whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every step of micro.toml, from a random Llama with Qwen3's template, which stands for SFT itself."""
    scratch = tmp_path_factory.mktemp("own-chat")
    tokens = tokenizer_of(replace(apart(), template="qwen3"))
    base = str(write_llama(scratch / "base", tokens))
    words = ["--model.base", base, "--model.chat", "model", "--sft.checkpoint", base]
    words += ["--model.chat_kwargs", "{enable_thinking = false}", "--preference.template", "dpa-v1"]
    for table in ("reward.training", "steerlm.training", "finetune"):
        words += [f"--{table}.context", "400"]
    words += ["--sampling.prompt_tokens", "300", "--sampling.max_new_tokens", "150"]
    return execute(load(MICRO, words), scratch / "run")


def test_a_chat_model_runs_from_itself_to_its_page(run: Path) -> None:
    assert (run / "report" / "index.html").is_file()
    assert not (run / "sft" / "model").exists()
    folder = run / "policy-2" / "model"
    contract = read_contract(folder)
    assert contract is not None
    assert (contract.chat, contract.place, contract.chat_kwargs) == ("model", "system", {"enable_thinking": False})
    assert contract.stop == ("<|im_end|>", "<|endoftext|>")
    base = template_of(run.parent / "base")
    assert base is not None
    for policy in (folder, run / "steerlm-d2" / "model"):
        template = template_of(policy)
        assert template is not None
        assert base_text(template) == base
        known = AutoTokenizer.from_pretrained(policy)
        ends = [known.convert_tokens_to_ids(token) for token in contract.stop]
        assert GenerationConfig.from_pretrained(policy).eos_token_id == ends
    assert read_ledger(run / "policy-2")["knobs"]["model.chat_kwargs.enable_thinking"] is False


def test_its_export_asks_and_stops_as_its_training_did(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    cli.main(["export", str(run), "--out", str(out)])
    content = json.loads((out / "dpa.json").read_text())
    assert (content["chat"], content["place"], content["chat_kwargs"]) == (
        "model",
        "system",
        {"enable_thinking": False},
    )
    assert content["stop"] == ["<|im_end|>", "<|endoftext|>"]
    faults = [finding for finding in examine(out) if finding.level == "bad"]
    assert faults == []
    dial, tokens, served = Dial.load(out), AutoTokenizer.from_pretrained(out), Prompts(str(out))
    rows = [row for row in read_rows(run / "select-2", CONVERSATIONS) if row["origin"] == "selected"]
    assert rows
    for row in rows:
        line = row["messages"][0]["content"]
        weights = {name: float(n) for name, _, n in (part.partition("*") for part in line.split("= ")[1].split(" + "))}
        question = row["messages"][1:]
        (trained_row,) = tokenize([row], tokens, Training(loss_on="answer"))
        ids = served._ids(question, dial.read(weights).weights)  # type: ignore[union-attr]
        assert trained_row["input_ids"][: len(ids)] == ids
        assert trained_row["labels"][len(ids) - 1] == IGNORED != trained_row["labels"][len(ids)]
        assert trained_row["labels"][-1] == tokens.convert_tokens_to_ids("<|im_end|>")
    served.close()
    prompts = golden.read_golden(out)
    assert len(prompts) == 8
    for one in prompts:
        assert asked(tokens, one.messages, preference=one.preference) == one.text


def test_it_is_served_with_the_ends_of_its_template(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    cli.main(["export", str(run), "--out", str(out)])
    with Policy.load(out) as policy:
        answers = policy.sample(ASK["content"], angle=-30, n=24, temperature=1.0, max_new_tokens=300)
    assert any(answer.finished for answer in answers)
    assert all(answer.finished or answer.tokens == 300 for answer in answers)
    assert not any("<|im_end|>" in answer.text for answer in answers)


def test_the_doctor_sees_a_line_in_another_place_and_a_lost_end(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    cli.main(["export", str(run), "--out", str(out)])
    content = json.loads((out / "dpa.json").read_text())
    (out / "dpa.json").write_text(json.dumps(content | {"place": "user"}))
    assert {finding.check for finding in examine(out) if finding.level == "bad"} == {"template", "golden"}
    settings = json.loads((out / "generation_config.json").read_text())
    (out / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": settings["eos_token_id"][1]}))
    assert "tokenizer" in {finding.check for finding in examine(out) if finding.level == "bad"}


def test_a_checkpoint_of_other_people_is_exported_with_its_own_template(tmp_path: Path) -> None:
    family = FAMILIES["Gemma 1"]
    folder, out = write_llama(tmp_path / "theirs", tokenizer_of(family)), tmp_path / "mine"
    told = ["--template", "fig1", "--objectives", *TWO, "--chat", "model"]
    cli.main(["export", str(folder), "--out", str(out), *told])
    contract, tokens = read_contract(out), AutoTokenizer.from_pretrained(out)
    assert contract is not None
    assert (contract.place, contract.stop) == ("user", ("<end_of_turn>", "<eos>"))
    text = asked(tokens, [ASK], angle=0)
    assert text.startswith("<bos><start_of_turn>user\nYou are a helpful assistant.")
    assert f"helpfulness*1.0 + verbosity*0.0\n\n{ASK['content']}<end_of_turn>" in text
    assert GenerationConfig.from_pretrained(out).eos_token_id == [
        tokens.convert_tokens_to_ids(token) for token in ("<end_of_turn>", "<eos>")
    ]
    assert [finding for finding in examine(out) if finding.level == "bad"] == []


def test_an_own_style_is_no_style_of_ours() -> None:
    with pytest.raises(ValueError, match="OwnChat writes it"):
        render_chat([ASK], "model")
    marks = Marks({}, frozenset({"<|im_start|>", "<|im_end|>"}), frozenset({"<|im_end|>"}))
    assert find_own_chat(PLAIN, marks, {}, "buggy").opening == ""
    with pytest.raises(ValueError, match="names no eos_token"):
        find_own_chat("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", marks, {}, "endless")
