#!/usr/bin/env bash
# Algorithms head to head at equal budgets. Example, on CPU with SmolLM2 (make build/smollm2/config.json):
#   bash examples/head_to_head.sh
#   bash examples/head_to_head.sh --suite examples/head_to_head/gpu.yaml
# Further flags are those of `openrlhf-sgpo compare`. Can be stopped and started again at any time.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
case " $* " in
  *" --suite"*) ;;
  *) set -- --suite "$here/head_to_head/cpu.yaml" "$@" ;;
esac
exec "${PYTHON:-python}" -m openrlhf_sgpo.cli.main compare "$@"
