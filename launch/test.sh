#!/usr/bin/env bash
# Makes a virtual environment, installs the test requirements, and passes the test suite.
#   bash launch/test.sh                  arguments go to pytest
# PYTHON chooses the interpreter (3.11 or later); VENV the environment (default .venv-test).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv-test}"

if [ ! -x "$VENV/bin/python" ]; then
  "$PYTHON" -m venv "$VENV"
fi
pip() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0  # by itself first: a plain torch may resolve to a CUDA build of gigabytes
pip -e ".[test]"
"$VENV/bin/python" -c "import seqio, gcsfs, gcp_storage_emulator, libtpu, trl, yaml"  # their tests skip without them

"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m ruff format --check .
# The longest files first, so that the two workers end together; the hundreds of processes that the
# tests start find the package's bytecode made.
unset PYTHONDONTWRITEBYTECODE
"$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
  tests/test_recipe.py tests/kernels/test_compiles.py tests/test_trainer.py tests/test_step.py \
  tests/test_processes.py tests/test_rehearse.py tests/planning/test_dryrun.py tests "$@"
if [ $# -eq 0 ]; then  # in a process of its own: TensorFlow and torch's Triton crash in one
  "$VENV/bin/python" -m pytest tests/data/test_seqio_bridge.py
fi
