#!/bin/sh
# venv.sh FOLDER: a virtual environment with a Python that the lock has wheels for: one of the machine's or, where none fits, uv's.
# PYTHON, if set, is the only one that is tried.
fits='import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'
for python in ${PYTHON:-python3.11 python3.12 python3.13 python3.10 python3}; do
  if "$python" -c "$fits" 2>/dev/null; then exec "$python" -m venv "$1"; fi
done
if [ -z "$PYTHON" ] && command -v uv >/dev/null; then
  exec uv venv --quiet --seed --allow-existing --python '>=3.10,<3.14' "$1"
fi
echo "error: this needs a Python from 3.10 to 3.13 with venv, and ${PYTHON:-python3} is none: install one (on Debian and Ubuntu:" \
  "apt-get install python3-venv), or uv, which then brings its own, and run make again" >&2
exit 2
