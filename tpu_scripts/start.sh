#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts one job on all workers, which goes on when the connection ends. See README.md beside this file.
set -euo pipefail
# shellcheck source=tpu_scripts/shared.bash
source "${BASH_SOURCE[0]%/*}/shared.bash"

usage() {
  cat <<'END'
usage: start.sh [--dry-run] [--slices N] TPU_NAME ZONE PROJECT COMMAND [ARGUMENT ...]

  --dry-run   prints the gcloud commands and runs nothing
  --slices N  one job over as many slices, told by MEGASCALE_* which it is (1)
  COMMAND     as of run_on_all_workers.sh; ~/jpeft-venv/bin is first on its PATH

It runs in the workers' home. Every worker writes ~/jpeft-job/log, and once the command has ended ~/jpeft-job/status. A job that runs is an error.

example:
  start.sh my-pod us-central2-b my-project jpeft train config.yaml --resume --distributed auto --mesh fsdp=-1
END
}

options=([--slices]="number slices")
read_options "$@"
set -- "${words[@]}"
place "$@"
(($# >= 4)) || wrong "needs TPU_NAME, ZONE, PROJECT and COMMAND; got $# of them"
shift 3
[[ -n $1 ]] || fail "COMMAND must not be empty"
need_gcloud
if (($# == 1)); then
  line=$1
else
  line=$(quoted "$@")
fi

# Slices find each other at the first worker of the first.
megascale=()
if ((slices > 1)); then
  first=(gcloud compute tpus tpu-vm describe "$tpu-0" "${where[@]}" '--format=value(networkEndpoints[0].ipAddress)')
  if $dry_run; then
    do_or_show "${first[@]}"
    address=ADDRESS
  else
    address=$("${first[@]}")
    [[ -n $address ]] || fail "the first worker of $tpu-0 has no address"
  fi
  megascale=("MEGASCALE_COORDINATOR_ADDRESS=$address:8080" "MEGASCALE_NUM_SLICES=$slices")
fi

running="[ -e $job/pid ] && [ ! -e $job/status ] && kill -0 \"\$(cat $job/pid)\" 2>/dev/null"
slice=0
for node in $(nodes); do
  own=("${megascale[@]}")
  if ((slices > 1)); then own+=("MEGASCALE_SLICE_ID=$slice"); fi
  told=${own[*]:+export ${own[*]}; }
  body="echo \$\$ > $job/pid; export PATH=\"\$HOME/jpeft-venv/bin:\$PATH\"; $told($line); echo \$? > $job/status"
  begin="{ setsid nohup bash -c $(quoted "$body") > $job/log 2>&1 < /dev/null & }"
  on "$node" all "if $running; then echo a job runs already >&2; exit 1; fi; cd && mkdir -p $job && rm -f $job/status && $begin"
  slice=$((slice + 1))
done
