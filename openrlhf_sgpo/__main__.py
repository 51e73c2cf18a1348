"""``python -m openrlhf_sgpo``: the command ``openrlhf-sgpo``, even if its folder is not on the PATH."""

import sys


def main() -> int:
    """Run the command. ``doctor`` works where the packages that the others need are missing."""
    if sys.argv[1:2] == ["doctor"]:
        from openrlhf_sgpo.doctor.report import main as run

        return run(sys.argv[2:])
    from openrlhf_sgpo.cli.main import main as run_any

    return run_any()


if __name__ == "__main__":
    sys.exit(main())
