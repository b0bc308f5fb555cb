#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs one command on every worker of a TPU VM (slice), at once. See README.md beside this file.
set -euo pipefail

usage() {
  cat <<'END'
usage: run_on_all_workers.sh [--dry-run] TPU_NAME ZONE PROJECT COMMAND [ARGUMENT ...]

  --dry-run  prints the gcloud command, quoted so that it can be pasted into a shell, and runs nothing
  COMMAND    either ONE argument, a line of shell that the workers run as it stands (pipes, &&, $HOME expand there),
             or a program and its arguments, which reach it unchanged, spaces and quotes included

examples:
  run_on_all_workers.sh my-pod us-central2-b my-project 'cd jpeft && git pull && make test'
  run_on_all_workers.sh --dry-run my-pod us-central2-b my-project jpeft train 'my config.yaml' --seed 1
END
}

fail() {
  echo "run_on_all_workers.sh: $1" >&2
  exit 2
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

dry_run=false
case "${1:-}" in
  --dry-run) dry_run=true; shift ;;
  -h | --help) usage; exit 0 ;;
  -*) usage >&2; fail "unknown option $1" ;;
esac

if (($# < 4)); then
  usage >&2
  fail "needs TPU_NAME, ZONE, PROJECT and COMMAND; got $# of them"
fi
tpu=$1 zone=$2 project=$3
shift 3
for value in "$tpu" "$zone" "$project" "$1"; do
  [[ -n $value ]] || fail "TPU_NAME, ZONE, PROJECT and COMMAND must not be empty"
done
for value in "$tpu" "$zone" "$project"; do
  [[ $value != -* ]] || fail "$value stands where a TPU name, a zone or a project belongs"
done

# The workers' shell reads one line: a single argument is that line, several are quoted into it.
if (($# == 1)); then
  command_line=$1
else
  command_line=$(quoted "$@")
fi

gcloud_command=(
  gcloud compute tpus tpu-vm ssh "$tpu"
  "--zone=$zone"
  "--project=$project"
  --worker=all
  "--command=$command_line"
)

if $dry_run; then
  quoted "${gcloud_command[@]}"
  echo
  exit 0
fi
command -v gcloud >/dev/null || fail "gcloud is not on PATH: install the Google Cloud CLI, or use --dry-run"
exec "${gcloud_command[@]}"
