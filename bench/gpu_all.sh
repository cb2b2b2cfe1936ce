#!/bin/sh
# All that needs a card, in at most ten minutes; bench/gpu_all.py says what it takes and leaves.
# PYTHON names the interpreter; without it .venv's, or else python3.
cd "$(dirname "$0")/.." || exit 1
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python3; }
PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 exec "$PYTHON" bench/gpu_all.py "$@"
