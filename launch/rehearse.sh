#!/usr/bin/env bash
# Rehearses a run of several hosts on this machine's CPU before a slice is rented: the same gin file
# with a tiny model, one process killed half-way, started again, losses compared. PASS or FAIL.
#   bash launch/rehearse.sh --processes=4 --gin_file=tulu_tiny_sft.gin
# PYTHON chooses the interpreter (default python3); `python -m tulu_jax.rehearse --help` has the rest.
set -euo pipefail
here=$(dirname "$0")/..
PYTHONPATH="$(cd "$here" && pwd)${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m tulu_jax.rehearse "$@"
