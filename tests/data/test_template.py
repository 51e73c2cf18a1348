"""What chat templates must do with what they are given, on templates in the style of well-known models."""

from __future__ import annotations

import copy
import json
from datetime import datetime

import pytest
from tiny import write_jsonl

from openrlhf_sgpo.data.template import refuse_unread_variables, template_arguments
from openrlhf_sgpo.data.tokens import ChatFormat, load_chat

QUESTION = [{"role": "user", "content": "Why?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *QUESTION]


def turns(head: str, end: str, generation: str) -> str:
    return (
        "{% for m in messages %}{{ '" + head + "' + m['content'] + '" + end + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + generation + "' }}{% endif %}"
    )


CHATML = turns("<|im_start|>' + m['role'] + '\\n", "<|im_end|>\\n", "<|im_start|>assistant\\n")
GEMMA = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + turns(
    "<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n",
    "<end_of_turn>\\n",
    "<start_of_turn>model\\n",
)
LLAMA = "{{ '<|begin_of_text|>' }}" + turns(
    "<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n",
    "<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
THOUGHT = "<think>\\n\\n</think>\\n\\n"
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '" + THOUGHT + "' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '" + THOUGHT + "' }}{% endif %}{% endif %}"
)
REASONER = CHATML.replace(
    "{% endif %}", "{% if enable_thinking is undefined or enable_thinking %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y %H:%M:%S.%f') + '\\n' }}" + CHATML


@pytest.fixture
def tokenizer_with(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def changed(template):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return other

    return changed


@pytest.fixture
def chat_with(tokenizer_with):
    return lambda template, arguments=(), moment=None: ChatFormat(
        tokenizer_with(template), 4096, template_arguments(arguments), moment
    )


@pytest.fixture
def model_with(tiny_model, tmp_path):
    """The tiny model in a folder of its own, with another template and other settings of its tokenizer and config."""
    import shutil

    def changed(template=CHATML, tokenizer=(), config=()):
        folder = shutil.copytree(tiny_model, tmp_path / "changed", dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        for name, changes in (("tokenizer_config.json", tokenizer), ("config.json", config)):
            settings = json.loads((folder / name).read_text()) | dict(changes)
            (folder / name).write_text(json.dumps({key: value for key, value in settings.items() if value != "none"}))
        return str(folder)

    return changed


@pytest.mark.parametrize(
    ("template", "ends_with", "end"),
    [
        (CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
        (GEMMA, "<start_of_turn>model\n", "<end_of_turn>"),
        (LLAMA, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        (MISTRAL, "[INST] Why? [/INST]", "</s>"),
        (QWEN, "<|im_start|>assistant\n", "<|im_end|>"),
        (REASONER, "<|im_start|>assistant\n<think>\n", "<|im_end|>"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "Why?\n", "<|im_end|>"),
    ],
)
def test_templates_that_say_where_an_answer_begins(chat_with, template, ends_with, end):
    chat = chat_with(template)
    assert chat.tokenizer.decode(chat.prompt(QUESTION)).endswith(ends_with)
    assert chat.tokenizer.decode(chat.end_of_turn) == end


@pytest.mark.parametrize(
    ("template", "header"),
    [
        (CHATML.replace("<|im_start|>assistant\\n", ""), r"'<\|im_start\|>assistant'"),
        (CHATML.partition("{% if add")[0], r"'<\|im_start\|>assistant'"),
        (LLAMA.partition("{% if add")[0], r"'<\|start_header_id\|>assistant<\|end_header_id\|>'"),
        (CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>"), "'assistant'"),
        (turns("' + m['role'] + ': ", "\\n", ""), "'assistant:'"),
    ],
)
def test_a_generation_prompt_without_the_header_is_an_error(chat_with, template, header):
    with pytest.raises(ValueError, match=f"writes {header} before an answer, but not with add_generation_prompt"):
        chat_with(template)


def test_the_error_names_tokenizer_and_flag(model_with):
    folder = model_with(CHATML.partition("{% if add")[0])
    with pytest.raises(ValueError, match=f"--reward.model_name_or_path: the chat template of the tokenizer {folder}"):
        load_chat(folder, False, "reward.model_name_or_path", 64)


def test_a_template_that_wants_parts_or_fails_is_named(chat_with, tiny_model):
    parts = CHATML.replace("+ m['content'] +", "+ (m['content'] | map(attribute='text') | join) +")
    with pytest.raises(ValueError, match=f"{tiny_model} does not render user messages whose content is text"):
        chat_with(parts)
    for failing in (
        CHATML.replace("m['content']", "m['content'][0]['text']"),
        CHATML.replace("m['content']", "m['content']['text']"),
        "{{ raise_exception('no') }}",
        "{% for m in messages %}",
        "{{ 1 / 0 }}",
    ):
        with pytest.raises(ValueError, match=f"the tokenizer {tiny_model} fails on a conversation of user"):
            chat_with(failing)


def test_a_refused_conversation_is_reported_with_the_templates_reason(chat_with, tmp_path, write_pairs):
    from openrlhf_sgpo.config import DataLimits
    from openrlhf_sgpo.data.inspection import inspect_pairs
    from openrlhf_sgpo.data.records import load_pairs

    chat = chat_with(GEMMA)
    assert chat.prompts([QUESTION, SYSTEM])[1] is None
    with pytest.raises(ValueError, match="fails on a conversation of system, user .System role not supported"):
        chat.prompt(SYSTEM)
    report = inspect_pairs(load_pairs(write_pairs(prompt=SYSTEM)), chat, DataLimits(), name="data").report
    assert "System role not supported" in " ".join(report.problems())


@pytest.fixture
def write_pairs(tmp_path):
    def write(**columns):
        row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea"} | columns
        return str(write_jsonl(tmp_path / "pairs.jsonl", [row]))

    return write


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([*QUESTION, {"role": "tool", "content": "22"}], "'content' of a message with the role 'tool'"),
        (
            [{"role": "developer", "content": "Be brief."}, *QUESTION],
            "'content' of a message with the role 'developer'",
        ),
        ([{"role": "user", "content": "Why?", "name": "Ada"}], "'name' of a message with the role 'user'"),
        (
            [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, *QUESTION],
            "'tool_calls' of a message with the role 'assistant'",
        ),
        (
            [*QUESTION, {"role": "assistant", "content": "So.", "reasoning_content": "Hm"}, *QUESTION],
            "'reasoning_content' of a message with the role 'assistant'",
        ),
    ],
)
def test_what_a_template_drops_is_an_error_and_what_it_renders_is_none(chat_with, messages, message):
    strict = (
        "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}" + CHATML[len("{% for m in messages %}") :]
    )
    strict = strict.replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    with pytest.raises(ValueError, match=f"does not render the field {message}"):
        chat_with(strict).prompt(messages)
    with pytest.raises(ValueError, match=f"does not render the field {message}"):
        chat_with(strict).prompts([QUESTION, messages])
    text = chat_with(CHATML.replace("m['content']", "(m['content'] if m | length == 2 else m | tojson)"))
    assert len(text.prompt(messages)) > len(text.prompt(QUESTION))


def test_fields_that_link_messages_and_empty_ones_are_not_missed(chat_with):
    chat = chat_with(CHATML)
    tool = {"role": "tool", "content": "22", "tool_call_id": "1", "name": ""}
    assert chat.prompt([*QUESTION, tool]) == chat.prompt([*QUESTION, {"role": "tool", "content": "22"}])


def test_a_text_that_the_template_changes_is_not_dropped(chat_with):
    stripping = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    asked = [*QUESTION, {"role": "assistant", "content": "<think>Hm</think>So."}, *QUESTION]
    chat = chat_with(stripping)
    assert "Hm" not in chat.tokenizer.decode(chat.prompt(asked))


def test_tools_and_variables_of_a_row(chat_with):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with pytest.raises(ValueError, match="does not render the column 'tools'"):
        chat_with(CHATML).prompt(QUESTION, {"tools": tools})
    with pytest.raises(ValueError, match="does not render the column 'chat_template_kwargs' with 'enable_thinking'"):
        chat_with(CHATML).prompt(QUESTION, {"enable_thinking": False})
    chat = chat_with("{% if tools %}{{ tools | tojson }}{% endif %}" + QWEN)
    assert "weather" in chat.tokenizer.decode(chat.prompt(QUESTION, {"tools": tools}))
    assert "</think>" in chat.tokenizer.decode(chat.prompt(QUESTION, {"enable_thinking": False}))
    assert chat.prompt(QUESTION, {"enable_thinking": True}) == chat.prompt(QUESTION)  # a default is read all the same


def test_a_reward_model_whose_template_refuses_the_prompts_is_found_before_it_is_loaded(model_with, tiny_model):
    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.data.records import Prompt
    from openrlhf_sgpo.oracle.reward_heads import RewardHeads
    from openrlhf_sgpo.oracle.reward_model import RewardModel

    config, prompts = Config(), [Prompt("a", QUESTION, template_kwargs={"depth": 3}), Prompt("b", SYSTEM)]
    for oracle, template, said in (
        (RewardModel, GEMMA, "System role not supported"),
        (
            RewardHeads,
            CHATML.replace("{{ '<|im", "{{ '' if m['role'] == 'system' else '<|im", 1),
            "does not render the field",
        ),
    ):
        folder = model_with(template)
        config.reward.model_name_or_path, config.reward.heads = folder, [str(tiny_model), folder]
        with pytest.raises(ValueError, match=f"{folder} cannot read prompt b: .*{said}"):
            oracle.check_prompts(config, prompts)
        oracle.check_prompts(config, prompts[:1])


@pytest.mark.parametrize("item", ["enable_thinking=false", "enable_thinking=False", '{"enable_thinking": false}'])
def test_variables_reach_the_template(chat_with, item):
    chat = chat_with(QWEN, [item])
    assert chat.tokenizer.decode(chat.prompt(QUESTION)).endswith("<think>\n\n</think>\n\n")
    assert chat.prompt(QUESTION, {"enable_thinking": True}) == chat_with(QWEN).prompt(QUESTION)


def test_values_of_variables():
    items = ["a=1", "b=text", "c=0.5", "d=[1, 2]", "e=2024-07-26", "f=", "g=x=y", "h=null"]
    assert template_arguments(items) == {
        **{"a": 1, "b": "text", "c": 0.5, "d": [1, 2], "e": "2024-07-26", "f": "", "g": "x=y", "h": "null"}
    }


@pytest.mark.parametrize(
    "item", ["enable_thinking", "=1", "{1: 2}", "[x]", "a b=1", "{a", "messages=1", "strftime_now=1", "a=*b"]
)
def test_variables_that_cannot_be(item, tiny_model, tiny_data, tmp_path):
    from running import arguments

    from openrlhf_sgpo import run_settings

    with pytest.raises(ValueError, match="--data.chat_template_kwargs: "):
        run_settings.load(arguments(tiny_model, tiny_data, tmp_path, f"--data.chat_template_kwargs={item}"))


def test_values_of_variables_have_limits():
    for item, reason in (("a=" + "[" * 40, "more than 32 levels"), ("a=" + "x" * 2**17, "more than 64 KiB")):
        with pytest.raises(ValueError, match=f"--data.chat_template_kwargs: .* cannot be read .*{reason}") as caught:
            template_arguments([item])
        assert len(str(caught.value)) < 300


def test_a_variable_that_no_template_reads_is_an_error(chat_with):
    plain, thinking = (chat_with(folder, ["enable_thinking=false"]).template for folder in (CHATML, QWEN))
    refuse_unread_variables([plain, thinking])
    with pytest.raises(
        ValueError, match="--data.chat_template_kwargs: enable_thinking is not read by the chat template"
    ):
        refuse_unread_variables([plain])


def data(model, pairs, *more):
    from openrlhf_sgpo.cli.main import main

    return main(["data", "--algo", "dpo", "--model.model_name_or_path", model, "--data.dataset", pairs, *more])


def test_answers_inside_an_opened_thought_are_a_finding(model_with, write_pairs, capsys):
    model, pairs = model_with(REASONER), write_pairs()
    assert data(model, pairs) == 2
    assert "open_thought 1 of 1 (100.0%, limit 1.0%), such as row-0; close the thought" in capsys.readouterr().err
    assert data(model, pairs, "--data.chat_template_kwargs", "enable_thinking=false") == 0
    assert data(model, write_pairs(chosen="Hm</think>Because.", rejected="</think>No idea")) == 0
    assert data(model, write_pairs(chosen="Hm</think>Because.")) == 2
    assert data(model_with(QWEN), pairs) == 0
    assert data(model_with(QWEN), pairs, "--data.chat_template_kwargs", "enable_thinking=false") == 0


def test_templates_are_told_one_moment(chat_with):
    moment = datetime(2026, 2, 3, 4, 5, 6)
    chat = chat_with(DATED, moment=moment)
    assert chat.tokenizer.decode(chat.prompt(QUESTION)).startswith("Today is 03 Feb 2026 04:05:06.000000\n")
    assert chat_with(DATED).prompt(QUESTION) == chat_with(DATED).prompt(QUESTION)
    assert chat_with(DATED).template.reads_clock and not chat_with(CHATML).template.reads_clock


@pytest.mark.slow
def test_a_run_is_told_the_moment_of_its_beginning(model_with, tiny_data, tmp_path):
    """Also after it is resumed; and a run that does not say which moment it was cannot be resumed."""
    from running import arguments, train

    from openrlhf_sgpo.run_folder import write_sealed

    folder = tmp_path / "run"
    argv = arguments(model_with(DATED), tiny_data, folder, algo="dpo")
    assert train(*argv).returncode == 0
    stored = json.loads((folder / "moment.json").read_text())
    assert stored["moment"].endswith("T00:00:00")
    write_sealed(folder / "moment.json", {"moment": "2020-01-01T00:00:00"})
    kept = (folder / "moment.json").read_bytes()
    assert train(*argv, "--resume").returncode == 0
    assert (folder / "moment.json").read_bytes() == kept
    (folder / "moment.json").unlink()
    ended = train(*argv, "--resume")
    assert ended.returncode == 2 and "has no moment.json" in ended.stderr


def test_a_tokenizer_without_padding_and_end_is_an_error(model_with, write_pairs, capsys):
    folder = model_with(tokenizer={"pad_token": None, "eos_token": None})
    assert data(folder, write_pairs()) == 2
    expected = (
        f"--model.model_name_or_path {folder}: the tokenizer has neither a padding token nor an end-of-sequence token"
    )
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("config", [{"vocab_size": 258}, {"vocab_size": 2}])
def test_a_token_without_an_embedding_is_an_error_where_it_occurs(model_with, config, write_pairs, capsys):
    """The last token of the tiny vocabulary is a rare byte: data that has it is refused, other data is not."""
    folder = model_with(config=config)
    if config["vocab_size"] == 2:
        with pytest.raises(
            ValueError, match=r"id 2 \(<\|im_end\|>\).*beyond the 2 embeddings of --model.model_name_or_path"
        ):
            load_chat(folder, False, "model.model_name_or_path", 64)
        return
    chat, _ = load_chat(folder, False, "model.model_name_or_path", 64)
    last = chat.tokenizer.convert_ids_to_tokens(258)
    text = next(letter for letter in map(chr, range(32, 0x500)) if 258 in chat.tokenizer(letter)["input_ids"])
    assert data(folder, write_pairs(), "--data.max_len", "64") == 0
    assert data(folder, write_pairs(chosen=f"It is {text}"), "--data.max_len", "64") == 2
    assert f"token id 258 ({last})" in (said := capsys.readouterr().err) and f"{text!r}"[1:-1] in said


@pytest.mark.slow
def test_padding_beyond_the_embedding_is_an_error_for_every_model(tiny_model, tmp_path, tiny_data):
    import shutil

    from running import arguments, train
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    message = rf"token id 259 \(\[PAD\]\) .* is beyond the 259 embeddings of --{{}} {folder}"
    for flag in ("model.model_name_or_path", "reward.model_name_or_path", "reward.heads"):
        with pytest.raises(ValueError, match=message.format(flag)):
            load_chat(str(folder), False, flag, 64)
    ended = train(*arguments(folder, tiny_data, tmp_path / "run", algo="dpo"))
    assert ended.returncode == 2 and "token id 259 ([PAD])" in ended.stderr and not (tmp_path / "run").exists()


def test_a_reference_without_embeddings_for_the_policys_tokens_is_an_error(tiny_model, model_with):
    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.data.run_data import load_policy_chat

    config = Config()
    config.model.model_name_or_path = str(tiny_model)
    config.ref.model_name_or_path = model_with(config={"vocab_size": 2})
    with pytest.raises(ValueError, match="beyond the 2 embeddings of --ref.model_name_or_path"):
        load_policy_chat(config)


def test_a_tokenizer_smaller_than_the_model_is_fine(model_with):
    load_chat(model_with(config={"vocab_size": 320}), False, "model.model_name_or_path", 64)
