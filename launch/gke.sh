#!/usr/bin/env bash
# A run on GKE: a JobSet (or, with --xpk, an xpk workload) on TPU node pools, one for each slice.
#   gke.sh create --name=N --cluster=C --location=L --machine_type=ct5p-hightpu-4t \
#                 --topology=4x4x8                            the node pools
#   gke.sh run    ... --accelerator=tpu-v5p-slice --image=I -- --gin_file=sft_70b.gin
#   gke.sh follow ...                                         the output of process 0
#   gke.sh resume ... -- --gin_file=sft_70b.gin               delete the JobSet, apply it again
#   gke.sh watch  ... -- --gin_file=sft_70b.gin               apply it again whenever it is gone, until
#                                                             it is done, cannot work (status 2), or
#                                                             --restarts
#   gke.sh delete ...                                         JobSet and node pools
# Flags: --name --cluster --location --project, --slices=1, --spot, --machine_type --topology,
# --chips=4 (of a host), --accelerator --image --secret=S, --restarts=100, --namespace=default,
# --xpk --type=v5p-256 (xpk's name of the slice), --every=60, --dry_run (print commands only).
# What follows -- goes to `python -m tulu_jax.train`, with a gs:// workdir. The image holds tulu_jax
# in its working directory. The cluster has the JobSet controller.
# Secrets (WANDB_API_KEY, HF_TOKEN) are keys of the Kubernetes secret --secret, made from a file:
#   kubectl create secret generic S --from-env-file=secrets.env
# The JobSet refers to it by name, and to NAME-token, which each run or resume makes anew: a random
# TULU_JAX_TOKEN, by which the hosts know one another. xpk would print them, so --xpk and --secret
# exclude one another, and a run of xpk has no token.
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
set_flags name cluster location project slices spot machine_type topology chips accelerator image \
  secret restarts namespace xpk type every dry_run -- "$@"
require name cluster location
check "$LABEL" name
check "$POSITIVE" slices chips
check "$NUMBER" every restarts
check "$POSITIVE(x$POSITIVE){1,2}" topology
SLICES="${FLAG_slices:-1}" CHIPS="${FLAG_chips:-4}" RESTARTS="${FLAG_restarts:-100}"
EVERY="${FLAG_every:-60}" NAMESPACE="${FLAG_namespace:-default}"
PLACE=(--location="$FLAG_location")
[ -n "$FLAG_project" ] && PLACE+=(--project="$FLAG_project")
[ -z "$FLAG_xpk" ] || [ -z "$FLAG_secret" ] || die "--xpk prints the environment it sets; drop --secret, or use the JobSet (without --xpk)"
require_train_args
SLICE_CHIPS=$((${FLAG_topology//x/*})) HOSTS=$((SLICE_CHIPS / CHIPS))  # of a slice
[ $((SLICE_CHIPS % CHIPS)) -eq 0 ] || die "--topology=$FLAG_topology has $SLICE_CHIPS chips, which hosts of --chips=$CHIPS do not divide"

kube() { run kubectl --namespace="$NAMESPACE" "$@"; }

create() {
  require machine_type topology
  for ((i = 0; i < SLICES; i++)); do
    run gcloud container node-pools create "$FLAG_name-$i" --cluster="$FLAG_cluster" "${PLACE[@]}" \
      --machine-type="$FLAG_machine_type" --tpu-topology="$FLAG_topology" \
      --num-nodes="$HOSTS" ${FLAG_spot:+--spot} \
      --scopes=https://www.googleapis.com/auth/cloud-platform
  done
}

# Evictions and any exit status restart all pods, at most --restarts times, but for 2: a restart would
# end the same way.
jobset() {
  local arguments="" argument
  for argument in "${TRAIN_ARGS[@]}"; do
    arguments+=", $(json "${argument//\$/\$\$}")"  # Kubernetes expands $(NAME) and makes $$ a $
  done
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(json "$FLAG_name")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $RESTARTS
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $SLICES
    template:
      spec:
        parallelism: $HOSTS
        completions: $HOSTS
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: train, operator: In, values: [2]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(json "$FLAG_accelerator")
              cloud.google.com/gke-tpu-topology: $(json "$FLAG_topology")
${FLAG_spot:+              cloud.google.com/gke-spot: \"true\"
}            tolerations:
            - {key: google.com/tpu, operator: Exists}
            - {key: cloud.google.com/gke-spot, operator: Exists}
            containers:
            - name: train
              image: $(json "$FLAG_image")
              command: [bash, -c, '. launch/tpu_env.sh && exec python -m tulu_jax.train "\$@"', train$arguments]
              ports:
              - containerPort: 8471  # libtpu
              - containerPort: 8482  # the coordinator
              resources:
                limits: {google.com/tpu: $CHIPS}
              envFrom:
              - secretRef: {name: $(json "$FLAG_name-token")}
${FLAG_secret:+              - secretRef: {name: $(json "$FLAG_secret")\}
}
YAML
}

json() {  # as a string in YAML
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\r'/\\r} text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

start() {
  require image
  if [ -n "$FLAG_xpk" ]; then
    require type
    local quoted
    printf -v quoted ' %q' "${TRAIN_ARGS[@]}"
    run xpk workload create --cluster="$FLAG_cluster" --zone="$FLAG_location" \
      ${FLAG_project:+--project="$FLAG_project"} --workload="$FLAG_name" --tpu-type="$FLAG_type" \
      --num-slices="$SLICES" --docker-image="$FLAG_image" --max-restarts="$RESTARTS" \
      --restart-on-exit-codes=75 --termination-grace-period-seconds=120 ${FLAG_spot:+--spot} \
      --command=". launch/tpu_env.sh && python -m tulu_jax.train$quoted"
    return
  fi
  require accelerator topology
  [ -n "$FLAG_dry_run" ] && { jobset; share_token; kube apply -f -; return; }
  share_token && jobset | kube apply -f -
}

share_token() {  # by standard input, in place of that of the last start
  kube delete secret "$FLAG_name-token" --ignore-not-found &&
    kube create secret generic "$FLAG_name-token" --from-env-file=/dev/stdin <<<"$(new_token)"
}

stop() {
  if [ -n "$FLAG_xpk" ]; then
    run xpk workload delete --cluster="$FLAG_cluster" --zone="$FLAG_location" \
      ${FLAG_project:+--project="$FLAG_project"} --workload="$FLAG_name" --force
    return
  fi
  kube delete jobset "$FLAG_name" --ignore-not-found --wait
}

delete() {
  stop
  [ -n "$FLAG_xpk" ] || kube delete secret "$FLAG_name-token" --ignore-not-found
  for ((i = 0; i < SLICES; i++)); do
    run gcloud container node-pools delete "$FLAG_name-$i" --cluster="$FLAG_cluster" "${PLACE[@]}" \
      --quiet
  done
}

follow() {
  kube logs --follow --tail=100 --selector "jobset.sigs.k8s.io/jobset-name=$FLAG_name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

told() {  # "Completed", "Failed REASON", "" while it runs, "ABSENT", or "UNKNOWN" if it cannot be asked
  answer kubectl --namespace="$NAMESPACE" get jobset "$FLAG_name" \
    -o "jsonpath={.status.terminalState} {.status.conditions[?(@.type=='Failed')].reason}"
}

apply_again() { stop && start; }

watch() {
  if [ -n "$FLAG_dry_run" ]; then
    echo "# every $EVERY s; if the JobSet is absent:"
    stop; start
    return
  fi
  local now begun=""
  while true; do
    now=$(told); now=${now% }
    echo "$(date -u +%H:%M:%S) JobSet ${now:-running}"
    case "$now" in
      Completed*) echo "The run is done."; return 0 ;;
      "Failed ReachedMaxRestarts")
        echo "The run was restarted $RESTARTS times, as --restarts=$RESTARTS allows, and failed again: giving up; see its output with follow." >&2
        return 1 ;;
      "Failed FailJobSetFailurePolicyAction") hopeless; return 2 ;;
      Failed*) echo "The run failed (${now#Failed }); see its output with follow." >&2; return 1 ;;
      ABSENT)
        if [ -n "$begun" ]; then again "The JobSet is gone" apply_again
        elif apply_again; then begun=1
        else again "The first start failed" true; fi ;;
      UNKNOWN) ;;  # look again
      *) begun=1 ;;
    esac
    sleep "$EVERY"
  done
}

case "$ACTION" in
  create) create ;;
  run) start ;;
  resume) stop; start ;;
  follow) follow ;;
  watch) watch ;;
  delete) delete ;;
esac
