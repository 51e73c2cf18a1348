#!/usr/bin/env bash
# Four benchmarks of one or many models (IFBench is --tasks ifbench). Models with few positions have no room for some items of
# Arena-Hard: --partial leaves those out. Can be stopped and started again at any time, and models can be added later:
#   bash eval/leaderboard.sh --models runs/quickstart start=build/smollm2 --judge.preset gpt-4.1 --out leaderboard
set -euo pipefail
exec "${PYTHON:-python}" -m openrlhf_sgpo.cli.main evaluate --tasks alpaca_eval mt_bench ifeval arena_hard "$@"
