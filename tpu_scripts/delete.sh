#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Gives the TPU back: the queued resource, its slices and their disks. See README.md beside this file.
set -euo pipefail
# shellcheck source=tpu_scripts/shared.bash
source "${BASH_SOURCE[0]%/*}/shared.bash"

usage() {
  cat <<'END'
usage: delete.sh [--dry-run] TPU_NAME ZONE PROJECT

  --dry-run  prints the gcloud command and runs nothing

What stands on the workers' disks is lost; what is in a bucket stays.
END
}

read_options "$@"
set -- "${words[@]}"
place "$@"
(($# == 3)) || wrong "$4 stands behind TPU_NAME ZONE PROJECT; options come first"
need_gcloud
do_or_show gcloud compute tpus queued-resources delete "$tpu" "${where[@]}" --force --quiet
