#!/usr/bin/env bash
""":"
# Shell half: `bash examples/train_ssapo.sh [--num_gpus N] --algo sgpo ...` starts this very file once per rank.
# Python reads this block as the module docstring: no three double quotes in a row and no backslashes in it.
set -eu
ranks="${NUM_GPUS:-1}"
rest=()
while [ $# -gt 0 ]; do
  case "$1" in
    --num_gpus) ranks="$2"; shift 2 ;;
    --num_gpus=*) ranks="${1#*=}"; shift ;;
    *) rest+=("$1"); shift ;;
  esac
done
exec python -m openrlhf_sgpo.launch "$ranks" "$0" "${rest[@]}"
: <<'# end of the Python half'
":"""
# Python half: `deepspeed --num_gpus N examples/train_ssapo.sh --algo sgpo ...` runs this file with python, once per rank.
import sys

from openrlhf_sgpo.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
# end of the Python half
