#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Follows the log of a job, or shows what there is of it. See README.md beside this file.
set -euo pipefail
# shellcheck source=tpu_scripts/shared.bash
source "${BASH_SOURCE[0]%/*}/shared.bash"

usage() {
  cat <<'END'
usage: logs.sh [--dry-run] [--worker N | --worker all] [--slice N] [--no-follow] TPU_NAME ZONE PROJECT

  --dry-run    prints the gcloud command and runs nothing
  --worker N   whose log (0: the one that prints the losses)
  --slice N    of which slice of several, from 0
  --no-follow  the last 200 lines only
END
}

worker=0 follows=true slice=""
options=([--worker]="text worker" [--slice]="text slice" [--no-follow]="false follows")
read_options "$@"
set -- "${words[@]}"
place "$@"
(($# == 3)) || wrong "$4 stands behind TPU_NAME ZONE PROJECT; options come first"
[[ $worker =~ ^([0-9]+|all)$ ]] || wrong "--worker takes a number or all, got $worker"
[[ $slice =~ ^[0-9]*$ ]] || wrong "--slice takes a number, got $slice"
need_gcloud
node=$tpu${slice:+-$slice}
if $follows; then
  on "$node" "$worker" "tail -n 200 -F $job/log"
else
  on "$node" "$worker" "tail -n 200 $job/log"
fi
