"""``openrlhf-sgpo refine``: chains that see one draft, controls at the same tokens, records, resume."""

from __future__ import annotations

import gc
import itertools
import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refining import ScriptedEngine, make_run
from running import ROOT, killed_at, read_jsonl
from tiny import write_jsonl

from openrlhf_sgpo.algorithms.slhf import IMPROVE
from openrlhf_sgpo.games import GAMES, nash, stackelberg
from openrlhf_sgpo.integrity import signed
from openrlhf_sgpo.oracle.base import antisymmetric, sigmoid
from openrlhf_sgpo.refinement.budget import affordable, further
from openrlhf_sgpo.refinement.preferences import best_of
from openrlhf_sgpo.refinement.settings import load

pytestmark = pytest.mark.slow


def flags(model, data, folder, *more: str) -> list[str]:
    """For the tiny model; later flags replace earlier ones. Without a value a flag is left out; `nothing` is an empty list."""
    common = {
        **{"model": str(model), "prompts": str(data["prompts"]), "out": str(folder), "depth": "3"},
        **{"data.max_len": "256", "rollout.engine": "hf", "rollout.max_new_tokens": "8", "ds.param_dtype": "fp32"},
    }
    words = iter(more)
    common |= {flag.removeprefix("--"): next(words) for flag in words}
    given = {flag: value for flag, value in common.items() if value}
    return [
        word
        for flag, value in given.items()
        for word in ([f"--{flag}="] if value == "nothing" else [f"--{flag}", *value.split("|")])
    ]


def refine(argv: list[str]) -> dict:
    from openrlhf_sgpo.refinement.refine import Refinement

    gc.collect()  # a refinement before this one may still hold its lock
    return Refinement(*load(argv)).execute()


@pytest.fixture
def engine(monkeypatch):
    from openrlhf_sgpo import staged_command

    scripted = ScriptedEngine()
    monkeypatch.setattr(staged_command, "start_rollout", lambda config, chat, folder: scripted)
    return scripted


def chain(shares, follower, length):
    """Probability of every path y_1, ..., y_length with y_1 ~ shares and y_i ~ follower[y_{i-1}]."""
    paths = {(first,): share for first, share in enumerate(shares)}
    for _ in range(length - 1):
        paths = {(*path, y): share * follower[path[-1]][y] for path, share in paths.items() for y in range(len(shares))}
    return paths


@pytest.mark.parametrize(("length", "of_chain", "of_samples"), [(1, 1 / 3, 1 / 3), (2, 2 / 3, 5 / 9), (3, 1, 19 / 27)])
def test_a_stackelberg_chain_finds_every_favourite_sooner_than_nash(length, of_chain, of_samples):
    """Three equal groups with cyclic tastes: the chance that a user's favourite is among the first answers."""
    game = GAMES["condorcet_tied"]()
    equilibrium, independent = stackelberg(game, 0, 0), nash(game).policy
    for favourite in range(3):
        paths = chain(equilibrium.policy, equilibrium.follower, length)
        assert sum(share for path, share in paths.items() if favourite in path) == pytest.approx(of_chain, abs=1e-12)
        paths = chain(independent, np.tile(independent, (3, 1)), length)
        assert sum(share for path, share in paths.items() if favourite in path) == pytest.approx(of_samples, abs=1e-9)


def test_the_first_answer_is_a_plain_sample(tiny_model, tiny_data, tmp_path):
    from transformers import AutoTokenizer

    from openrlhf_sgpo.data.tokens import ChatFormat
    from openrlhf_sgpo.refinement.settings import inference
    from openrlhf_sgpo.rollout import sampling_of
    from openrlhf_sgpo.rollout.hf import HuggingFaceRollout

    argv = flags(tiny_model, tiny_data, tmp_path / "out", "--controls", "nothing")
    refine(argv)
    rows = read_jsonl(tmp_path / "out/answers.jsonl")
    settings, _ = load(argv)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sampler = HuggingFaceRollout(inference(settings, str(tiny_model)), ChatFormat(tokenizer, 64), str(tiny_model))
    text = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    prompts = [text.format(row["prompt"]) for row in read_jsonl(tiny_data["prompts"])]
    tokens = [tuple(ids) for ids in tokenizer(prompts)["input_ids"]]
    samples = sampler.generate(tokens, sampling_of(settings.rollout, 42), label="")
    first = [row for row in rows if row["depth"] == 1]
    assert [(row["text"], row["tokens"], row["truncated"]) for row in first] == [
        (answer.text, answer.tokens, answer.truncated) for (answer,) in samples
    ]
    assert len(first) == 24 and len({row["text"] for row in rows}) > 60


def test_the_follower_sees_prompt_last_draft_and_instruction(tiny_model, tiny_data, tmp_path, engine):
    from transformers import AutoTokenizer

    refine(flags(tiny_model, tiny_data, tmp_path / "out", "--controls", "nothing", "--follower_prompt", "Better!"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = {row["answer_id"]: row for row in read_jsonl(tmp_path / "out/answers.jsonl")}
    assert [(len(prompts), n) for prompts, n, _ in engine.asked] == [(24, 1)] * 3
    assert len({seed for *_, seed in engine.asked}) == 3
    assert not engine.open
    for depth, (contexts, *_) in enumerate(engine.asked, start=1):
        for number, context in enumerate(contexts):
            row = rows[f"p{number}/chain/{depth}"]
            turns = [("user", row["prompt"][0]["content"])]
            if depth > 1:
                assert row["parent_id"] == f"p{number}/chain/{depth - 1}"
                turns += [("assistant", rows[row["parent_id"]]["text"]), ("user", "Better!")]
            expected = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
            assert tokenizer.decode(context) == expected + "<|im_start|>assistant\n"
            assert row["role"] == ("leader" if depth == 1 else "follower")
            assert row["follower_prompt"] == (None if depth == 1 else "Better!")


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=200)


@given(LENGTHS, st.integers(1, 400))
def test_affordable_is_the_most_that_fits(lengths, budget):
    count = affordable(lengths, budget)
    assert sum(lengths[:count]) <= budget or count == 1
    assert count == len(lengths) or sum(lengths[: count + 1]) > budget


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 6), st.integers(1, 40))
def test_samples_are_drawn_until_the_budget_is_known_to_be_spent(seed, longest, depth, most):
    draw = random.Random(seed)
    budget, lengths, calls = sum(draw.randint(1, longest) for _ in range(depth)), [], 0
    while count := further(lengths, budget, depth, most):
        assert count in (1, 2, 4, 8, 16, 32, depth, most - len(lengths))
        lengths += [draw.randint(1, longest) for _ in range(count)]
        calls += 1
    assert len(lengths) == most or (sum(lengths) >= budget and len(lengths) < most)
    assert calls <= 2 + depth + most.bit_length()


def test_answers_of_one_token_against_long_revisions_take_few_calls():
    lengths, calls = [], 0
    while count := further(lengths, 1200, 5, 10_000):
        lengths, calls = [*lengths, *[1] * count], calls + 1
    assert 1200 <= len(lengths) < 2400
    assert calls < 12


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=7), st.integers(1, 7))
def test_the_best_is_that_of_the_largest_reward_and_the_earliest_of_equals(rewards, count):
    count = min(count, len(rewards))
    pairs = itertools.combinations(range(len(rewards)), 2)
    matrix = antisymmetric(len(rewards), {(i, j): sigmoid(rewards[i] - rewards[j]) for i, j in pairs})
    assert best_of(matrix, count) == rewards.index(max(rewards[:count]))


def mark(row) -> int:
    return int(row["text"][-1])


@pytest.fixture
def judged(tiny_model, tiny_data, tmp_path, engine):
    """Folder, rows by prompt and summary of a refinement with everything, by an engine and an oracle that are known."""
    argv = flags(tiny_model, tiny_data, tmp_path / "out", "--oracle", "refining:Marks", "--depth", "4")
    summary = refine(argv)
    rows = read_jsonl(tmp_path / "out/answers.jsonl")
    by_prompt = {name: [row for row in rows if row["id"] == name] for name in dict.fromkeys(row["id"] for row in rows)}
    return tmp_path / "out", by_prompt, summary


def of(rows, method) -> list[dict]:
    return [row for row in rows if row["method"] == method]


def test_controls_have_the_chain_s_tokens(judged):
    folder, by_prompt, summary = judged
    everything = [row for rows in by_prompt.values() for row in rows]
    assert len({row["answer_id"] for row in everything}) == len(everything)
    for rows in by_prompt.values():
        chained, samples, best = of(rows, "chain"), of(rows, "iid"), of(rows, "best_of_n")
        assert [row["index"] for row in samples] == list(range(1, len(samples) + 1))
        assert sum(row["tokens"] for row in samples) >= chained[-1]["total_tokens"]
        for depth, (link, chosen) in enumerate(zip(chained, best, strict=True), start=1):
            assert link["depth"] == chosen["depth"] == depth
            assert link["total_tokens"] == sum(row["tokens"] for row in chained[:depth])
            paid = [row for row in samples if row["depth"] is not None and row["depth"] <= depth]
            assert paid == samples[: len(paid)] and len(paid) == chosen["samples"]
            spent = sum(row["tokens"] for row in paid)
            assert spent == chosen["total_tokens"]
            assert spent <= link["total_tokens"] or len(paid) == 1
            assert len(paid) == len(samples) or spent + samples[len(paid)]["tokens"] > link["total_tokens"]
            assert mark(chosen) == max(map(mark, paid))
            assert chosen["text"] == samples[chosen["index"] - 1]["text"]
    stages = json.loads((folder / "ledger.json").read_text())["stages"]
    generated = sum(entry.get("tokens_generated", 0) for entry in stages.values())
    assert generated == sum(row["tokens"] for row in everything if row["method"] != "best_of_n")
    assert stages["depth_2"]["tokens_prompt"] == sum(
        row["context_tokens"] for row in read_jsonl(folder / "stages/depth_2.jsonl")
    )
    assert stages["preferences"]["judge_calls"] > 0
    at_three = [of(rows, "best_of_n")[2] for rows in by_prompt.values()]
    figures = summary["depths"][2]
    assert figures["samples"] == pytest.approx(mean(row["samples"] for row in at_three))
    assert figures["sample_tokens"] == pytest.approx(mean(row["total_tokens"] for row in at_three))
    assert summary["samples_cut"] == 0


def test_preferences_are_the_oracle_s(judged):
    folder, by_prompt, summary = judged
    wins = {depth: {name: [] for name in ("first", "previous", "iid", "best_of_n")} for depth in range(1, 5)}
    for row in read_jsonl(folder / "stages/preferences.jsonl"):
        rows, depth = by_prompt[row["id"]], row["depth"]
        chained, samples, best = of(rows, "chain"), of(rows, "iid"), of(rows, "best_of_n")[depth - 1]
        assert row["best_of_n_index"] == best["index"]
        assert row["iid_index"] <= best["samples"]
        opponents = {"iid": samples[row["iid_index"] - 1], "best_of_n": best}
        if depth > 1:
            opponents |= {"first": chained[0], "previous": chained[depth - 2]}
        for name, shares in wins[depth].items():
            if name not in opponents:
                assert row[f"over_{name}"] is None
                continue
            expected = sigmoid(mark(chained[depth - 1]) - mark(opponents[name]))
            assert row[f"over_{name}"] == pytest.approx(expected, abs=1e-12)
            shares.append(expected)
    for figures in summary["depths"]:
        for name, shares in wins[figures["depth"]].items():
            if shares:
                assert figures[f"over_{name}"] == pytest.approx(mean(shares))
                assert figures[f"over_{name}_error"] == pytest.approx(stdev(shares) / 24**0.5)
            else:
                assert figures[f"over_{name}"] is None
    assert summary["depths"] == json.loads((folder / "summary.json").read_text())["depths"]
    table = (folder / "table.txt").read_text()
    assert f"{summary['depths'][3]['over_best_of_n']:.3f}" in table and "over the first" in table


def test_a_frozen_implicit_reward_that_has_learnt_nothing_prefers_nothing(tiny_model, tiny_data, tmp_path, engine):
    folders = ("--reward.model_name_or_path", str(tiny_model), "--ref.model_name_or_path", str(tiny_model))
    summary = refine(flags(tiny_model, tiny_data, tmp_path / "out", "--oracle", "implicit", *folders))
    for row in summary["depths"][1:]:
        assert {row[f"over_{name}"] for name in ("first", "previous", "iid", "best_of_n")} == {0.5}
        assert row["over_best_of_n_error"] == 0


def test_at_most_so_many_samples(tiny_model, tiny_data, tmp_path, engine):
    argv = flags(tiny_model, tiny_data, tmp_path / "out", "--control_samples", "2", "--depth", "5")
    summary = refine(argv)
    samples = of(read_jsonl(tmp_path / "out/answers.jsonl"), "iid")
    assert len(samples) == 48
    assert summary["samples_cut"] > 12
    assert all(row["samples"] <= 2 for row in summary["depths"])
    assert summary["depths"][1]["over_first"] is None
    assert "over" not in (tmp_path / "out/table.txt").read_text().splitlines()[0]


def test_alpaca_eval_reads_the_outputs(tiny_model, tiny_data, tmp_path, engine):
    turns = [{"role": role, "content": said} for role, said in (("user", "A"), ("assistant", "B"), ("user", "C"))]
    rows = [*read_jsonl(tiny_data["prompts"]), {"id": "long", "prompt": turns}]
    data = {"prompts": write_jsonl(tmp_path / "mine.jsonl", rows)}
    refine(flags(tiny_model, data, tmp_path / "out", "--oracle", "refining:Marks", "--depth", "2"))
    rows = {row["answer_id"]: row for row in read_jsonl(tmp_path / "out/answers.jsonl")}
    names = set()
    for file, method in (("depth_1", "chain/1"), ("depth_2", "chain/2"), ("best_of_n_depth_2", "best_of_n/2")):
        outputs = json.loads((tmp_path / f"out/alpaca_eval_{file}.json").read_text())
        assert len(outputs) == 24  # the dialogue has no place there
        for number, output in enumerate(outputs):
            row = rows[f"p{number}/{method}"]
            assert (output["instruction"], output["output"]) == (row["prompt"][0]["content"], row["text"])
            assert output["dataset"] == "mine" and list(output) == ["instruction", "output", "generator", "dataset"]
        names |= {output["generator"] for output in outputs}
    assert names == {"tiny", "tiny-depth-2", "tiny-best-of-n-depth-2"}
    assert rows["long/chain/2"]["prompt"] == turns


def drafts_of(kind: str, folder, data):
    """Another model's answers to the prompts, in the shapes that are accepted."""
    prompts = read_jsonl(data["prompts"])
    if kind == "alpaca_eval":
        rows = [
            {"instruction": prompt["prompt"], "output": f"draft {prompt['id']}", "generator": "them"}
            for prompt in prompts
        ]
        (folder / "drafts.json").write_text(json.dumps(rows, indent=1))
        return folder / "drafts.json"
    if kind == "ids":
        rows = [
            {"id": prompt["id"], "text": f"draft {prompt['id']}", "generator": "them"} for prompt in reversed(prompts)
        ]
    else:
        turns = {prompt["id"]: [{"role": "user", "content": prompt["prompt"]}] for prompt in prompts}
        rows = [
            {"id": name, "prompt": turns[name], "method": method, "depth": depth, "text": text, "generator": "them"}
            for name in turns
            for method, depth, text in (
                ("chain", 1, f"draft {name}"),
                ("chain", 2, "later"),
                ("iid", 1, "another"),
                ("best_of_n", 1, "the best"),
            )
        ]
    return write_jsonl(folder / "drafts.jsonl", rows)


@pytest.mark.parametrize("kind", ["alpaca_eval", "ids", "records"])
def test_drafts_of_others_are_revised(kind, tiny_model, tiny_data, tmp_path, engine):
    drafts = drafts_of(kind, tmp_path, tiny_data)
    argv = flags(tiny_model, tiny_data, tmp_path / "out", "--drafts", str(drafts), "--oracle", "")
    if kind != "ids":
        argv = flags(tiny_model, tiny_data, tmp_path / "out", "--drafts", str(drafts), "--prompts", "")
    refine(argv)
    rows = read_jsonl(tmp_path / "out/answers.jsonl")
    first = [row for row in of(rows, "chain") if row["depth"] == 1]
    assert [row["text"] for row in first] == [f"draft p{number}" for number in range(24)]
    assert {(row["role"], row["generator"]) for row in first} == {("draft", "them")}
    assert {row["tokens"] for row in first} == {len("draft p1") + 1, len("draft p10") + 1}  # bytes and the end of turn
    assert {row["generator"] for row in rows if row not in first} == {"tiny"}
    assert engine.asked[0][1] == 1 and len(engine.asked[0][0]) == 24
    assert of(rows, "iid")  # its own answers
    outputs = json.loads((tmp_path / "out/alpaca_eval_depth_1.json").read_text())
    assert {output["generator"] for output in outputs} == {"them"}


def test_a_draft_that_is_too_long_is_shown_without_its_end(tiny_model, tiny_data, tmp_path, engine):
    from transformers import AutoTokenizer

    text = "".join(chr(97 + number % 26) for number in range(500))
    rows = [{"prompt": "Hm?", "text": text}, {"prompt": "Well?", "text": "short"}]
    drafts = write_jsonl(tmp_path / "drafts.jsonl", rows)
    argv = flags(tiny_model, tiny_data, tmp_path / "out", "--drafts", str(drafts), "--prompts", "", "--depth", "2")
    assert refine(argv)["drafts_cut"] == 1
    contexts = engine.asked[0][0]
    assert [len(context) for context in contexts] == [256 - 8, len(contexts[1])]
    shown = re.search(r"assistant\n(\w+)<", AutoTokenizer.from_pretrained(tiny_model).decode(contexts[0]))[1]
    assert len(shown) > 50 and text.startswith(shown)
    assert of(read_jsonl(tmp_path / "out/answers.jsonl"), "chain")[0]["tokens"] == 501


def test_a_run_s_policy_and_settings(tiny_model, tiny_data, tmp_path, engine):
    of_run = ("--rollout.temperature", "0.6", "--rollout.max_new_tokens", "7", "--rollout.engine", "hf")
    of_run += (
        "--data.max_len",
        "300",
        "--ds.param_dtype",
        "fp32",
        "--model.beta",
        "0.5",
        "--slhf.follower_prompt",
        "More.",
    )
    run = make_run(tmp_path / "mine", tiny_model, *of_run, rounds=4)
    argv = ["--model", str(run), "--prompts", str(tiny_data["prompts"]), "--out", str(tmp_path / "out")]
    settings, policy = load(argv)
    assert (policy.folder, policy.name) == (str(run / "round_3/policy"), "mine-round-3")  # the fourth is not finished
    rollout = settings.rollout
    assert (rollout.temperature, rollout.max_new_tokens, rollout.engine) == (0.6, 7, "hf")
    assert (settings.data.max_len, settings.ds.param_dtype, settings.beta) == (300, "fp32", 0.5)
    assert (settings.follower_prompt, settings.round, settings.controls) == ("More.", 3, ["iid"])
    assert load([*argv, "--rollout.temperature", "0.9"])[0].rollout.temperature == 0.9
    assert load([*argv, "--round", "2"])[1].folder == str(run / "round_2/policy")
    refine([*argv, "--depth", "1", "--controls="])
    again = tmp_path / "out/resolved_config.yaml"
    assert load(["--config", str(again)])[0] == load([*argv, "--depth", "1", "--controls="])[0]
    plain, _ = load(["--model", str(tiny_model), *argv[2:]])
    assert (plain.rollout.temperature, plain.rollout.max_new_tokens, plain.data.max_len) == (0.9, 512, 2048)
    assert plain.follower_prompt == IMPROVE


def test_killed_and_resumed_it_leaves_the_same_bytes(tiny_model, tiny_data, tiny_reward_model, tmp_path):
    more = ("--oracle", "reward_model", "--reward.model_name_or_path", str(tiny_reward_model))

    def argv(folder: Path) -> list[str]:
        return ["refine", *flags(tiny_model, tiny_data, folder, *more)]

    killed_at(lambda writes: range(3, writes, writes // 5), tmp_path, argv)
    whole = tmp_path / "whole"
    with pytest.raises(ValueError, match=r"--depth: was 3, now 4"):
        refine([*flags(tiny_model, tiny_data, whole, *more, "--depth", "4"), "--resume"])
    with pytest.raises(ValueError, match="--out .* already holds a run: add --resume"):
        refine(argv(whole)[1:])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model", ""), "--model: missing"),
        (("--out", ""), "--out: missing"),
        (("--prompts", ""), "--prompts: missing, give prompts to answer, or --drafts"),
        (("--depth", "0"), "--depth: 0 is out of range"),
        (("--control_samples", "0"), "--control_samples: 0 is out of range"),
        (("--controls", "best_of_n"), "--controls: best_of_n needs an oracle"),
        (("--controls", "iid|iid"), "given twice"),
        (("--controls", "all"), "each item one of iid, best_of_n"),
        (("--round", "1"), "--round: --model .* is not a run folder"),
        (("--split", "test"), "--split: --prompts .* has no splits"),
        (("--follower_prompt", " "), "--follower_prompt: empty"),
        (("--rollout.max_new_tokens", "256"), "--rollout.max_new_tokens: 256 leaves no room"),
        (("--rollout.temperature", "0"), "--rollout.temperature: 0.0 is out of range"),
        (("--rollout.n_samples_per_prompt", "2"), "--rollout.n_samples_per_prompt is unknown"),
        (("--vllm.num_engines", "2"), "--vllm.num_engines: --rollout.engine hf is selected"),
        (("--oracle", "marks"), "--oracle: unknown oracle 'marks'"),
        (("--oracle", "reward_model"), "--reward.model_name_or_path: missing"),
        (
            ("--oracle", "refining:Marks", "--reward.max_len", "9"),
            "--reward.max_len: --oracle refining:Marks is selected",
        ),
        (("--oracle", "implicit", "--reward.model_name_or_path", "x"), "--ref.model_name_or_path: missing"),
        (("--beta", "0.3"), "--beta: there is no --oracle"),
        (("--controls", "nothing", "--control_samples", "9"), "--control_samples: there are no --controls"),
        (("--vllm.enable_sleep", "false"), "--vllm.enable_sleep is unknown"),
        (("--model", "nowhere"), "--model nowhere cannot be loaded"),
        (("--data.max_len", "4096"), "--data.max_len 4096 exceeds the 2048 positions of --model"),
        (("--data.max_len", "60"), "too_long 24 of 24"),
    ],
)
def test_bad_settings_are_named_before_a_model_is_loaded(more, message, tiny_model, tiny_data, tmp_path, monkeypatch):
    from openrlhf_sgpo import staged_command

    monkeypatch.setattr(staged_command, "build_strategy", lambda config: pytest.fail("a model would be loaded"))
    with pytest.raises(ValueError, match=message):
        refine(flags(tiny_model, tiny_data, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "yes"}], "line 1: missing column prompt or id; found text"),
        ([{"id": "p0", "text": "yes"}], "line 1: missing column prompt; found id, text; add it, or give --prompts"),
        ([{"prompt": "Hm?"}], "line 1: missing column text or output"),
        (["yes"], "line 1: expected an object"),
        ([{"prompt": "Hm?", "text": "yes", "method": "iid", "depth": 1}], "only the first answers of chains are read"),
    ],
)
def test_drafts_that_cannot_be_used_are_named(rows, message, tiny_model, tiny_data, tmp_path):
    drafts = write_jsonl(tmp_path / "drafts.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        refine(flags(tiny_model, tiny_data, tmp_path / "out", "--drafts", str(drafts), "--prompts", ""))
    assert not (tmp_path / "out").exists()


def test_every_prompt_needs_one_draft(tiny_model, tiny_data, tmp_path):
    rows = read_jsonl(drafts_of("ids", tmp_path, tiny_data))
    argv = flags(tiny_model, tiny_data, tmp_path / "out", "--drafts", str(tmp_path / "drafts.jsonl"))
    write_jsonl(tmp_path / "drafts.jsonl", rows[2:])
    with pytest.raises(ValueError, match="no answer to 2 of 24 prompts, such as p22, p23"):
        refine(argv)
    write_jsonl(tmp_path / "drafts.jsonl", [*rows, rows[0]])
    with pytest.raises(ValueError, match=r"two answers to one prompt \(p23\)"):
        refine(argv)
    with pytest.raises(ValueError, match="--depth: 1 revises nothing of --drafts"):
        load([*argv[: argv.index("--depth")], "--depth", "1", *argv[argv.index("--depth") + 2 :]])


def test_folders_without_a_policy(tiny_model, tiny_data, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is neither a run folder .* nor a model"):
        load(flags(tmp_path / "empty", tiny_data, tmp_path / "out"))
    (tmp_path / "empty/resolved_config.yaml").write_text(signed("model: tiny\n"))  # of a refinement
    with pytest.raises(ValueError, match="is neither a run folder .* nor a model"):
        load(flags(tmp_path / "empty", tiny_data, tmp_path / "out"))
    run = make_run(tmp_path / "begun", tiny_model, rounds=1)
    argv = ["--model", str(run), "--prompts", str(tiny_data["prompts"]), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="has not finished any round"):
        load(argv)
    run = make_run(tmp_path / "run", tiny_model, rounds=3)
    with pytest.raises(ValueError, match="--round: 3 is not finished in the run .*; finished: 1, 2"):
        load(["--model", str(run), *argv[2:], "--round", "3"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="refine is one process"):
        load(["--model", str(run), *argv[2:]])


def documented() -> list[str]:
    pages = [ROOT / "README.md", ROOT / "docs/refinement.md"]
    blocks = [block for page in pages for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)]
    return [line for block in blocks for line in block.splitlines() if "-sgpo refine" in line]


@pytest.mark.parametrize("command", documented())
def test_documented_commands_have_flags_that_exist(command, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    make_run(tmp_path / "runs/slhf", tiny_model)
    argv = shlex.split(command)
    load(argv[argv.index("refine") + 1 :])


def test_settings_are_read_without_torch():
    code = "import sys, openrlhf_sgpo.refinement.settings; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
