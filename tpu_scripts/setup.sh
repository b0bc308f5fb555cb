#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs jpeft on all workers, mounts the bucket that outlives them, and looks at the devices. See README.md.
set -euo pipefail
# shellcheck source=tpu_scripts/shared.bash
source "${BASH_SOURCE[0]%/*}/shared.bash"

usage() {
  cat <<'END'
usage: setup.sh [--dry-run] [--slices N] [--wheel FILE | --package SPEC] [--bucket NAME] [--copy FILE ...] TPU_NAME ZONE PROJECT

  --dry-run       prints the gcloud commands and runs nothing
  --slices N      of as many slices (1)
  --wheel FILE    installs this wheel (`make wheel`), copied to every worker
  --package SPEC  installs this (jpeft[train])
  --bucket NAME   mounts gs://NAME at ~/bucket by gcsfuse: runs belong there, since a TPU's disk goes with the TPU
  --copy FILE     copies it to every worker's home, such as a configuration; may stand several times

jpeft is installed into ~/jpeft-venv, with JAX for TPUs.
END
}

wheel="" package="jpeft[train]" bucket="" copies=()
options=(
  [--slices]="number slices" [--wheel]="text wheel" [--package]="text package" [--bucket]="text bucket"
  [--copy]="each copies"
)
read_options "$@"
set -- "${words[@]}"
place "$@"
(($# == 3)) || wrong "$4 stands behind TPU_NAME ZONE PROJECT; options come first"
for file in ${wheel:+"$wheel"} "${copies[@]}"; do
  [[ -e $file ]] || fail "there is no file $file"
done
need_gcloud

if [[ -n $wheel ]]; then
  copies+=("$wheel")
  package="./${wheel##*/}[train]"
fi
install="cd ~ && python3 -m venv jpeft-venv && jpeft-venv/bin/pip install -q $(quoted "$package") 'jax[tpu]'"
for node in $(nodes); do
  for file in "${copies[@]}"; do
    do_or_show gcloud compute tpus tpu-vm scp --recurse "$file" "$node:" "${where[@]}" --worker=all
  done
  on "$node" all "$install"
  if [[ -n $bucket ]]; then
    on "$node" all "mkdir -p ~/bucket && { mountpoint -q ~/bucket || gcsfuse --implicit-dirs $(quoted "$bucket") ~/bucket; }"
  fi
  on "$node" all "cd ~ && jpeft-venv/bin/python -c 'import jpeft, jax; print(jpeft.__version__, jax.__version__)'"
done
