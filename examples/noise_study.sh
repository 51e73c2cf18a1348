#!/usr/bin/env bash
# Which losses help when labels are wrong. Example, on CPU with SmolLM2 (make build/smollm2/config.json):
#   bash examples/noise_study.sh --pairs pairs.jsonl --model build/smollm2 --out runs/noise_study
# Can be stopped and started again at any time; --report_only draws table and figure from what is there.
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/noise_study/study.py" "$@"
