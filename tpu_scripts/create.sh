#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Asks for a TPU slice, or several, as a queued resource, and waits until it is there. See README.md beside this file.
set -euo pipefail
# shellcheck source=tpu_scripts/shared.bash
source "${BASH_SOURCE[0]%/*}/shared.bash"

usage() {
  cat <<'END'
usage: create.sh [--dry-run] --type TYPE --version VERSION [OPTION ...] TPU_NAME ZONE PROJECT

  --dry-run           prints the gcloud commands and runs nothing
  --type TYPE         accelerator type, such as v5litepod-8, v6e-8, v5p-64
  --version VERSION   TPU software, such as v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, v2-alpha-tpuv5
  --slices N          that many slices of the type (multislice), named TPU_NAME-0, TPU_NAME-1, ... (1)
  --spot              capacity that may be taken back at any time
  --reserved          capacity of the project's reservation
  --reservation NAME  capacity of this reservation
  --network NAME      VPC network; --subnetwork NAME likewise
  --deadline SECONDS  give up waiting after this long, and leave the request as it is (7200)
  --poll SECONDS      between two looks at it (20)
  --no-wait           ask only

exit status: 0 once it is ACTIVE, 3 where it failed or was suspended, 4 at the deadline, 2 for a wrong call
END
}

type="" version="" capacity=() network=() deadline=7200 poll=20 waits=true
options=(
  [--type]="text type" [--version]="text version" [--slices]="number slices"
  [--spot]="word capacity" [--reserved]="word capacity" [--reservation]="pair capacity"
  [--network]="pair network" [--subnetwork]="pair network"
  [--deadline]="number deadline" [--poll]="number poll" [--no-wait]="false waits"
)
read_options "$@"
set -- "${words[@]}"
place "$@"
(($# == 3)) || wrong "$4 stands behind TPU_NAME ZONE PROJECT; options come first"
[[ -n $type ]] || wrong "--type is missing"
[[ -n $version ]] || wrong "--version is missing"
((${#capacity[@]} < 2)) || wrong "give one of --spot, --reserved and --reservation; got ${capacity[*]}"
need_gcloud

if ((slices == 1)); then
  which=("--node-id=$tpu")
else
  which=("--node-count=$slices" "--node-prefix=$tpu")
fi
do_or_show gcloud compute tpus queued-resources create "$tpu" "${where[@]}" "${which[@]}" \
  "--accelerator-type=$type" "--runtime-version=$version" "${capacity[@]}" "${network[@]}"
$waits || exit 0
if $dry_run; then
  do_or_show gcloud compute tpus queued-resources describe "$tpu" "${where[@]}" '--format=value(state.state)'
  exit 0
fi

last=""
while true; do
  now=$(state)
  [[ $now == "$last" ]] || echo "$tpu: ${now:-unknown}" >&2
  last=$now
  case $now in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDING | SUSPENDED)
      echo "create.sh: $tpu is $now; see gcloud compute tpus queued-resources describe $tpu $(quoted "${where[@]}")" >&2
      exit 3
      ;;
  esac
  if ((SECONDS >= deadline)); then
    echo "create.sh: $tpu is ${now:-unknown} after $deadline s; the request stands (delete.sh takes it back)" >&2
    exit 4
  fi
  sleep "$poll"
done
