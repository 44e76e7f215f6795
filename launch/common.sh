# Shared by the launchers, which source it: flags, dry runs, and no secret on any command line.
# shellcheck shell=bash disable=SC2034

die() { echo "${0##*/}: $*" >&2; exit 2; }

# set_flags NAME... -- ARGUMENT...: --name=value sets FLAG_name, --name alone sets it to 1. Only the
# names given are known. What follows a -- is left in TRAIN_ARGS, the arguments of tulu_jax.train.
set_flags() {
  local known=() argument name
  while [ "$1" != -- ]; do known+=("$1"); shift; done
  shift
  for name in "${known[@]}"; do printf -v "FLAG_$name" '%s' ''; done
  TRAIN_ARGS=()
  while [ $# -gt 0 ]; do
    argument=$1; shift
    [ "$argument" = -- ] && { TRAIN_ARGS=("$@"); break; }
    [[ $argument == --* ]] || die "unexpected argument $argument; flags are --name=value"
    name=${argument#--}; name=${name%%=*}
    [[ " ${known[*]} " == *" $name "* ]] || die "unknown flag --$name; known are ${known[*]/#/--}"
    if [[ $argument == *=* ]]; then printf -v "FLAG_$name" '%s' "${argument#*=}"
    else printf -v "FLAG_$name" '%s' 1; fi
  done
  for argument in "${TRAIN_ARGS[@]}"; do  # its value is not printed
    [[ $argument =~ ([A-Za-z_]*(KEY|TOKEN|SECRET|PASSWORD))= ]] &&
      die "${BASH_REMATCH[1]} on a command line would be seen by everybody; see --help"
  done
  return 0
}

require() {
  local name flag
  for name in "$@"; do
    flag=FLAG_$name
    [ -n "${!flag}" ] || die "--$name is missing; see --help"
  done
}

require_train_args() {
  case "$ACTION" in run | resume | watch) ;; *) return 0 ;; esac
  [ ${#TRAIN_ARGS[@]} -gt 0 ] || die "give the arguments of tulu_jax.train after --"
}

# Prints a command as one could type it, and runs it unless --dry_run.
run() {
  local quoted
  printf -v quoted ' %q' "$@"
  echo "+$quoted"
  [ -n "$FLAG_dry_run" ] || "$@"
}

# The header comment of the script is its help.
help_and_exit() {
  sed -n '2,/^set -/{/^set -/d;/shellcheck/d;s/^# \{0,1\}//;p;}' "launch/${0##*/}"
  exit "${1:-0}"
}
