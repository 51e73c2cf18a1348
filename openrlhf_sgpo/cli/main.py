"""The command ``openrlhf-sgpo``."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

from openrlhf_sgpo import __version__, algorithms, extras, flags, run_settings
from openrlhf_sgpo.cli import ending
from openrlhf_sgpo.cli.cluster import ray_places, train_on_ray
from openrlhf_sgpo.config import Config, RaySettings
from openrlhf_sgpo.launch import COMMAND, follow_deepspeed
from openrlhf_sgpo.memory import lean_imports
from openrlhf_sgpo.output import other_packages_apart, say
from openrlhf_sgpo.preflight import check_run
from openrlhf_sgpo.run_folder import release_locks

USAGE = """usage: openrlhf-sgpo COMMAND [flags]

  train        train a policy: --algo NAME, whose own flags `train --help --algo NAME` lists too
  doctor       check this machine: what works, what does not, and the command that mends it
  estimate     memory, time and disk of a training: the flags of train, and --estimate.gpu NAME --estimate.gpus N
  data         report on the data that these flags would train on, without a model
  evaluate     AlpacaEval 2.0, MT-Bench and others: --models RUN ... --judge.preset NAME --out FOLDER
  compare      runs head to head: --runs RUN RUN ... --oracle NAME --out FOLDER, or --suite FILE, which trains them first
  refine       answer prompts and revise the answers: --model RUN --prompts FILE --out FOLDER
  chat         talk to the policy of a run, beside the initial one: chat RUN
  push         share the policy of a finished run on the Hugging Face hub: push RUN --to OWNER/NAME
  report       draw report.html of runs, comparisons and leaderboards: report FOLDER ...
  judge-check  how far a judge agrees with human preferences, and its biases: --data.dataset FILE --oracle NAME
  algorithms   list the algorithms
  games        drive the algorithms on small games to their known solutions: --out FOLDER draws their paths

`openrlhf-sgpo COMMAND --help` lists the flags of a command, `openrlhf-sgpo --version` prints the version.
"""
REPORT_USAGE = """usage: openrlhf-sgpo report FOLDER...

Writes report.html to each folder of a run, a comparison or a leaderboard.
"""
ALGORITHMS_USAGE = """usage: openrlhf-sgpo algorithms

Lists the algorithms, including those of other packages: a summary, the source, and the flags with their defaults.
"""

# Stands for a space at which a line must not break; textwrap breaks only at ASCII spaces.
_UNBROKEN = "\u00a0"


def train(argv: list[str]) -> int:
    """Parse, check, and either print the resolved configuration (--dry_run) or run."""
    settings, options = run_settings.load(argv)
    algorithm = algorithms.get(settings.algo)
    if settings.dry_run:
        print(flags.dump({"": replace(settings, dry_run=False), algorithm.name: options}), end="")
        return 0
    with other_packages_apart():
        if ray_places(settings):
            return train_on_ray(run, settings, algorithm, options, ["train", *argv])
        if settings.ray != RaySettings():
            raise ValueError(
                "--ray: this is not --launcher ray, and would not read it; leave it out, or add --launcher ray"
            )
        run(settings, algorithm, options)
    return 0


def run(settings: Config, algorithm: algorithms.AlgorithmType, options: Any) -> list[dict[str, Any]]:
    """Run the training that these settings describe; returns the rows of its results table.

    Raises ValueError if a package is missing, before the other packages are loaded."""
    if problem := extras.missing("transformers", "deepspeed", "peft", "openrlhf"):
        raise ValueError(problem)
    check_run(settings, algorithm, options)
    with lean_imports():
        from openrlhf_sgpo.loop import execute

    return execute(settings, algorithm, options)


def data(argv: list[str]) -> int:
    """Print the reports on the run's data; no model is loaded. Takes the flags and files of ``train``."""
    algorithm, (instances, *_) = run_settings.read(argv)
    settings: Config = instances[""]
    run_settings.check_data(settings, algorithm)
    with other_packages_apart():
        from openrlhf_sgpo.data.report import require
        from openrlhf_sgpo.data.run_data import inspect_run, load_policy_chat, load_run
        from openrlhf_sgpo.rollout.roles import prompt_room

        records = load_run(settings, with_prompts=True)
        chat, _ = load_policy_chat(settings)
        room = prompt_room(algorithm, instances[algorithm.name], settings, chat)
        reports = inspect_run(records, chat, settings, room).reports
        say("\n".join(report.text() for report in reports), end="")
        require(reports)
    return 0


def doctor(argv: list[str]) -> int:
    """What works on this machine, see ``openrlhf_sgpo.doctor``."""
    from openrlhf_sgpo.doctor.report import main as examine_machine

    return examine_machine(argv)


def estimate(argv: list[str]) -> int:
    """What a run would take, see ``openrlhf_sgpo.estimate``. Takes the flags and files of ``train``."""
    from openrlhf_sgpo.estimate.settings import load

    asked = load(argv)
    with other_packages_apart():
        with lean_imports():
            from openrlhf_sgpo.estimate.command import run_estimate

        run_estimate(asked)
    return 0


def refine(argv: list[str]) -> int:
    """Chains of answers by a policy on disk, see ``openrlhf_sgpo.refinement``."""
    from openrlhf_sgpo.refinement.settings import load

    settings, policy = load(argv)
    with other_packages_apart():
        with lean_imports():
            from openrlhf_sgpo.refinement.refine import Refinement

        Refinement(settings, policy).execute()
    return 0


def evaluate(argv: list[str]) -> int:
    """Benchmarks and their leaderboard, see ``openrlhf_sgpo.benchmarks.evaluate``."""
    from openrlhf_sgpo.benchmarks.settings import load

    loaded = load(argv)
    with other_packages_apart():
        with lean_imports():
            from openrlhf_sgpo.benchmarks.evaluate import Evaluation

        Evaluation(loaded).execute()
    return 0


def compare(argv: list[str]) -> int:
    """Runs head to head, see ``openrlhf_sgpo.comparison.compare``; with --suite the runs are trained first."""
    from openrlhf_sgpo.comparison.settings import load

    argv = _named("runs", argv)
    if flags.peek(argv, "suite") and not flags.HELP & set(argv):
        from openrlhf_sgpo.comparison.suite import train_suite

        argv = train_suite(argv)
    settings, groups = load(argv)
    with other_packages_apart():
        with lean_imports():
            from openrlhf_sgpo.comparison.compare import RunComparison

        RunComparison(settings, groups).execute()
    return 0


def report(argv: list[str]) -> int:
    """HTML pages of results, see ``openrlhf_sgpo.report``."""
    if not argv or flags.HELP & set(argv):
        print(REPORT_USAGE, end="")
        return 0 if argv else 2
    from openrlhf_sgpo.report import write_report

    for word in argv:
        print(write_report(Path(word)))
    return 0


def chat(argv: list[str]) -> int:
    """A conversation with the policy of a run, see ``openrlhf_sgpo.chat``."""
    if problem := extras.missing("transformers"):
        raise ValueError(problem)
    from openrlhf_sgpo.chat.settings import load

    settings, speakers = load(_named("model", argv))
    with other_packages_apart():
        with lean_imports():
            from openrlhf_sgpo.chat.conversation import Conversation

        conversation = Conversation(settings, speakers)
    conversation.run(settings.prompt)
    return 0


def push(argv: list[str]) -> int:
    """A policy to the Hugging Face hub, see ``openrlhf_sgpo.push``."""
    if problem := extras.missing("huggingface_hub"):
        raise ValueError(problem)
    from openrlhf_sgpo.push import load, push_policy

    print(push_policy(load(_named("run", argv))))
    return 0


def _named(flag: str, argv: list[str]) -> list[str]:
    """Arguments whose first words may stand without their flag."""
    return argv if not argv or argv[0].startswith("-") else [f"--{flag}", *argv]


def judge_check(argv: list[str]) -> int:
    """Agreement and biases of a judge, see ``openrlhf_sgpo.comparison.judge_check``."""
    from openrlhf_sgpo.comparison.judge_check import check_judge, load

    settings = load(argv)
    with other_packages_apart():
        check_judge(settings)
    return 0


def games(argv: list[str]) -> int:
    """The gate that every algorithm must pass, see ``openrlhf_sgpo.games``."""
    from openrlhf_sgpo.games.gate import GateSettings, run_gate

    instances, *_ = flags.parse(argv, {"": GateSettings})
    return run_gate(instances[""])


def list_algorithms(argv: list[str]) -> int:
    """Print a block per algorithm: name and summary; paper and origin; flags with their defaults. At most 100 columns."""
    if flags.HELP & set(argv):
        print(ALGORITHMS_USAGE, end="")
        return 0
    if argv:
        raise ValueError(f"algorithms takes no arguments, got {' '.join(argv)}")
    width = max(map(len, algorithms.names())) + 1
    indent = " " * width
    for name in algorithms.names():
        head = name.ljust(width)
        try:
            summary, paper, *settings = _described(algorithms.get(name))
        except Exception as error:  # foreign code: a broken package must not hide the others
            summary, paper, *settings = f"error: {error}", ""
        for line in (summary, ", ".join(filter(None, [paper, algorithms.origin(name)])), *settings):
            text = textwrap.fill(
                line, 100, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
            )
            print(text.replace(_UNBROKEN, " "))
            head = indent
    return 0


def _described(algorithm: type[algorithms.Algorithm]) -> list[str]:
    """Summary, paper, the algorithm's flags with defaults, and the shared flags with another default than usual."""
    shared = _flag_words(algorithm.defaults)
    lines = [_flag_words(flags.to_dict({algorithm.name: algorithm.settings()})), f"shared: {shared}" if shared else ""]
    return [algorithm.summary, algorithm.paper, *filter(None, lines)]


def _flag_words(tree: dict[str, Any], prefix: str = "") -> str:
    """``--group.flag value`` for every leaf, without line breaks inside a flag."""
    words = []
    for key, value in tree.items():
        if isinstance(value, dict):
            words.append(_flag_words(value, f"{prefix}{key}."))
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            texts = [str(item).lower() if isinstance(item, bool) else str(item) or "''" for item in values]
            words.append(_UNBROKEN.join([f"--{prefix}{key}", *texts]))
    return " ".join(words)


COMMANDS = {
    "train": train,
    "doctor": doctor,
    "estimate": estimate,
    "data": data,
    "evaluate": evaluate,
    "compare": compare,
    "refine": refine,
    "chat": chat,
    "push": push,
    "report": report,
    "judge-check": judge_check,
    "algorithms": list_algorithms,
    "games": games,
}


def _rank_problem() -> str:
    """What is wrong with the variables in which a launcher gives a rank its number; empty if nothing is. Those that are set to
    nothing, or mean nothing without RANK, are unset."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not value or (name != "RANK" and "RANK" not in os.environ):
            os.environ.pop(name, None)
        elif not value.isdigit():
            return f"{name}={value} is not the number that a launcher gives a rank; unset it"
    return ""


def main(argv: list[str] | None = None) -> int:
    """Run the command in ``argv``, by default this process's arguments; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher passes every rank its number as a flag; the environment has it as well.
    argv = [word for word in argv if not word.startswith("--local_rank")]
    if not argv or argv[0] in flags.HELP:
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"openrlhf-sgpo {__version__}")
        return 0
    if problem := _rank_problem():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    command, arguments = argv[0], argv[1:]
    with ending.stopped_by_signals(argv):
        try:
            if "RANK" in os.environ and COMMAND not in os.environ:
                follow_deepspeed(command)
            # For module:Class: the console script and the launcher put only the script's folder on the path. At the end, so a
            # user's file never shadows an installed package.
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())
            if command in COMMANDS:
                try:
                    code = COMMANDS[command](arguments)
                except flags.HelpAsked as asked:
                    (about,) = re.findall(rf"^  {command} +(.+)$", USAGE, re.MULTILINE)
                    print(f"openrlhf-sgpo {command}: {about}\n\n{asked}")
                    code = 0
                ending.part_from_other_ranks(failed=False)
                sys.stdout.flush()
                return code
        except (Exception, KeyboardInterrupt) as error:
            return ending.explain(error, argv)
        finally:
            release_locks()
    print(f"error: unknown command {' '.join(argv)!r}\n{USAGE}", end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
