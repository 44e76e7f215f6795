#!/usr/bin/env bash
# Makes a virtual environment, installs the test requirements, and passes the test suite.
#   bash launch/test.sh                  the default suite
#   bash launch/test.sh --slow           what it leaves out: more TPU compilations, long runs
# Further arguments go to pytest. What is compiled is kept in ~/.cache/tulu_jax_tests, which may be
# deleted (TULU_JAX_TEST_CACHE names another folder).
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
unset PYTHONDONTWRITEBYTECODE  # the hundreds of processes that tests start find it made
MARK="not slow"
if [ "${1:-}" = --slow ]; then
  MARK="slow"
  shift
fi
# In the order of collection, which has the longest files first. A worker that dies ends the run:
# with another in its place xdist waits forever for files that are done.
"$VENV/bin/python" -m pytest -m "$MARK" -n 2 --dist loadfile --no-loadscope-reorder \
  --max-worker-restart 0 tests "$@"
if [ $# -eq 0 ] && [ "$MARK" != slow ]; then  # alone: TensorFlow and torch's Triton crash in one
  "$VENV/bin/python" -m pytest tests/data/test_seqio_bridge.py
fi
