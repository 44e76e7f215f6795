#!/usr/bin/env bash
# A run on a TPU VM slice, or on several joined by Multislice, through queued resources.
#   tpu_vm.sh create --name=N --zone=Z --type=v5p-512 --version=V   request the slice
#   tpu_vm.sh run    ... -- --gin_file=sft_70b.gin                  wait for it, install, start
#   tpu_vm.sh follow ...                                            the output of process 0
#   tpu_vm.sh resume ... -- --gin_file=sft_70b.gin                  start again, from the last
#                                                                   checkpoint
#   tpu_vm.sh watch  ... -- --gin_file=sft_70b.gin                  all of it: create, run, and again
#                                                                   after each preemption or death,
#                                                                   until the run is done, cannot
#                                                                   work (status 2), or --restarts
#   tpu_vm.sh delete ...                                            give the slice back
# Flags: --name --zone --type --version (the runtime, e.g. v2-alpha-tpuv5), --project, --slices=1,
# --spot, --env_file=FILE, --every=60 (seconds between looks), --restarts=100 (by watch), --dry_run
# (print the commands only).
# What follows -- goes to `python -m tulu_jax.train`, with a gs:// workdir: disks go with the slice.
# Secrets (WANDB_API_KEY, HF_TOKEN) stand in --env_file as NAME=value lines, values as they are, are
# copied to the hosts by scp, readable by you alone, and appear on no command line and in no output.
# So goes a new random TULU_JAX_TOKEN at each start, by which the hosts know one another.
# shellcheck disable=SC2154  # set_flags assigns FLAG_*
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

ACTION="${1:-}"
[ $# -gt 0 ] && shift
case "$ACTION" in
  create | run | follow | resume | watch | delete) ;;
  -h | --help) help_and_exit ;;
  *) help_and_exit 2 ;;
esac
set_flags name zone type version project slices spot env_file every restarts dry_run -- "$@"
require name zone
check "$LABEL" name
check "$POSITIVE" slices
check "$NUMBER" every restarts
SLICES="${FLAG_slices:-1}" EVERY="${FLAG_every:-60}" RESTARTS="${FLAG_restarts:-100}"
PLACE=(--zone="$FLAG_zone")
[ -n "$FLAG_project" ] && PLACE+=(--project="$FLAG_project")
[ -z "$FLAG_env_file" ] || (export_variables "$FLAG_env_file") || exit
require_train_args

NODES=("$FLAG_name")
if [ "$SLICES" -gt 1 ]; then
  NODES=()
  for ((i = 0; i < SLICES; i++)); do NODES+=("$FLAG_name-$i"); done
fi

queued() { run gcloud compute tpus queued-resources "$@"; }

on_all() {  # the same command on every host of every slice, all slices at once
  local node child failed=0 children=()
  for node in "${NODES[@]}"; do
    if [ -n "$FLAG_dry_run" ]; then on_node "$node" all "$1"; continue; fi
    on_node "$node" all "$1" &
    children+=($!)
  done
  for child in "${children[@]}"; do wait "$child" || failed=1; done
  return $failed
}

on_node() {
  run gcloud compute tpus tpu-vm ssh "$1" "${PLACE[@]}" --worker="$2" --command="$3"
}

copy_to_all() {
  local node
  for node in "${NODES[@]}"; do
    run gcloud compute tpus tpu-vm scp "$1" "$node:$2" "${PLACE[@]}" --worker=all || return 1
  done
}

create() {
  require type version
  local what=(--node-id="$FLAG_name")
  [ "$SLICES" -gt 1 ] && what=(--node-count="$SLICES" --node-prefix="$FLAG_name")
  queued create "$FLAG_name" "${PLACE[@]}" --accelerator-type="$FLAG_type" \
    --runtime-version="$FLAG_version" "${what[@]}" ${FLAG_spot:+--spot} \
    --scopes=https://www.googleapis.com/auth/cloud-platform
}

delete() { queued delete "$FLAG_name" "${PLACE[@]}" --force --quiet; }

state() {  # of the queued resource; ABSENT if there is none, UNKNOWN if it cannot be asked
  answer gcloud compute tpus queued-resources describe "$FLAG_name" "${PLACE[@]}" \
    --format='value(state.state)'
}

wait_until_active() {
  [ -n "$FLAG_dry_run" ] && {
    run gcloud compute tpus queued-resources describe "$FLAG_name" "${PLACE[@]}" \
      --format='value(state.state)'
    return
  }
  local now
  while now=$(state); [ "$now" != ACTIVE ]; do
    case "$now" in
      ABSENT) die "there is no queued resource $FLAG_name in $FLAG_zone; create it first" ;;
      FAILED|SUSPENDING|SUSPENDED) echo "$FLAG_name is $now" >&2; return 1 ;;
    esac
    echo "$(date -u +%H:%M:%S) $FLAG_name is $now"
    sleep "$EVERY"
  done
}

# Joined by &&: within a condition, as in watch, bash goes on after a command that failed.
install() {
  local source="${TMPDIR:-/tmp}/tulu_jax-$FLAG_name.tar.gz"
  run tar -czf "$source" --exclude=__pycache__ \
    tulu_jax configs launch setup.py pyproject.toml README.md &&
    copy_to_all "$source" tulu_jax.tar.gz &&
    on_all "mkdir -p tulu_jax && tar -xzf tulu_jax.tar.gz -C tulu_jax && \
bash tulu_jax/launch/worker.sh install" || return 1
  [ -z "$FLAG_env_file" ] && return 0
  on_all 'umask 077 && touch tulu_jax/run.env' && copy_to_all "$FLAG_env_file" tulu_jax/run.env
}

share_token() {  # a file that nobody else may read stays one through scp
  local file="${TMPDIR:-/tmp}/tulu_jax-$FLAG_name.token" failed=0
  [ -n "$FLAG_dry_run" ] || { rm -f "$file" && (umask 077 && set -C && new_token >"$file"); } || return 1
  copy_to_all "$file" tulu_jax/token.env || failed=1
  rm -f "$file"
  return $failed
}

start() {
  local quoted
  printf -v quoted ' %q' "${TRAIN_ARGS[@]}"
  share_token || return 1
  on_all "SLICES=$SLICES bash tulu_jax/launch/worker.sh start$quoted"
}

status() {  # of process 0: running, "ended CODE", absent, or nothing if it cannot be asked
  gcloud compute tpus tpu-vm ssh "${NODES[0]}" "${PLACE[@]}" --worker=0 \
    --command='bash tulu_jax/launch/worker.sh status' 2>/dev/null || true
}

# Brings the slice to life, whatever became of it, and the run on it.
revive() {
  case "$(state)" in
    FAILED|SUSPENDED) delete && create ;;
    ABSENT) create ;;
  esac && wait_until_active && install && start
}

watch() {
  if [ -n "$FLAG_dry_run" ]; then
    echo "# every $EVERY s; if the slice is absent, failed or suspended:"
    delete; create; wait_until_active; install; start
    echo "# if the slice is active, and the run died or was asked to stop (status 75):"
    start
    return
  fi
  local now told begun=""
  while true; do
    now=$(state) told=""
    [ "$now" = ACTIVE ] && told=$(status)
    echo "$(date -u +%H:%M:%S) slice $now, run ${told:-unknown}"
    case "$now $told" in
      "ACTIVE running") begun=1 ;;
      "ACTIVE ended 0") echo "The run is done."; return 0 ;;
      "ACTIVE ended 2") hopeless; return 2 ;;
      "ACTIVE ended "*) again "The run ended with status ${told#ended }" start ;;
      # A host that does not answer, or a slice that is about to change its state: look again.
      "ACTIVE " | "UNKNOWN " | "SUSPENDING " | "DELETING ") ;;
      *)
        local act=revive
        [ "$now" = ACTIVE ] && act=install_and_start
        if [ -n "$begun" ]; then again "The slice was $now, the run ${told:-lost}" "$act"
        elif "$act"; then begun=1
        else again "The first start failed (slice $now)" true; fi ;;
    esac
    sleep "$EVERY"
  done
}

install_and_start() { install && start; }

case "$ACTION" in
  create) create ;;
  run) wait_until_active; install; start ;;
  resume) wait_until_active; start ;;
  follow) on_node "${NODES[0]}" 0 'tail -n 100 -F tulu_jax/run.log' ;;
  watch) watch ;;
  delete) delete ;;
esac
