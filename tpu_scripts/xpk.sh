#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a job on a GKE cluster of TPUs or GPUs through Google's xpk. A template: see README.md beside this file.
set -euo pipefail
# shellcheck source=tpu_scripts/shared.bash
source "${BASH_SOURCE[0]%/*}/shared.bash"

usage() {
  cat <<'END'
usage: xpk.sh [--dry-run] --cluster NAME --device TYPE --image IMAGE [OPTION ...] WORKLOAD ZONE PROJECT [COMMAND]

  --dry-run        prints the xpk command and runs nothing
  --cluster NAME   made by `xpk cluster create`
  --device TYPE    such as v5litepod-16, v6e-256, h100-80gb-8
  --image IMAGE    container with jpeft and JAX for the device
  --slices N       slices, or nodes of GPUs (1)
  --restarts N     how often the cluster begins the job again, which then goes on from its checkpoint (20)
  COMMAND          one line of shell; by default `jpeft train config.yaml --resume --distributed auto --mesh fsdp=-1`
END
}

cluster="" device="" image="" restarts=20
options=(
  [--cluster]="text cluster" [--device]="text device" [--image]="text image"
  [--slices]="number slices" [--restarts]="number restarts"
)
read_options "$@"
set -- "${words[@]}"
place "$@"
(($# <= 4)) || wrong "COMMAND is one line of shell; got $(($# - 3)) words"
[[ -n $cluster ]] || wrong "--cluster is missing"
[[ -n $device ]] || wrong "--device is missing"
[[ -n $image ]] || wrong "--image is missing"
command_line=${4:-jpeft train config.yaml --resume --distributed auto --mesh fsdp=-1}
$dry_run || command -v xpk >/dev/null || fail "xpk is not on PATH: pip install xpk, or use --dry-run"

count=--num-nodes
if [[ $device =~ ^v[0-9] ]]; then count=--num-slices; fi
do_or_show xpk workload create "--workload=$tpu" "--cluster=$cluster" "${where[@]}" "--device-type=$device" \
  "$count=$slices" "--max-restarts=$restarts" "--docker-image=$image" "--command=$command_line"
