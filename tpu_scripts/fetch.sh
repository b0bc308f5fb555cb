#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copies a run's folder from a worker, or from the bucket, to this machine. See README.md beside this file.
set -euo pipefail
# shellcheck source=tpu_scripts/shared.bash
source "${BASH_SOURCE[0]%/*}/shared.bash"

usage() {
  cat <<'END'
usage: fetch.sh [--dry-run] [--worker N] [--slice N] TPU_NAME ZONE PROJECT FROM TO
       fetch.sh [--dry-run] --bucket NAME FROM TO

  --dry-run      prints the gcloud command and runs nothing
  --worker N     whose disk (0: the one that writes)
  --slice N      of which slice of several, from 0
  --bucket NAME  from gs://NAME, which needs no TPU any more
  FROM, TO       folder there, and folder here, which is made
END
}

worker=0 slice="" bucket=""
options=([--worker]="text worker" [--slice]="text slice" [--bucket]="text bucket")
read_options "$@"
set -- "${words[@]}"
[[ $worker =~ ^[0-9]+$ ]] || wrong "--worker takes a number, got $worker"
[[ $slice =~ ^[0-9]*$ ]] || wrong "--slice takes a number, got $slice"
if [[ -n $bucket ]]; then
  (($# == 2)) || wrong "needs FROM and TO; got $# of them"
  source=$1 target=$2
else
  place "$@"
  (($# == 5)) || wrong "needs TPU_NAME, ZONE, PROJECT, FROM and TO; got $# of them"
  source=$4 target=$5
fi
[[ -n $source && -n $target ]] || fail "FROM and TO must not be empty"
need_gcloud
do_or_show mkdir -p "$target"
if [[ -n $bucket ]]; then
  do_or_show gcloud storage rsync --recursive "gs://$bucket/$source" "$target"
else
  do_or_show gcloud compute tpus tpu-vm scp --recurse "$tpu${slice:+-$slice}:$source" "$target" "${where[@]}" "--worker=$worker"
fi
