#!/usr/bin/env bash
# Cancels every job of the test bed in DIR and ends the daemons that start.sh started, no others.
set -uo pipefail
dir=$(realpath -m "$1")
[ -e "$dir/pids" ] || exit 0
source "$dir/env.sh"
for hung in "$dir"/*.hung; do [ -e "$hung" ] && kill -KILL $(cat "$hung") 2>/dev/null; done
timeout 10 scancel --user="$(id -un)" 2>/dev/null
for ((k = 0; k < 40; k++)); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.5; done
running() { # PID: whether it is still one of our daemons
  case "$(cat "/proc/$1/comm" 2>/dev/null)" in slurmd* | slurmctld* | munged) return 0 ;; *) return 1 ;; esac
}
while read -r _ pid; do running "$pid" && kill "$pid"; done < <(tac "$dir/pids")
for ((k = 0; k < 50; k++)); do
  left=0
  while read -r _ pid; do running "$pid" && left=1; done < "$dir/pids"
  ((left)) || break
  sleep 0.2
done
rm -f "$dir/pids"
# What a killed rank left behind: without cgroups Slurm loses sight of it.
for environment in /proc/[0-9]*/environ; do
  pid=${environment#/proc/} pid=${pid%/environ}
  [ "$pid" != $$ ] && grep -qzxF "SLURM_CONF=$dir/slurm.conf" "$environment" 2>/dev/null \
    && grep -qzE "^SLURM_PROCID=" "$environment" && kill -KILL "$pid" 2>/dev/null
done
exit 0
