"""SLHF with an adapter per role: each is sampled, scored and trained in its own role, and both outlive rounds and kills."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from running import killed_at, read_jsonl
from test_plays import flags, play
from test_refine import refine
from trainers import make_trainer

from openrlhf_sgpo import run_settings
from openrlhf_sgpo.algorithms.slhf import SLHF, SLHFSettings
from openrlhf_sgpo.rollout import Sampling

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
TWO = ["--slhf.sharing", "two_adapters", "--slhf.kappa_mode", "learning_rate", "--ds.lora.rank", "4"]
SCALING = 16 / 4  # --ds.lora.alpha over the rank


def two(**changes) -> SLHFSettings:
    return SLHFSettings(**({"sharing": "two_adapters", "kappa_mode": "learning_rate"} | changes))


def spread(actor):
    """Adapters that make of one base two models."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(actor.named_parameters()):
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return actor


def state_of(actor) -> dict[str, torch.Tensor]:
    from openrlhf_sgpo.openrlhf.actor import _whole_state

    state = _whole_state(actor, actor.model.module)
    return {name.removeprefix("base_model.model."): weight.clone() for name, weight in state.items()}


def merged(base: Path, state: dict[str, torch.Tensor], adapter: str, folder: Path) -> str:
    """A plain model with W + (alpha / rank) B A in place of each W."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, up in state.items():
        stem, marker, _ = name.partition(f".lora_B.{adapter}.")
        if marker:
            model.get_submodule(stem).weight.data += SCALING * up @ state[name.replace("lora_B", "lora_A")]
    model.save_pretrained(folder)
    return str(folder)


class Call(NamedTuple):
    """Of an engine: what it was asked, and what it answered."""

    engine: Any
    contexts: list[tuple[int, ...]]
    sampling: Sampling
    samples: list[list[Any]]

    def answers_of(self, folder: str) -> list[list[Any]]:
        """What a fresh engine with the weights in this folder says to the same."""
        fresh = type(self.engine)(self.engine.config, self.engine.stop.chat, folder)
        return fresh.generate(self.contexts, self.sampling, label="")


def record(patch: pytest.MonkeyPatch, wanted: str) -> list[Call]:
    """The calls of engines whose label begins so, from now on."""
    from openrlhf_sgpo.rollout.hf import HuggingFaceRollout

    generate, calls = HuggingFaceRollout.generate, []

    def wrapped(self, prompts, sampling, label):
        samples = generate(self, prompts, sampling, label)
        if label.startswith(wanted) and bool(label) == bool(wanted):
            calls.append(Call(self, prompts, sampling, samples))
        return samples

    patch.setattr(HuggingFaceRollout, "generate", wrapped)
    return calls


class Run(NamedTuple):
    """folders: by step the weights of leader and follower that should have answered. calls: by step, of leader and follower."""

    folder: Path
    folders: dict[int, list[str]]
    calls: dict[int, list[Call]]


@pytest.fixture(
    scope="module",
    params=[[], ["--train.layout", "padded", "--ds.zero_stage", "3"]],
    ids=["packed, ZeRO 2", "padded, ZeRO 3"],
)
def spread_run(request, tiny_model, tiny_data, tmp_path_factory):
    """Two rounds of two steps with adapters that are far apart from the beginning."""
    from openrlhf_sgpo.openrlhf import PolicyWeights, load_actor
    from openrlhf_sgpo.sources import fresh_answers
    from openrlhf_sgpo.training import policies

    path = tmp_path_factory.mktemp("adapters")
    synced: list[str] = []

    def weights_and_merge(actor, adapter):
        synced.append(merged(tiny_model, state_of(actor), adapter, path / f"synced_{len(synced)}"))
        return PolicyWeights(actor, adapter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "load_actor", lambda *args, **more: spread(load_actor(*args, **more)))
        patch.setattr(fresh_answers, "PolicyWeights", weights_and_merge)
        calls = record(patch, "")
        more = ["--rounds.steps", "2", "--slhf.followers", "2", "--adam.lr", "1e-2", *request.param]
        play(*flags(tiny_model, tiny_data, path / "run", "slhf", *TWO, *more))
    round_1 = [str(path / "run/round_1" / name) for name in ("policy", "follower")]
    folders = {1: [str(tiny_model)] * 2, 2: synced[:2], 3: round_1, 4: synced[2:]}
    return Run(path / "run", folders, {step: calls[2 * step - 2 : 2 * step] for step in folders})


def test_each_role_answers_with_its_own_weights(spread_run):
    for step, folders in spread_run.folders.items():
        for place, call in enumerate(spread_run.calls[step]):
            assert call.samples == call.answers_of(folders[place])
            assert step == 1 or call.samples != call.answers_of(folders[1 - place])


def test_each_role_is_scored_with_its_own_weights(spread_run):
    from transformers import AutoModelForCausalLM

    lines = read_jsonl(spread_run.folder / "round_1/plays.jsonl") + read_jsonl(
        spread_run.folder / "round_2/plays.jsonl"
    )
    for step in (2, 3, 4):
        leader, follower = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in spread_run.folders[step]
        )
        rows = [row["answers"] for row in lines if row["step"] == step]
        for place, model in enumerate((leader, follower, follower)):
            call = spread_run.calls[step][min(place, 1)]
            for row, context, samples in zip(rows, call.contexts, call.samples, strict=True):
                answer = samples[max(place - 1, 0)].token_ids
                with torch.no_grad():
                    logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1] / 0.9
                expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum().item()
                assert row[place]["log_prob"] == pytest.approx(expected, abs=1e-4)


def test_a_round_leaves_both_as_whole_folders(spread_run, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert {path.name for path in (spread_run.folder / "round_2").iterdir() if path.is_dir()} == {"policy", "follower"}
    for name in ("policy", "follower"):
        folder = spread_run.folder / "round_2" / name
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        expected = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().state_dict()
        assert merged.keys() == expected.keys()
        assert all(torch.allclose(merged[name], expected[name], atol=1e-5) for name in merged)
        assert AutoTokenizer.from_pretrained(folder).chat_template


def test_refine_revises_with_the_follower(spread_run, tiny_data, tmp_path, monkeypatch):
    calls = record(monkeypatch, "depth")
    argv = ["--model", str(spread_run.folder), "--prompts", str(tiny_data["prompts"]), "--out", str(tmp_path / "out")]
    summary = refine([*argv, "--depth", "3", "--controls="])
    policy, follower = (str(spread_run.folder / "round_2" / name) for name in ("policy", "follower"))
    assert (summary["policy"], summary["follower"]) == (policy, follower)
    for call, caller, other in zip(calls, (policy, follower, follower), (follower, policy, policy), strict=True):
        assert call.samples == call.answers_of(caller) != call.answers_of(other)


@pytest.fixture
def make(tiny_model, tiny_data, tmp_path):
    """Trainers of spread adapters. plain: of adapters as they begin."""
    from transformers import AutoTokenizer

    from openrlhf_sgpo.openrlhf import build_strategy, load_actor
    from openrlhf_sgpo.training import policies

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with contextlib.ExitStack() as opened:

        def make(options: SLHFSettings, *more: str, plain: bool = False):
            defaults = ["--lr_scheduler", "constant", "--ds.zero_stage", "0"]
            settings, _ = run_settings.load(flags(tiny_model, tiny_data, tmp_path, "slhf", *TWO, *defaults, *more))
            trainer = make_trainer(
                *(SLHF(options, 0.1), settings, build_strategy(settings), tokenizer, tmp_path, 20), str(tiny_model)
            )
            with pytest.MonkeyPatch.context() as patch:
                if not plain:
                    patch.setattr(policies, "load_actor", lambda *args, **other: spread(load_actor(*args, **other)))
                return opened.enter_context(trainer)

        yield make


@pytest.fixture(scope="module")
def plays():
    """Four plays of random tokens."""
    from openrlhf_sgpo.data.records import Answer, Prompt
    from openrlhf_sgpo.training.plays import Play

    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 250, (size,), generator=generator).tolist())

    prompt = Prompt("p", [{"role": "user", "content": "?"}])
    shapes, wins = [(5, 9, 3, 4), (7, 8, 2, 6), (3, 12, 5, 5), (4, 6, 6, 1)], (0.9, 0.2, 0.7, 0.4)
    samples = [[(draw(a), Answer("", True, draw(b))), (draw(c), Answer("", True, draw(d)))] for a, c, b, d in shapes]
    drawn = [Play(prompt, answers, [[0.5, p], [1 - p, 0.5]]) for answers, p in zip(samples, wins, strict=True)]
    return drawn


def of(adapter: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weight.flatten() for name, weight in sorted(state.items()) if f".{adapter}." in name])


def gradients(trainer, plays, step: int) -> dict[str, torch.Tensor]:
    """After one of two micro-batches, before the optimiser's step."""
    trainer.actor.train()
    trainer._micro_step(step, plays[:2], 4, last=False)
    parameters = ((name, weight) for name, weight in trainer.actor.named_parameters() if weight.requires_grad)
    return {name: torch.zeros_like(weight) if weight.grad is None else weight.grad for name, weight in parameters}


def test_gradients_stay_with_their_role(make, plays):
    both = gradients(make(two()), plays, step=1)
    assert of("leader", both).abs().max() > 1e-3 and of("follower", both).abs().max() > 1e-3
    alternate = two(kappa_mode="alternate")  # kappa is 5: the sixth step is the leader's
    for step, adapter, other_adapter in ((5, "follower", "leader"), (6, "leader", "follower")):
        alone = gradients(make(alternate), plays, step)
        assert torch.equal(of(adapter, alone), of(adapter, both))
        assert not of(other_adapter, alone).any()
    for options in (two(kappa=1.0), two(kappa=9.0, kappa_mode="loss_weight")):  # the second is no setting of a run
        assert torch.allclose(of("leader", gradients(make(options), plays, 1)), of("leader", both), atol=1e-7)


def test_gradient_checkpointing_recomputes_with_the_adapter_of_the_forward_pass(make, plays):
    plain, recomputed = (
        gradients(make(two(), "--model.gradient_checkpointing_enable", on), plays, 1) for on in ("false", "true")
    )
    for name in plain:
        assert torch.allclose(plain[name], recomputed[name], atol=1e-6), name


@pytest.mark.parametrize("stage", ["2", "3"])
def test_kappa_is_the_ratio_of_learning_rates(stage, make, plays):
    """Adam's first step moves a weight by the learning rate."""
    trainer = make(two(kappa=5.0), "--ds.zero_stage", stage, plain=True)
    trainer.step(1, plays)
    state = {name: weight for name, weight in state_of(trainer.actor).items() if ".lora_B." in name}
    for adapter, expected in (("leader", 1e-3), ("follower", 5e-3)):
        assert of(adapter, state).abs().median().item() == pytest.approx(expected, rel=1e-3)


def test_a_schedule_keeps_the_ratio(make, plays):
    trainer = make(two(kappa=3.0), "--lr_scheduler", "cosine_with_min_lr", "--ds.zero_stage", "2")
    rates = []
    for step in range(1, 6):
        trainer.step(step, plays)
        rates.append(trainer.scheduler.get_last_lr())
        assert rates[-1][1] == pytest.approx(3 * rates[-1][0])
    assert len({leader for leader, _ in rates}) == 5


def test_an_adapter_rests_while_the_other_learns(make, plays):
    """kappa_mode alternate, in the steps of leader, follower, leader, follower: the momentum of one does not move it in the
    other's, and all stages of ZeRO do the same."""
    followers = []
    for more in (
        ("--ds.zero_stage", "0"),
        ("--ds.zero_stage", "2"),
        ("--ds.zero_stage", "3", "--ds.adam_offload", "true"),
    ):
        trainer = make(two(kappa_mode="alternate", kappa=1.0), *more)
        states = [state_of(trainer.actor)]
        for step in (2, 3, 4, 5):
            trainer.step(step, plays)
            states.append(state_of(trainer.actor))
        for number, moved, rested in ((1, "leader", "follower"), (2, "follower", "leader"), (3, "leader", "follower")):
            before, after = states[number - 1 : number + 1]
            assert torch.equal(of(rested, before), of(rested, after))
            assert (of(moved, before) - of(moved, after)).abs().median() > 1e-4
        followers.append(states[-1])
    for other in followers[1:]:
        for name in ("leader", "follower"):
            assert (of(name, followers[0]) - of(name, other)).abs().quantile(0.99) < 1e-4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (TWO[:4], r"--ds.lora.rank: 0, but --algo slhf trains the adapters leader and follower"),
        (TWO[2:], r"--slhf.kappa_mode learning_rate needs .* --slhf.sharing two_adapters"),
        (TWO[:2] + TWO[4:], r"--slhf.kappa_mode loss_weight has no effect with --slhf.sharing two_adapters"),
    ],
)
def test_settings_that_cannot_be(more, message, tiny_model, tiny_data, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_settings.load(flags(tiny_model, tiny_data, tmp_path, "slhf", *more))


def test_killed_and_resumed(tiny_model, tiny_data, tmp_path):
    more = [*TWO, "--ckpt.save_steps", "2", "--ds.lora.dropout", "0.2"]
    killed_at(
        lambda writes: range(writes // 4, writes, writes // 2),
        *(tmp_path, lambda folder: ["train", *flags(tiny_model, tiny_data, folder, "slhf", *more)]),
    )
