"""Templates: every string to the letter, agreement with chat templates, stops, and BOS tokens once."""

import re
from pathlib import Path

import pytest
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tandem.config.sections import Data
from tandem.data.prompts import encode, load_prompts
from tandem.data.round_trip import check_round_trip
from tandem.data.template import Template, open_template, split_stops, templates
from tandem.errors import ConfigError, DataError

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QUESTION = "What is {2} + 2?"
USER = [{"role": "user", "content": QUESTION}]
DIALOG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>greet</think>\n\nHello"},
    {"role": "user", "content": "Bye"},
]
R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think><answer> answer here </answer>. "
    "Put your final answer within \\boxed{}."
)
GOLDEN = {
    "plain": "What is {2} + 2?",
    "default": "What is {2} + 2?",
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is {2} + 2?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen_r1": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{R1}\nWhat is {{2}} + 2?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen_math_r1": (
        "<|im_start|>system\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is {2} + 2?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen3": "<|im_start|>user\nWhat is {2} + 2?<|im_end|>\n<|im_start|>assistant\n",
    "qwen3_nothink": (
        "<|im_start|>user\nWhat is {2} + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "deepseek3_r1": (
        f"<\uff5cbegin\u2581of\u2581sentence\uff5c>{R1} "
        "<\uff5cUser\uff5c>What is {2} + 2?<\uff5cAssistant\uff5c>"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is {2} + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gsm8k_tags": (
        "<|im_start|>system\nYou solve word problems. Work the problem out between <think> and </think>, "
        "then give the final number, and nothing else, between <answer> and </answer>.<|im_end|>\n"
        "<|im_start|>user\nWhat is {2} + 2?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "countdown": (
        "<|im_start|>system\n"
        "You think a problem through step by step before you state the result.<|im_end|>\n"
        "<|im_start|>user\nWhat is {2} + 2?\n"
        "You may use + - * / and brackets, and must use every number exactly once. Reason between <think> "
        "and </think>, then give the finished expression, and nothing else, between "
        "<answer> and </answer>, for example <answer>(1 + 2) / 3</answer>.<|im_end|>\n"
        "<|im_start|>assistant\nLet me work this out step by step.\n<think>"
    ),
}
BOS = {"deepseek3_r1": "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "llama3": "<|begin_of_text|>"}
# The turns of Qwen2.5's public chat template without tool calls; DEFAULT is its default system text.
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nDEFAULT<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# The same of Qwen3: no default system text, earlier thoughts dropped, thinking switched off by a flag.
QWEN3 = (
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def byte_level(special, bos=None, adds_bos=False, chat_template=None):
    """A byte-level BPE with a few merges learned on the spot."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([QUESTION, R1], trainer)
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    if adds_bos:
        first = (bos, core.token_to_id(bos))
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[first])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=special[-1], chat_template=chat_template
    )


@pytest.fixture(scope="module")
def qwen():
    return byte_level(CHATML)


@pytest.fixture(scope="module")
def llama():
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return byte_level(special, bos="<|begin_of_text|>", adds_bos=True)


def load(tmp_path, tokenizer, **options):
    """Prompts of a file with the one question."""
    path = tmp_path / "one.txt"
    path.write_text(QUESTION, encoding="utf-8")
    data = Data(train=str(path), columns={"truth": None}, max_prompt_tokens=2000, **options)
    return load_prompts(data, str(path), tokenizer)


def test_every_built_in_template_has_a_golden():
    assert set(GOLDEN) == set(templates())


@pytest.mark.parametrize("name", GOLDEN)
def test_built_in_template_to_the_letter(name):
    bos = BOS.get(name)
    tokenizer = byte_level((*CHATML, bos) if bos else CHATML, bos=bos)
    assert open_template(name, tokenizer).render(USER) == GOLDEN[name]


@pytest.mark.parametrize(
    ("default", "messages"),
    [
        ("You are a helpful assistant.", USER),
        ("You are a helpful assistant.", DIALOG[1:]),
        ("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", DIALOG),
    ],
)
def test_qwen_equals_the_chat_template_of_qwen25(default, messages):
    tokenizer = byte_level(CHATML, chat_template=QWEN25.replace("DEFAULT", default))
    text = open_template("qwen", tokenizer).render(messages)
    real = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode([text], tokenizer) == [real]


@pytest.mark.parametrize(("name", "thinking"), [("qwen3", True), ("qwen3_nothink", False)])
def test_qwen3_equals_its_chat_template_with_earlier_thoughts_dropped(name, thinking):
    tokenizer = byte_level(CHATML, chat_template=QWEN3)
    text = open_template(name, tokenizer).render(DIALOG)
    real = tokenizer.apply_chat_template(
        DIALOG, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    assert text == real
    assert "greet" not in text and "Hello" in text


def test_chat_is_the_tokenizers_own_template_token_for_token(tmp_path):
    tokenizer = byte_level(CHATML, chat_template=QWEN25.replace("DEFAULT", "Default."))
    (prompt,) = load(tmp_path, tokenizer, template="chat", system="Short answers.").prompts
    messages = [{"role": "system", "content": "Short answers."}, *USER]
    real = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(prompt.tokens) == real
    assert "Default." not in prompt.text


def test_a_model_without_chat_template_is_told_to_name_one(qwen, tmp_path):
    with pytest.raises(
        ConfigError, match=r"data.template=chat: .*no chat template; name a template \(plain,"
    ):
        load(tmp_path, qwen, template="chat")


def test_a_dialog_that_the_chat_template_refuses_is_a_bad_row_with_its_place(tmp_path):
    refuse = "{{ raise_exception('System role not supported') }}"
    tokenizer = byte_level(CHATML, chat_template=refuse)
    with pytest.raises(DataError, match=r"one\.txt:1: .*System role not supported"):
        load(tmp_path, tokenizer, template="chat")


@pytest.mark.parametrize("name", ["llama3", "plain"])
def test_bos_stands_once_in_front_where_the_tokenizer_adds_one_itself(name, llama, tmp_path):
    (prompt,) = load(tmp_path, llama, template=name).prompts
    assert prompt.tokens.count(llama.bos_token_id) == 1
    assert prompt.tokens[0] == llama.bos_token_id
    assert prompt.text.startswith("<|begin_of_text|>")


def test_a_chat_template_that_writes_bos_does_not_get_a_second_one(llama, tmp_path):
    llama.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    (prompt,) = load(tmp_path, llama, template="chat").prompts
    llama.chat_template = None
    assert prompt.tokens.count(llama.bos_token_id) == 1


def test_no_bos_where_the_tokenizer_has_one_but_does_not_add_it(tmp_path):
    tokenizer = byte_level(CHATML, bos="<|endoftext|>")
    (prompt,) = load(tmp_path, tokenizer, template="qwen").prompts
    assert tokenizer.bos_token_id not in prompt.tokens


def test_a_template_that_needs_bos_refuses_a_tokenizer_without(qwen, tmp_path):
    with pytest.raises(ConfigError, match=r"data.template=llama3 begins with a BOS token"):
        load(tmp_path, qwen, template="llama3")


def test_stops_that_are_special_tokens_are_tokens_and_those_no_text_can_hold_are_refused(qwen, llama):
    """One token that is not special stays a text: it may come as a part of another token."""
    ids = tuple(map(qwen.convert_tokens_to_ids, ("<|im_end|>", "<|endoftext|>")))
    assert len(qwen.encode("a", add_special_tokens=False)) == 1
    assert split_stops(["a", "<|im_end|>", "Q:", "<|endoftext|>"], qwen, "key") == (("a", "Q:"), ids)
    assert split_stops(["<|im_end|>"], llama, "key") == (("<|im_end|>",), ())
    with pytest.raises(
        ConfigError, match=r"sampling.stop: no answer's text holds .*, for '<\|im_end\|>' is a special token"
    ):
        split_stops(["\n<|im_end|>"], qwen, "sampling.stop")
    with pytest.raises(ConfigError, match=r"sampling.stop holds an empty text"):
        split_stops([""], qwen, "sampling.stop")


def test_a_stop_that_is_one_token_is_given_as_token_and_otherwise_as_text(qwen, llama):
    fitting, foreign = open_template("qwen", qwen), open_template("qwen", llama)
    assert (fitting.stop, fitting.stop_tokens) == ((), (qwen.convert_tokens_to_ids("<|im_end|>"),))
    assert (foreign.stop, foreign.stop_tokens) == (("<|im_end|>",), ())


def test_prefill_ends_the_prompt(qwen):
    renderer = open_template("countdown", qwen)
    assert renderer.render(USER).endswith(renderer.prefill)
    assert renderer.prefill.endswith("<think>")


def test_own_template_from_a_file(qwen, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        'format_user: "Q: {content}\\n"\nassistant_start: "A:"\nstop: ["\\nQ:"]\n', encoding="utf-8"
    )
    loaded = load(tmp_path, qwen, template=str(path), system="Be exact.")
    assert loaded.prompts[0].text == "Be exact.\nQ: What is {2} + 2?\nA:"
    assert loaded.template.stop == ("\nQ:",)


def test_the_examples_of_the_documentation_load(qwen, tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    config, own = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert Data(**yaml.safe_load(config)).truth_after == "####"
    path = tmp_path / "mine.yaml"
    path.write_text(own, encoding="utf-8")
    assert open_template(str(path), qwen).render(USER) == (
        "<|im_start|>system\nYou are a careful accountant.<|im_end|>\n"
        "<|im_start|>user\nWhat is {2} + 2?\nAnswer with a number.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert all(f"`{name}`" in text for name in (*templates(), *Template.model_fields))


def test_own_template_changes_only_what_it_says_of_the_one_it_extends(qwen, tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text("extends: qwen\nsystem: null\n", encoding="utf-8")
    renderer = open_template(str(path), qwen)
    assert renderer.render(USER) == GOLDEN["qwen3"]
    assert renderer.stop_tokens == open_template("qwen", qwen).stop_tokens


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("format_usr: '{content}'", r"unknown key 'format_usr', did you mean 'format_user'\?"),
        ("format_user: 'no place'", r"format_user='no place': must hold \{content\} exactly once"),
        ("bos: perhaps", r"bos='perhaps': Input should be 'auto', 'always' or 'never'"),
        ("extends: qwenn", r"extends='qwenn' is no built-in template; there are plain,"),
        ("- a\n- b", r"expected `key: value` lines, found list"),
        ("format_user: [", r":1: not valid YAML"),
        ("stop: [a]\nstop: [b]", r":2: .*stop"),
        ("1: x", r"keys must be text"),
    ],
)
def test_a_faulty_template_file_is_a_config_error_that_names_the_key(content, said, qwen, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        open_template(str(path), qwen)
    assert str(path) in str(caught.value)


def test_yaml_tags_build_no_objects(qwen, tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "mine.yaml"
    path.write_text(f"system: !!python/object/apply:os.mkdir ['{canary}']", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        open_template(str(path), qwen)
    assert not canary.exists()


def test_unknown_template_names_the_nearest_and_all(qwen):
    with pytest.raises(
        ConfigError, match=r"data.template=qwen_r2: .*did you mean qwen_r1\?.*there are chat, plain"
    ):
        open_template("qwen_r2", qwen)


def test_missing_template_file_is_named_in_full(qwen, tmp_path):
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path / 'none.yaml'}"):
        open_template(str(tmp_path / "none.yaml"), qwen)


def test_round_trip_finds_nothing_in_a_fitting_template(qwen, tmp_path):
    prompts = load(tmp_path, qwen, template="qwen_r1").prompts
    assert check_round_trip(prompts, qwen) == []


def test_round_trip_finds_a_tokenizer_that_loses_text(tmp_path):
    tokenizer = byte_level(CHATML)
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), core.pre_tokenizer])
    prompts = load(tmp_path, tokenizer, template="plain").prompts
    (problem,) = check_round_trip(prompts, tokenizer)
    assert problem.startswith("prompt 0: decodes to") and problem.endswith("at character 4")


def test_round_trip_finds_markers_of_another_model(llama, tmp_path):
    problems = check_round_trip(load(tmp_path, llama, template="qwen").prompts, llama)
    assert [p.split("'")[1] for p in problems] == ["<|im_end|>", "<|im_start|>"]


def test_round_trip_finds_a_second_bos(llama, tmp_path):
    llama.chat_template = "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}"
    prompts = load(tmp_path, llama, template="chat").prompts
    llama.chat_template = None
    assert check_round_trip(prompts, llama) == [
        "prompt 0: begins with the BOS token '<|begin_of_text|>' twice"
    ]


def test_round_trip_finds_special_tokens_in_the_question_itself(qwen, tmp_path):
    path = tmp_path / "hostile.txt"
    path.write_text("Say <|im_end|> now", encoding="utf-8")
    data = Data(train=str(path), columns={"truth": None}, template="qwen")
    (problem,) = check_round_trip(load_prompts(data, str(path), qwen).prompts, qwen)
    assert "question itself holds the special token '<|im_end|>'" in problem
