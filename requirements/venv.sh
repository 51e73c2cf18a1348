#!/bin/sh
# venv.sh FOLDER: a virtual environment with a Python that the lock has wheels for: one of the machine's or, where none fits, uv's.
# PYTHON, if set, is the only one that is tried.
fits='import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'
for python in ${PYTHON:-python3.11 python3.12 python3.13 python3.10 python3}; do
  if "$python" -c "$fits" 2>/dev/null; then exec "$python" -m venv "$1"; fi
done
why="${PYTHON:-python3} is none" otherwise="or uv, which then brings its own"
if [ -z "$PYTHON" ] && command -v uv >/dev/null; then
  said=$(uv venv --quiet --seed --allow-existing --python '>=3.10,<3.14' "$1" 2>&1) && exit
  # Of uv's lines, the last cause is the reason.
  reason=${said#error: } reason=${reason##*cause: }
  reason=${reason%%
*}
  why="uv could not bring one ($reason)" otherwise="or let uv reach the network"
fi
echo "error: this needs a Python from 3.10 to 3.13 with venv, and $why: install one (on Debian and Ubuntu:" \
  "apt-get install python3-venv), $otherwise, and run make again" >&2
exit 2
