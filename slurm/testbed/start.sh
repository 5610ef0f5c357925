#!/usr/bin/env bash
# A real Slurm on this machine, for tests: munge, slurmctld and N slurmd on the loopback interface, without systemd,
# cgroups or a database. Every slurmd is a node of its own (node1, node2, ...).
#   slurm/testbed/start.sh DIR [NODES]     then: source DIR/env.sh; sinfo
# Needs: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
set -euo pipefail
dir=$(realpath -m "$1") nodes=${2:-3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin
for tool in slurmctld slurmd munged sinfo; do
  command -v "$tool" >/dev/null || { echo "There is no $tool: see the first lines of $0." >&2; exit 3; }
done
[ ! -e "$dir/pids" ] || { echo "$dir has a Slurm already: run stop.sh $dir first." >&2; exit 4; }
mkdir -p "$dir"/{state,spool,log,munge}
chmod 755 "$dir"; chmod 711 "$dir/munge"

# Ports that no other test bed on this machine uses: a block for every directory. Jobs derive theirs from their numbers.
block=$(($(cksum <<<"$dir" | cut -d' ' -f1) % 400))
base=$((10000 + block * 20)) first_job=$((1 + block * 100))
host=$(hostname -s)
lines=
for ((i = 1; i <= nodes; i++)); do
  mkdir -p "$dir/spool/node$i"
  lines+="NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + i)) CPUs=8 RealMemory=8000 State=UNKNOWN"$'\n'
done
sed -e "s|@DIR@|$dir|g; s|@HOST@|$host|g; s|@USER@|$(id -un)|g; s|@PORT@|$base|g; s|@JOB@|$first_job|g" "$here/slurm.conf.in" > "$dir/slurm.conf"
printf '%s' "$lines" >> "$dir/slurm.conf"
cat >> "$dir/slurm.conf" <<PARTITIONS
PartitionName=batch Nodes=ALL Default=YES DefaultTime=30 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL DefaultTime=30 PriorityTier=10 PreemptMode=OFF
PARTITIONS
printf 'export SLURM_CONF=%q\nexport PATH=$PATH:/usr/sbin:/sbin\n' "$dir/slurm.conf" > "$dir/env.sh"
export SLURM_CONF=$dir/slurm.conf

: > "$dir/pids"
daemon() { # NAME COMMAND...: in a session of its own, its process remembered
  local name=$1; shift
  setsid "$@" >> "$dir/log/$name.out" 2>&1 < /dev/null &
  echo "$name $!" >> "$dir/pids"
}
(umask 077; head -c 1024 /dev/urandom > "$dir/munge/key")
daemon munged munged --foreground --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
  --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" --num-threads=4
for ((k = 0; k < 50; k++)); do [ -S "$dir/munge/socket" ] && break; sleep 0.1; done
[ -S "$dir/munge/socket" ] || { cat "$dir/log/munged.out" >&2; exit 5; } # every folder above must be open to all
daemon slurmctld slurmctld -D -c
for ((i = 1; i <= nodes; i++)); do daemon "node$i" slurmd -D -N "node$i"; done
for ((k = 0; k < 150; k++)); do
  idle=$(timeout 5 sinfo -h -N -p batch -t idle -o %N 2>/dev/null | wc -l) || idle=0
  ((idle == nodes)) && exit 0
  sleep 0.2
done
echo "Only $idle of $nodes nodes came up: see $dir/log." >&2
exit 6
