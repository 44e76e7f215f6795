#!/usr/bin/env bash
# What the launchers run on a TPU host, in ~/tulu_jax: installs, starts, stops and tells of the run.
#   worker.sh install                   a virtual environment with the extras tpu and gcs
#   worker.sh start [ARGUMENT...]       python -m tulu_jax.train ARGUMENT..., detached, its output
#                                       in run.log; stops what runs there first
#   worker.sh status                    "running", "ended CODE" or "absent"
#   worker.sh stop                      SIGTERM: the run saves and ends
# Secrets are read from run.env there, and the token of the start from token.env (NAME=value lines,
# see export_variables in common.sh). Neither is ever printed.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

PYTHON="${PYTHON:-.venv/bin/python}"
SECONDS_TO_SAVE=120

running() { [ -f run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; }

stop() {
  running || return 0
  kill -TERM "$(cat run.pid)"
  for _ in $(seq "$SECONDS_TO_SAVE"); do running || return 0; sleep 1; done
  kill -KILL "$(cat run.pid)"
}

case "${1:-}" in
  install)
    for python in python3.13 python3.12 python3.11; do command -v "$python" >/dev/null && break; done
    if ! command -v "$python" >/dev/null; then  # Ubuntu 22.04 of the TPU images has 3.10
      sudo apt-get -qq update && sudo apt-get -qq install -y "$python" "$python-venv"
    fi
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[tpu,gcs]'
    ;;
  start)
    shift
    for file in run.env token.env; do
      if [ -f "$file" ]; then export_variables "$file"; fi
    done
    stop
    rm -f run.pid run.status
    . launch/tpu_env.sh
    # shellcheck disable=SC2016  # the inner shell expands it
    setsid bash -c '"$@" >>run.log 2>&1 & echo $! >run.pid; wait $!; echo $? >run.status' \
      worker "$PYTHON" -m tulu_jax.train "$@" </dev/null >/dev/null 2>&1 &
    for _ in $(seq 50); do [ -s run.pid ] && break; sleep 0.1; done
    echo "started"
    ;;
  status)
    if [ -s run.status ]; then echo "ended $(cat run.status)"
    elif running; then echo "running"
    else echo "absent"; fi
    ;;
  stop) stop ;;
  *) die "expected install, start, status or stop" ;;
esac
