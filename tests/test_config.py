"""The settings of a run: loading, resolving, cross checks, and a slim import."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from openrlhf_sgpo import algorithms, flags, trl_names
from openrlhf_sgpo.algorithms.base import Needs, NoSettings, PairAlgorithm
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.run_settings import check, load, samples, sections


@dataclass
class LoopSettings:
    rho: float = setting(0.1, "radius")


class Loop(PairAlgorithm):
    """An algorithm with rounds."""

    name = "loop"
    settings = LoopSettings
    needs = Needs(rounds=True, samples_per_prompt=2)

    @classmethod
    def option_problems(cls, options):
        return [] if options.rho >= 0 else ["--loop.rho: negative, use at least 0"]


class Once(PairAlgorithm):
    """An algorithm of one stage, without settings."""

    name = "once"


class Taken(PairAlgorithm):
    name = "train"


REQUIRED = [
    "--model.model_name_or_path",
    "org/model",
    "--data.dataset",
    "pairs.jsonl",
    "--ckpt.output_dir",
    "runs/first",
]
ONCE = ["--algo", f"{__name__}:Once", *REQUIRED]
LOOP = ["--algo", f"{__name__}:Loop", *REQUIRED, "--data.prompt_dataset", "prompts.jsonl"]


MORE = {
    "inpo": ["--inpo.inverse_step", "0.3"],
    "comal": ["--comal.inverse_step", "0.3", "--comal.reference_rounds", "1"],
}


def problems(*argv: str) -> list[str]:
    with pytest.raises(flags.SettingsError) as caught:
        load(argv)
    return str(caught.value).splitlines()


def write(folder: Path, text: str) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def every_flag(node: dict, prefix: str = "") -> dict:
    leaves: dict = {}
    for key, value in node.items():
        leaves |= every_flag(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def test_load_resolves_defaults_that_depend_on_others():
    config, options = load([*LOOP, "--adam.lr", "1e-6", "--loop.rho", "0.2"])
    assert options == LoopSettings(rho=0.2)
    assert config.ref.model_name_or_path == "org/model"
    assert config.seed.lr == 1e-6
    assert config.logger.wandb.run_name == "first"
    config, options = load([*LOOP, "--seed.lr=1", "--ref.model_name_or_path=other", "--logger.wandb.run_name=mine"])
    assert (config.seed.lr, config.ref.model_name_or_path, config.logger.wandb.run_name) == (1.0, "other", "mine")


@pytest.mark.parametrize("argv", [LOOP, ONCE])
def test_loading_the_dump_of_a_run_is_stable(tmp_path, argv):
    config, options = load(argv)
    name = argv[1].rpartition(":")[2].lower()
    text = flags.dump({"": config, name: options})
    assert load(write(tmp_path, text)) == (config, options)


def test_every_field_survives_the_round_trip(tmp_path):
    """Sets every flag to something else than its default, on the command line, and compares what a dump restores."""
    default = flags.to_dict({"": Config()})
    other = {
        "random": "fps",
        "new": "all",
        "initial": "previous",
        "both": "random",
        "auto": "padded",
        "bf16": "fp16",
        "vllm": "hf",
        "cosine_with_min_lr": "linear",
    }
    argv, names = [], every_flag(default)
    assert len(names) > 60
    for name, value in names.items():
        if isinstance(value, bool):
            texts = [str(not value).lower()]
        elif isinstance(value, list):
            texts = ["0.25", "0.125"] if name == "adam.betas" else ["3", "4"]
        elif name == "ds.zero_stage":
            texts = ["3"]
        elif name == "launcher":
            texts = ["ray"]
        elif isinstance(value, (int, float)):
            texts = [str(value + 1)]
        elif name in ("judge.api_key", "logger.wandb.key"):
            texts = ["env"]
        else:
            texts = [other.get(value, f"{value}: 'odd' #text")]
        argv += [f"--{name}", *texts]
    parsed = flags.parse(argv, {"": Config})
    assert parsed.given.keys() == names.keys()
    changed = every_flag(flags.to_dict(parsed.instances))
    assert [name for name in names if changed[name] == names[name]] == ["judge.api_key", "logger.wandb.key"]
    restored = flags.parse(write(tmp_path, flags.dump(parsed.instances)), {"": Config}).instances
    for group in (parsed.instances[""].judge, parsed.instances[""].logger.wandb):
        (secret,) = {"api_key", "key"} & vars(group).keys()
        assert getattr(group, secret)
        setattr(group, secret, "")
    assert restored == parsed.instances


def test_the_algorithm_may_come_from_the_file(tmp_path):
    config, _ = load([*write(tmp_path, f"algo: {__name__}:Once\n"), *REQUIRED])
    assert config.algo == f"{__name__}:Once"


def test_required_settings():
    messages = problems("--algo", f"{__name__}:Loop")
    assert [line.partition(":")[0] for line in messages] == [
        "--model.model_name_or_path",
        "--data.dataset",
        "--ckpt.output_dir",
        "--data.prompt_dataset",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--train.batch_size 0", "--train.batch_size: 0 is out of range, use at least 1"),
        ("--rollout.engine hf --rollout.batch_size -2", "--rollout.batch_size: -2 is out of range, use at least 1"),
        ("--train.seed 4294967296", "--train.seed: 4294967296 is out of range, use 0 to 4294967295"),
        ("--seed.size -1", "--seed.size: -1 is out of range, use at least 0"),
        ("--ds.lora.rank -1", "--ds.lora.rank: -1 is out of range, use at least 0"),
        ("--ds.lora.dropout 1", "--ds.lora.dropout: 1.0 is out of range, use at least 0, less than 1"),
        ("--model.beta 0", "--model.beta: 0.0 is out of range, use more than 0"),
        ("--adam.betas 0.9 1", "--adam.betas: 0.9 1.0 is out of range, use at least 0, less than 1 each"),
        ("--seed.flip_rate 1.1", "--seed.flip_rate: 1.1 is out of range, use 0 to 1"),
        ("--rollout.top_p 0", "--rollout.top_p: 0.0 is out of range, use more than 0, at most 1"),
        ("--vllm.gpu_memory_utilization 1.5", "--vllm.gpu_memory_utilization: 1.5 is out of range"),
        ("--ckpt.save_steps 0", "--ckpt.save_steps: 0 is out of range, use at least 1, or -1"),
        ("--rollout.temperature 0", "--rollout.temperature: 0.0 is out of range, use more than 0"),
        ("--train.micro_batch_size 5", "--train.batch_size: 32 is not a multiple of --train.micro_batch_size 5"),
        ("--rollout.n_samples_per_prompt 1", "--rollout.n_samples_per_prompt: 1 is too few for --algo loop"),
        ("--data.prompt_dataset=", "--data.prompt_dataset: missing, the rounds need prompts"),
        ("--rounds.prompts 1 2", "--rounds.prompts: 2 numbers for --rounds.count 3; give one per round"),
        ("--rounds.prompts 1 2 0", "--rounds.prompts: 1 2 0 is out of range, use at least 1 each"),
        ("--rollout.max_new_tokens 512", "--rollout.max_new_tokens: 512 leaves no room for a prompt"),
        ("--train.layout shared_prefix", "--train.layout got 'shared_prefix', expected one of auto, padded"),
        (
            "--ds.adam_offload true --ds.zero_stage 0",
            "--ds.adam_offload: DeepSpeed offloads nothing at --ds.zero_stage 0",
        ),
        ("--train.layout padded --train.max_tokens 9", "--train.max_tokens: is not read with --train.layout padded"),
        ("--ds.packing_samples", "--ds.packing_samples: does not work with --ds.attn_implementation sdpa"),
        ("--loop.rho -1", "--loop.rho: negative, use at least 0"),
    ],
)
def test_cross_checks(argv, message):
    base = LOOP if "prompt_dataset" not in argv else LOOP[:-2]
    (problem,) = problems(*base, *argv.split())
    assert problem.startswith(message)


def test_a_home_that_no_shell_has_replaced():
    base = [word if word != LOOP[LOOP.index("--ckpt.output_dir") + 1] else "~/run" for word in LOOP]
    (problem,) = problems(*base)
    assert problem.startswith("--ckpt.output_dir: ~/run would be in a folder called ~, which only a shell replaces")


def test_all_problems_at_once():
    assert len(problems(*LOOP, "--train.batch_size=0", "--rollout.temperature=0", "--loop.rho=-1")) == 3


def test_an_algorithm_of_rounds_needs_one():
    (problem,) = problems(*LOOP[:-2], "--rounds.count", "0")
    assert problem.startswith("--rounds.count: 0, but --algo loop learns in rounds only; use --algo dpo")


def test_settings_that_the_algorithm_would_not_read(tmp_path):
    # At its default, but asked for on the command line.
    reasons = {
        "data.prompt_dataset": "has no rounds",
        "rollout.top_p": "samples only for --eval.dataset and --eval.max_prompts",
        "oracle": "samples only for --eval.dataset and --eval.max_prompts",
    }
    assert problems(*ONCE, "--rollout.top_p=1.0", "--data.prompt_dataset", "x", "--oracle", "implicit") == [
        f"--{name}: --algo once with --rounds.count 0 {reason} and would not read it (command line); leave it out"
        for name, reason in reasons.items()
    ]
    (problem,) = problems(*LOOP, "--reward.max_len", "9")
    assert problem.startswith("--reward.max_len: --oracle implicit is selected")
    (problem,) = problems(*LOOP, "--rollout.engine", "hf", "--vllm.num_engines", "1")
    assert problem.startswith("--vllm.num_engines: --rollout.engine hf is selected")


def test_one_file_serves_all_algorithms(tmp_path, capsys):
    """What a file says to others is ignored, set back to its default, and named with the reason."""
    file = write(
        tmp_path,
        "sgpo: {radius: 0.5}\nspa: {extrapolation: [0.1]}\nrollout: {top_p: 0.9, engine: vllm}\nrounds: {steps: 7}\n"
        "data: {prompt_dataset: prompts.jsonl}\neval: {max_prompts: 5}\n",
    )
    config, options = load([*file, *ONCE])
    assert options == Once.settings()
    assert (config.rollout.top_p, config.rounds.steps, config.data.prompt_dataset) == (1.0, 100, "")
    assert capsys.readouterr().err.splitlines() == [
        f"note: {file[1]}: sgpo.radius, spa.extrapolation are ignored, this run has --algo {__name__}:Once",
        f"note: {file[1]}: rounds.steps, data.prompt_dataset are ignored, --algo once with --rounds.count 0 has no rounds",
        f"note: {file[1]}: rollout.top_p, eval.max_prompts are ignored, --algo once with --rounds.count 0 samples only for "
        "--eval.dataset and --eval.max_prompts",
    ]
    assert load(write(tmp_path, flags.dump({"": config, "once": options}))) == (config, options)
    assert capsys.readouterr().err == ""
    # On the command line the same is an error.
    assert len(problems(*ONCE, "--sgpo.radius", "0.5")) == 1
    assert len(problems(*ONCE, "--rollout.top_p", "0.9", "--rounds.steps", "7")) == 2


@pytest.mark.parametrize("algo", algorithms.BUILT_INS)
def test_the_quickstart_s_file_serves_every_algorithm(algo):
    """What algorithms need beyond it is an oracle."""
    oracle = ["--oracle", "reward_model", "--reward.model_name_or_path", "r"]
    needs_one = algo == "iter_dpo" or algorithms.get(algo).fresh_answers
    config, _ = load(["--config", "quickstart", "--algo", algo, *(oracle if needs_one else []), *MORE.get(algo, [])])
    assert config.rounds.count == (0 if algo == "preference_model" else 2)


@pytest.mark.slow
def test_names_of_trl_are_answered_with_ours():
    """Every one of them, with names that exist here; none is an alias."""
    known = set(every_flag(flags.to_dict({"": Config()})))
    for name in algorithms.names():
        known |= set(every_flag(flags.to_dict({name: algorithms.get(name).settings()})))
    for name, answer in trl_names.ANSWERS.items():
        (problem,) = problems(*ONCE, f"--{name}", "1")
        assert problem == f"--{name} {answer} (command line)"
        assert set(re.findall(r"--([\w.]+)", answer)) <= known, name
    assert len(trl_names.ANSWERS) > 40
    assert problems(*ONCE, "--learning_rate", "1e-6", "--bf16", "--seed", "1") == [
        "--learning_rate is TRL's name, here it is --adam.lr (command line)",
        "--bf16 is TRL's name, here it is --ds.param_dtype bf16 (command line)",
        "--seed is TRL's name, here it is --train.seed (command line)",
    ]


def test_sampling_without_rounds_is_for_the_evaluation():
    argv = [*ONCE, "--eval.dataset", "e.jsonl", "--eval.max_prompts", "4", "--rollout.max_new_tokens", "8"]
    config, _ = load(argv)
    assert samples(config, Once) and not samples(load(ONCE)[0], Once)
    (problem,) = problems(*argv[:-1], "512")
    assert problem.startswith("--rollout.max_new_tokens: 512 leaves no room for a prompt")
    (problem,) = problems(*argv, "--oracle", "reward_model")
    assert problem.startswith("--reward.model_name_or_path: missing, --oracle reward_model needs it")
    (problem,) = problems(*argv, "--rollout.n_samples_per_prompt", "3")
    assert problem.startswith("--rollout.n_samples_per_prompt: --algo once with --rounds.count 0 has no rounds")


def test_an_algorithm_of_human_pairs_has_rounds_where_they_are_asked_for():
    assert load(ONCE)[0].rounds.count == 0
    config, _ = load([*ONCE, "--rounds.count", "2", "--data.prompt_dataset", "x", "--seed.lr", "1e-4"])
    assert (config.rounds.count, config.seed.lr) == (2, 1e-4)
    (problem,) = problems(*ONCE, "--rounds.count", "2")
    assert problem.startswith("--data.prompt_dataset: missing, the rounds need prompts")


def test_an_algorithm_may_shift_shared_defaults(tmp_path):
    rounds = [*LOOP[2:], "--algo", "iter_dpo", "--reward.model_name_or_path", "r"]
    config, _ = load(rounds)
    assert (config.oracle, config.rounds.loss_reference, config.rounds.count) == ("reward_model", "previous", 3)
    config, _ = load([*rounds, "--rounds.loss_reference", "initial"])
    assert config.rounds.loss_reference == "initial"
    assert load(write(tmp_path, flags.dump({"": config})))[0] == config
    (problem,) = problems(*rounds[:-2])
    assert problem.startswith("--reward.model_name_or_path: missing, --oracle reward_model needs it")
    assert "previous" in flags.help_text(sections(algorithms.get("iter_dpo")))


def test_flags_of_another_algorithm():
    messages = problems(*LOOP, "--sgpo.anything", "1", "--lr", "1")
    assert messages == [
        "--sgpo.anything belongs to --algo sgpo, this run has --algo loop (command line)",
        "--lr is unknown; did you mean --adam.lr? (or --seed.lr) (command line)",
    ]


def test_algorithms_that_cannot_be_loaded():
    assert problems("--algo", "sgp0")[0].startswith("--algo: unknown algorithm 'sgp0'; did you mean sgpo?")
    assert problems("--algo=")[0].startswith("--algo: unknown algorithm ''")
    assert problems("--algo", f"{__name__}:Taken")[0].startswith("--algo: train cannot be an algorithm's name")


def test_check_without_knowing_what_was_given():
    config = sections(Once)[""]()
    config.model.model_name_or_path, config.data.dataset, config.ckpt.output_dir = "m", "d", "o"
    check(config, NoSettings(), Once, {})


def test_configurations_share_no_list():
    Config().rounds.prompts.append(1)
    assert Config().rounds.prompts == []


def test_help_covers_every_flag():
    text = flags.help_text({"": Config, "loop": LoopSettings})
    assert all(f"--{name} (" in text for name in every_flag(flags.to_dict({"": Config()})))
    assert max(map(len, text.splitlines())) <= 120


def test_settings_import_nothing_heavy():
    code = (
        "import sys, openrlhf_sgpo.config, openrlhf_sgpo.flags, openrlhf_sgpo.algorithms\n"
        "heavy = {'torch', 'transformers', 'openrlhf', 'ray', 'vllm', 'deepspeed', 'cvxpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
