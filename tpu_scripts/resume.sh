#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sees a job through: starts it, and where the TPU is taken away makes another and goes on. See README.md.
set -euo pipefail
# shellcheck source=tpu_scripts/shared.bash
source "${BASH_SOURCE[0]%/*}/shared.bash"
here=${BASH_SOURCE[0]%/*}

usage() {
  cat <<'END'
usage: resume.sh [--dry-run] [OPTION ...] TPU_NAME ZONE PROJECT COMMAND [ARGUMENT ...]

  --dry-run           prints the gcloud commands of one round (create, set up, start, look, delete) and runs nothing
  --create OPTIONS    for create.sh, in one word: '--type v5litepod-8 --version v2-alpha-tpuv5-lite --spot'
  --setup OPTIONS     for setup.sh, in one word: '--bucket my-bucket --copy config.yaml'
  --slices N          of as many slices (1)
  --attempts N        TPUs to be used up at most (20)
  --deadline SECONDS  give up after this long, and leave everything as it is (604800)
  --poll SECONDS      between two looks (60)
  COMMAND             one that goes on from its own checkpoints, as `jpeft train CONFIG --resume` does, which lie in the
                      bucket: a TPU's disk goes with the TPU

A command that ends with 75 was interrupted and can go on, and one that ends with 69 lost another worker, as
`jpeft train` says it: where no worker ends otherwise, it is started again.
A TPU that is there is used, and a job that runs on it is left running.

exit status: 0 when the command ended with 0 on all workers, 1 when it failed on one, 3 when the attempts are used up,
4 at the deadline, 2 for a wrong call
END
}

create="" setup="" attempts=20 deadline=604800 poll=60
options=(
  [--create]="any create" [--setup]="any setup" [--slices]="number slices"
  [--attempts]="number attempts" [--deadline]="number deadline" [--poll]="number poll"
)
read_options "$@"
set -- "${words[@]}"
place "$@"
(($# >= 4)) || wrong "needs TPU_NAME, ZONE, PROJECT and COMMAND; got $# of them"
shift 3
command=("$@")
[[ -n $create ]] || wrong "--create is missing: without it a TPU that is taken away cannot be made again"
read -ra create_options <<<"$create"
read -ra setup_options <<<"$setup"
shared=(--slices "$slices")
if $dry_run; then shared+=(--dry-run); fi
need_gcloud

say() {
  echo "resume.sh: $1" >&2
}

make_it() {
  "$here/create.sh" "${shared[@]}" --poll "$poll" "${create_options[@]}" "$tpu" "$zone" "$project" &&
    "$here/setup.sh" "${shared[@]}" "${setup_options[@]}" "$tpu" "$zone" "$project" &&
    start_it
}

start_it() {
  "$here/start.sh" "${shared[@]}" "$tpu" "$zone" "$project" "${command[@]}"
}

# What every worker says of its job: `running`, `none`, or an exit status.
look() {
  local node
  for node in $(nodes); do
    on "$node" all "cat $job/status 2>/dev/null || { [ -e $job/pid ] && kill -0 \"\$(cat $job/pid)\" && echo running; } 2>/dev/null || echo none"
  done
}

delete_it() {
  local how=()
  if $dry_run; then how=(--dry-run); fi
  "$here/delete.sh" "${how[@]}" "$tpu" "$zone" "$project"
}

if $dry_run; then
  make_it
  look
  delete_it
  exit 0
fi

used=0
while ((SECONDS < deadline)); do
  now=$(state)
  case $now in
    "")
      ((used < attempts)) || { say "$used TPUs are used up"; exit 3; }
      used=$((used + 1))
      say "TPU $used of at most $attempts"
      make_it || say "that did not work; looking again"
      ;;
    ACTIVE)
      # A TPU may go while it is asked: what it then says is no answer.
      if found=$(look 2>/dev/null); then
        if grep -qx running <<<"$found"; then
          if grep -Ex '[1-9][0-9]*' <<<"$found" | grep -Evqx '69|75'; then say "a worker failed: ${found//$'\n'/ }"; exit 1; fi
        elif grep -Eqx 'none|69|75' <<<"$found" && ! grep -Evqx '0|none|69|75' <<<"$found"; then
          start_it || say "could not start; looking again"
        elif grep -qvx 0 <<<"$found"; then
          say "the command failed, worker by worker: ${found//$'\n'/ }"
          exit 1
        else
          say "done"
          exit 0
        fi
      fi
      ;;
    SUSPENDING | SUSPENDED | FAILED | PREEMPTED)
      say "$tpu is $now: it is deleted, and another made"
      delete_it || say "could not delete; looking again"
      continue
      ;;
    *) say "$tpu is $now" ;;
  esac
  sleep "$poll"
done
say "not done after $deadline s"
exit 4
