# Shared by the launchers and worker.sh, which source it: flags, dry runs, files of variables, and no
# secret on any command line.
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
    [[ $argument == --* ]] || die "unexpected argument ${argument%%=*}; flags are --name=value"
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

NUMBER='0|[1-9][0-9]{0,5}'
POSITIVE='[1-9][0-9]{0,5}'
LABEL='[a-z]([-a-z0-9]{0,47}[a-z0-9])?'  # a name that Google Cloud and Kubernetes both take

# check PATTERN NAME...: each of these flags is absent or all of it matches PATTERN.
check() {
  local pattern=$1 name flag
  shift
  for name in "$@"; do
    flag=FLAG_$name
    [[ -z ${!flag} || ${!flag} =~ ^($pattern)$ ]] ||
      die "--$name=${!flag} must match $pattern"
  done
}

# export_variables FILE: exports what its NAME=value lines say. A value is what stands after the
# first =, to the end of the line, less the one pair of quotes that may enclose it; nothing in it is
# evaluated. Passed over: blank lines, lines that begin with #, a carriage return that ends a line, a
# byte order mark. Wrong lines are told all at once, by number, and never printed.
export_variables() {
  local LC_ALL=C line name value number=0 wrong=""  # C: any byte is a character
  [ -r "$1" ] || die "$1 cannot be read"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1)) line=${line%$'\r'}
    [ "$number" -gt 1 ] || line=${line#$'\xef\xbb\xbf'}
    [[ $line =~ ^[[:blank:]]*(#.*)?$ ]] && continue
    if ! [[ $line =~ ^[[:blank:]]*([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]]; then
      wrong+="; line $number is not NAME=value"
      continue
    fi
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]] && value=${BASH_REMATCH[1]}
    # An integer or readonly variable of bash, such as UID, is no place for a value.
    if [[ $(declare -p "$name" 2>/dev/null) =~ ^declare\ -[^\ ]*[aAinr] ]]; then
      wrong+="; line $number: bash has a variable $name of its own, take another name"
      continue
    fi
    declare -gx "$name=$value"
  done <"$1"
  [ -z "$wrong" ] || die "$1: ${wrong#; }"
}

# The token of one start, as a file of variables: its processes know each other by it.
new_token() { printf 'TULU_JAX_TOKEN=%s\n' "$(od -An -vtx1 -N32 /dev/urandom | tr -d ' \n')"; }

require_train_args() {
  case "$ACTION" in run | resume | watch) ;; *) return 0 ;; esac
  [ ${#TRAIN_ARGS[@]} -gt 0 ] || die "give the arguments of tulu_jax.train after --"
}

# again WHY COMMAND...: starts the run once more, if --restarts allows, and says why.
TRIED_AGAIN=0
again() {
  local why=$1
  shift
  if [ "$TRIED_AGAIN" -ge "$RESTARTS" ]; then
    echo "$why. It was restarted $TRIED_AGAIN times, as --restarts=$RESTARTS allows: giving up; see its output with follow." >&2
    exit 1
  fi
  TRIED_AGAIN=$((TRIED_AGAIN + 1))
  echo "$why: restart $TRIED_AGAIN of $RESTARTS"
  "$@" || true
}

hopeless() {
  echo "The run cannot work as it is configured (exit status 2): a restart would end the same way; see its output with follow." >&2
}

# answer COMMAND...: what it prints; ABSENT if it says that there is no such thing, UNKNOWN if it
# fails otherwise, when the network is down, say.
answer() {
  local found problem
  problem=$(mktemp)
  if found=$("$@" 2>"$problem"); then echo "$found"
  elif grep -qi 'not_\?found' "$problem"; then echo ABSENT
  else echo UNKNOWN; fi
  rm -f "$problem"
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
