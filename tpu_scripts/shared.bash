# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What the scripts have in common; each sources it. Strict mode, errors, quoting, and commands that a dry run only shows.
set -euo pipefail

dry_run=false
slices=1

fail() {
  echo "${0##*/}: $1" >&2
  exit 2
}

# wrong MESSAGE: an error of the call, with the usage.
wrong() {
  usage >&2
  fail "$1"
}

# The words of "$@" as one line of POSIX shell; plain words stay bare.
quoted() {
  local word line="" plain='^[A-Za-z0-9_./:=@%+,-]+$' quote="'" escaped="'\\''"
  for word in "$@"; do
    [[ $word =~ $plain ]] || word="'${word//$quote/$escaped}'"
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command; a dry run prints it, quoted so that it can be pasted into a shell, and runs nothing.
do_or_show() {
  if $dry_run; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# read_options "$@": sets what the script's table `options` says of each, and leaves the words behind them in `words`.
#
#   declare -A options=([--type]="text type" [--spot]="word capacity")
#
# KIND VARIABLE: `true` and `false` set the variable to that; `text` to the value, which must not look like an option;
# `any` to whatever stands behind it; `number` to a whole number of 1 to 9 digits, above 0; `word` adds the option itself to an array,
# `pair` adds OPTION=VALUE, and `each` the value. --dry-run and --help are every script's.
declare -A options=()
words=()
read_options() {
  local kind variable
  options[--dry-run]="true dry_run"
  while (($#)); do
    case $1 in
      -h | --help) usage; exit 0 ;;
      -*) ;;
      *) break ;;
    esac
    [[ -n ${options[$1]-} ]] || wrong "unknown option $1"
    read -r kind variable <<<"${options[$1]}"
    local -n added=$variable
    case $kind in
      true | false) printf -v "$variable" %s "$kind"; shift; continue ;;
      word) added+=("$1"); shift; continue ;;
      any) (($# > 1)) || wrong "$1 needs a value" ;;
      *) (($# > 1)) && [[ -n $2 && $2 != --* ]] || wrong "$1 needs a value" ;;
    esac
    case $kind in
      any | text) printf -v "$variable" %s "$2" ;;
      number)
        [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || wrong "$1 takes a whole number of at least 1 and at most 999999999, got $2"
        printf -v "$variable" %s "$2"
        ;;
      pair) added+=("$1=$2") ;;
      each) added+=("$2") ;;
    esac
    shift 2
  done
  # shellcheck disable=SC2034 # the scripts that source this use them
  words=("$@")
}

# place NAME ZONE PROJECT ...: sets tpu, zone, project and where.
place() {
  (($# >= 3)) || wrong "needs TPU_NAME, ZONE and PROJECT; got $# of them"
  tpu=$1 zone=$2 project=$3
  local value
  for value in "$tpu" "$zone" "$project"; do
    [[ -n $value ]] || fail "TPU_NAME, ZONE and PROJECT must not be empty"
    [[ $value != -* ]] || fail "$value stands where a TPU name, a zone or a project belongs"
  done
  where=("--zone=$zone" "--project=$project")
}

need_gcloud() {
  $dry_run || command -v gcloud >/dev/null || fail "gcloud is not on PATH: install the Google Cloud CLI, or use --dry-run"
}

# The TPU VMs of a name: itself, or with several slices those that Google makes of it.
nodes() {
  local slice
  if ((slices == 1)); then
    printf '%s\n' "$tpu"
  else
    for ((slice = 0; slice < slices; slice++)); do printf '%s\n' "$tpu-$slice"; done
  fi
}

# on NODE WORKER LINE: one line of shell on a worker, or on `all` of a TPU VM.
on() {
  do_or_show gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" "--worker=$2" "--command=$3"
}

# The state of the queued resource, as Google writes it (ACTIVE, SUSPENDED, ...); nothing where there is none.
state() {
  gcloud compute tpus queued-resources describe "$tpu" "${where[@]}" '--format=value(state.state)' 2>/dev/null || true
}

# Where a worker keeps a job: its log, its process and, once it has ended, its exit status.
# shellcheck disable=SC2016,SC2034 # the workers' shell expands it; the scripts that source this use it
job='$HOME/jpeft-job'
