"""The command ``openrlhf-sgpo``: train, algorithms."""

from __future__ import annotations

import sys
from dataclasses import replace

from openrlhf_sgpo import algorithms, config, flags

USAGE = """usage: openrlhf-sgpo COMMAND [flags]

  train        train a policy: --algo NAME, see `openrlhf-sgpo train --help --algo NAME`
  algorithms   list the algorithms
"""


def train(argv: list[str]) -> int:
    """Parse, check, and either print the resolved configuration (--dry_run) or run."""
    if "--help" in argv or "-h" in argv:
        rest = [word for word in argv if word not in ("--help", "-h")]
        algorithm = algorithms.get(flags.peek(rest, "algo") or config.Config().algo)
        print(flags.help_text({"": config.Config, algorithm.name: algorithm.settings}))
        return 0
    settings, options = config.load(argv)
    algorithm = algorithms.get(settings.algo)
    if settings.dry_run:
        print(flags.dump({"": replace(settings, dry_run=False), algorithm.name: options}), end="")
        return 0
    from openrlhf_sgpo.rounds import Run

    Run(settings, algorithm, options).execute()
    return 0


def list_algorithms() -> int:
    for name in algorithms.names():
        algorithm = algorithms.get(name)
        print(f"{name:12} {algorithm.paper:18} {algorithm.summary}")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher hands every rank its number as a flag; the environment has it as well.
    argv = [word for word in argv if not word.startswith("--local_rank")]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    try:
        if command == "train":
            return train(rest)
        if command == "algorithms" and not rest:
            return list_algorithms()
    except ValueError as error:
        # Settings and data errors are written for the user: no traceback.
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"error: unknown command {' '.join(argv)!r}\n{USAGE}", end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
