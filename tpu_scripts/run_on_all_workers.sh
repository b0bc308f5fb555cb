#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs one command on every worker of a TPU VM (slice), or of several slices, at once. See README.md beside this file.
set -euo pipefail
# shellcheck source=tpu_scripts/shared.bash
source "${BASH_SOURCE[0]%/*}/shared.bash"

usage() {
  cat <<'END'
usage: run_on_all_workers.sh [--dry-run] [--slices N] TPU_NAME ZONE PROJECT COMMAND [ARGUMENT ...]

  --dry-run   prints the gcloud commands, quoted so that they can be pasted into a shell, and runs nothing
  --slices N  the TPU VMs TPU_NAME-0 to TPU_NAME-(N-1), all at once (1: TPU_NAME itself)
  COMMAND     either ONE argument, a line of shell that the workers run as it stands (pipes, &&, $HOME expand there),
              or a program and its arguments, which reach it unchanged, spaces and quotes included

examples:
  run_on_all_workers.sh my-pod us-central2-b my-project 'cd jpeft && git pull && make test'
  run_on_all_workers.sh --dry-run my-pod us-central2-b my-project jpeft train 'my config.yaml' --seed 1
END
}

options=([--slices]="number slices")
read_options "$@"
set -- "${words[@]}"

(($# >= 4)) || wrong "needs TPU_NAME, ZONE, PROJECT and COMMAND; got $# of them"
for value in "${@:1:4}"; do
  [[ -n $value ]] || fail "TPU_NAME, ZONE, PROJECT and COMMAND must not be empty"
done
place "$@"
shift 3
need_gcloud

# The workers' shell reads one line: a single argument is that line, several are quoted into it.
if (($# == 1)); then
  line=$1
else
  line=$(quoted "$@")
fi

started=()
for node in $(nodes); do
  if $dry_run || ((slices == 1)); then
    on "$node" all "$line"
  else
    on "$node" all "$line" &
    started+=($!)
  fi
done
status=0
for process in "${started[@]}"; do wait "$process" || status=$?; done
exit "$status"
