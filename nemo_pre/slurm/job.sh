# A training job that survives: the body of every batch script, behind the lines that say what is run and how.
# Expects RUN_DIR, WORDS (of nemo-pre train), PYTHON, SRUN (options of srun), HEALTH (options of nemo_pre.slurm.health;
# empty for no check), ALL_REDUCE_SECONDS (0 for no check), and WARNING_SECONDS, MAX_FAILURES, FT_RESTARTS as in
# ClusterConfig.
#
# Two shells: `main` works and ignores signals; the one at the end of the file hears them and only waits. A bash (5.2)
# that is signalled while it parses $(...) loses the trap, or the command, to "unexpected EOF while looking for matching".
set -uo pipefail
trap '' USR1 TERM
restart=${SLURM_RESTART_COUNT:-0}
job=$RUN_DIR/slurm/$SLURM_JOB_ID # what is kept over restarts
attempt=$job.$restart            # what belongs to this one
mkdir -p "$RUN_DIR/slurm"
rm -f "$attempt".{stop,leaves,ended,verdict,health,log}
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT # of the shell that submitted

hearing() ( # COMMAND...: a program that hears the signals we ignore
  trap - USR1 TERM
  exec "$@"
)

say() { printf '%s %s: %s\n' "$(date +%FT%T)" "job $SLURM_JOB_ID.$restart" "$*"; }

newest_checkpoint() { ls -td "$RUN_DIR"/checkpoints/step=* 2>/dev/null | grep -E 'step=[0-9]+(-v[0-9]+)?$' | head -1; }

ask_controller() { # COMMAND...: again and again, since a controller that restarts must not cost a job
  for _ in $(seq 60); do
    "$@" && return
    sleep 10
  done
  return 1
}

is_running() { # not so when somebody has cancelled the job, or Slurm takes it back
  [ "$(ask_controller squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]
}

requeue() { # WHY: does not return; Slurm ends the script
  say "$1: back into the queue"
  touch "$attempt.leaves"
  ask_controller scontrol requeue "$SLURM_JOB_ID" && sleep 300
  say "the job could not be requeued"
  exit 1
}

count_failure() { # WHY: ends the job when it has failed too often in a row without a new checkpoint
  local checkpoint
  checkpoint=$(newest_checkpoint)
  [ "$(head -1 "$job.failures" 2>/dev/null)" = "checkpoint $checkpoint" ] || echo "checkpoint $checkpoint" > "$job.failures"
  echo "$restart $1" >> "$job.failures"
  local failures=$(($(wc -l < "$job.failures") - 1))
  if ((failures >= MAX_FAILURES)); then
    say "$1, failure $failures in a row without a new checkpoint: giving up (cluster.max_failures=$MAX_FAILURES)"
    exit 1
  fi
}

exclude_and_requeue() { # NODE...: the list can only be changed while the job waits, and we end when it does
  local excluded
  say "excluding $*"
  printf '%s\n' "$@" >> "$job.excluded"
  excluded=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -oP ' ExcNodeList=\K\S+' | grep -v '(null)')
  trap '' CONT
  ask_controller scontrol requeuehold "$SLURM_JOB_ID" || exit 1
  for _ in $(seq 20); do
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(IFS=,; echo "${excluded:+$excluded,}$*")" && break
    sleep 0.2
  done
  scontrol release "$SLURM_JOB_ID"
  sleep 300
  exit 1
}

exclude_all_but() { # WORDS: goes on only if every node is said to be so in the health check's output
  local bad=()
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    grep -q "^$node $1" "$attempt.health" || bad+=("$node")
  done
  ((${#bad[@]})) || return
  is_running || exit 1
  tail -n 20 "$attempt.health"
  count_failure "bad nodes: ${bad[*]}"
  if ((${#bad[@]} == SLURM_JOB_NUM_NODES && ${#bad[@]} > 1)); then
    say "no node passes the health check: correct the check's limits in the cluster's file, or the nodes"
    exit 1
  fi
  exclude_and_requeue "${bad[@]}"
}

# --- what is run ------------------------------------------------------------------------------------------------------

meet() { # the first node's address as Slurm knows it; the port follows from the job's number
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
  MASTER_ADDR=$(scontrol show node "$head" --oneliner | grep -oP ' NodeAddr=\K\S+')
  export MASTER_ADDR=${MASTER_ADDR:-$head}
  export NEMO_PRE_STOP_FILE=$attempt.stop NEMO_PRE_VERDICT_FILE=$attempt.verdict
  say "on $SLURM_JOB_NODELIST, output in $attempt.log"
}

check_nodes() { # goes on only if they are well
  case "${SRUN[*]}" in *--container-image=*) # imported before anybody is judged: it may take longer than a check may
    hearing timeout 1800 srun "${SRUN[@]}" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 true \
      || say "the container did not start on every node" ;;
  esac

  if ((${#HEALTH[@]})); then
    hearing timeout 300 srun "${SRUN[@]}" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
      "$PYTHON" -m nemo_pre.slurm.health "${HEALTH[@]}" > "$attempt.health" 2>&1
    if grep '^no room' "$attempt.health"; then
      say "a restart would find no room either: free some, or lower cluster.min_free_gb"
      exit 2
    fi
    exclude_all_but "is well"
  fi

  if ((ALL_REDUCE_SECONDS && SLURM_NTASKS > 1)); then
    hearing timeout $((ALL_REDUCE_SECONDS * 3)) srun "${SRUN[@]}" --kill-on-bad-exit=0 \
      "$PYTHON" -m nemo_pre.slurm.all_reduce "$ALL_REDUCE_SECONDS" >> "$attempt.health" 2>&1
    exclude_all_but "adds up"
    if ! grep -q "^all add up" "$attempt.health"; then
      is_running || exit 1
      tail -n 20 "$attempt.health"
      count_failure "the nodes do not reach each other"
      requeue "the nodes do not reach each other"
    fi
  fi
}

run_ranks() { # sets code and verdict
  hearing srun "${SRUN[@]}" "${START[@]}" --kill-on-bad-exit=1 --wait=300 "${PROGRAM[@]}" -m nemo_pre.slurm.rank \
    "${WORDS[@]}" >> "$attempt.log" 2>&1 &
  local step=$! deadline=0
  while kill -0 "$step" 2>/dev/null; do
    if is_asked_to_stop && ((!deadline)); then
      deadline=$((asked + (WARNING_SECONDS > 30 ? WARNING_SECONDS - 15 : WARNING_SECONDS / 2)))
      say "asked to stop: the ranks write a checkpoint after this step"
    fi
    if ((deadline && SECONDS > deadline)); then
      requeue "the ranks did not stop in time; the last checkpoint counts"
    fi
    sleep 1
  done
  wait "$step"
  code=$?
  verdict=$(cat "$attempt.verdict" 2>/dev/null)
  say "the ranks ended with code $code${verdict:+, verdict $verdict}"
  tail -n 5 "$attempt.log"
}

is_asked_to_stop() { # sets asked, the second
  [ -e "$attempt.stop" ] && { read -r asked < "$attempt.stop" || asked=$SECONDS; }
}

train() {
  START=(--label)
  PROGRAM=("$PYTHON")
  if ((FT_RESTARTS)); then # one task a node, which starts the ranks there, and again when one dies
    unset SRUN_CPUS_PER_TASK
    START=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none)
    PROGRAM+=(-m nvidia_resiliency_ext.fault_tolerance.launcher --max-restarts="$FT_RESTARTS" --workers-stop-timeout=5
      --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES)) --rdzv-backend=c10d
      --rdzv-endpoint="$MASTER_ADDR:$((20000 + (SLURM_JOB_ID * 7 + restart * 101) % 10000))"
      --rdzv-id="$SLURM_JOB_ID.$restart" --ft-log-level=WARNING)
  fi

  run_ranks
  while [ "$verdict" = roll-back ] && ! is_asked_to_stop; do
    say "again, from the last checkpoint"
    rm -f "$attempt.verdict"
    run_ranks
  done

  ((code == 0)) && [ -z "$verdict" ] && exit 0
  if [ "$verdict" = do-not-restart ]; then
    say "a restart would end the same way"
    exit 2
  fi
  is_running || exit "$code"
  if [ "$verdict" = requeue ] || [ "$verdict" = roll-back ]; then
    requeue "stopped at a checkpoint"
  fi
  count_failure "exit code $code"
  requeue "exit code $code"
}

main() {
  meet
  check_nodes
  train
}

# --- the shell that hears signals -------------------------------------------------------------------------------------

ask_to_stop() { # at the time limit or a preemption; a second signal changes nothing
  [ -e "$attempt.stop" ] || echo "$SECONDS" > "$attempt.stop"
}

end_or_ask() { # at a preemption too, or when Slurm ends what goes back into the queue; a warning ends nobody on its way
  [ -e "$attempt.leaves" ] && exit 0
  ask_to_stop
}

wait_for() { # PROCESS: ends as it ended. What wait returns may be a signal's number, also of one that came before.
  while kill -0 "$1" 2>/dev/null; do
    wait "$1"
  done
  read -r code < "$attempt.ended" || code=1 # it was killed
  exit "$code"
}

{
  (main)
  echo "$?" > "$attempt.ended"
} &
trap ask_to_stop USR1
trap end_or_ask TERM
wait_for $!
