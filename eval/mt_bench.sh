#!/usr/bin/env bash
# MT-Bench of one or many models; can be stopped and started again at any time, and models can be added later:
#   bash eval/mt_bench.sh --models runs/quickstart start=build/smollm2 --judge.preset gpt-4.1 --out leaderboard
set -euo pipefail
exec "${PYTHON:-python}" -m openrlhf_sgpo.cli.main evaluate --tasks mt_bench "$@"
