#!/usr/bin/env bash
# A fault of one node of the test bed in DIR:   slurm/testbed/fault.sh DIR NODE crash|hang|back
#   crash  slurmd, the step daemons and every task of the node are killed, as by a loss of power
#   hang   all of them are stopped: nobody answers, no connection closes
#   back   the node is started again
set -uo pipefail
dir=$(realpath -m "$1") node=$2 what=$3
source "$dir/env.sh"
step_daemons() {
  local pid
  for pid in $(pgrep slurmstepd); do
    ls -l "/proc/$pid/fd" 2>/dev/null | grep -qF "$dir/log/$node.log" && echo "$pid"
  done
}
descendants() {
  local pid children
  for pid in "$@"; do
    echo "$pid"
    children=$(pgrep -P "$pid") && descendants $children
  done
}
daemon=$(awk -v name="$node" '$1 == name {pid = $2} END {print pid}' "$dir/pids")
case $what in
  crash | hang)
    steps=$(step_daemons)
    kill -STOP $daemon $steps 2>/dev/null # so that nobody reports the others' end
    all="$daemon $(descendants $steps)"
    if [ "$what" = hang ]; then
      kill -STOP $all 2>/dev/null
      echo $all > "$dir/$node.hung"
    else
      kill -KILL $all 2>/dev/null
    fi ;;
  back)
    if [ -e "$dir/$node.hung" ]; then # as after a reset
      kill -KILL $(cat "$dir/$node.hung") 2>/dev/null
      rm -f "$dir/$node.hung"
    fi
    rm -rf "$dir/spool/$node/${node}_"* "$dir/spool/$node/job"* # as sites do at boot, or a job cannot come back here
    setsid slurmd -D -N "$node" >> "$dir/log/$node.out" 2>&1 < /dev/null &
    sed -i "s/^$node .*/$node $!/" "$dir/pids"
    sleep 1
    scontrol update nodename="$node" state=resume 2>/dev/null ;;
  *) echo "A fault is crash, hang or back, not '$what'." >&2; exit 2 ;;
esac
exit 0
