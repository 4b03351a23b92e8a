# What every slurm/*.sbatch does: check, start, pass signals on, requeue. Sourced in the batch script, on the first node.
#
# ASYPPO_CONFIG is the configuration; arguments of run_job are key=value overrides. Exit codes of `asyppo train`:
# 0 done; 75 stopped as asked, after a checkpoint; 78 given up; others: failed, and counted in run_dir/attempts.json.
set -uo pipefail
source slurm/env.sh

container=()
[ -z "$ASYPPO_CONTAINER" ] || container=(--container-image="$ASYPPO_CONTAINER" --container-mounts="$ASYPPO_MOUNTS"
  --container-workdir="$PWD" --no-container-mount-home)

say() { echo "$(date '+%F %T') [job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0}] $*"; }

run_job() {
  local facts pid="" code hosts agents_pid="" gpus=${SLURM_GPUS_ON_NODE:-}
  stopping=""
  trap 'say "asked to stop"; stopping=1; [ -z "$pid" ] || kill -USR1 "$pid"' USR1 TERM
  facts=$(srun --nodes=1 --ntasks=1 --overlap "${container[@]}" "$ASYPPO_PYTHON" -m asyppo_megatron check --shell \
    "$ASYPPO_CONFIG" "$@" --nodes "$SLURM_NNODES" ${gpus:+--gpus-per-node "$gpus"}) || { say "refused"; exit 1; }
  eval "$facts"  # ranks, ranks_per_node, train_nodes, engine, agent_nodes, run_dir
  readarray -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${hosts[0]} TRAIN_NODES=$train_nodes
  say "$ASYPPO_CONFIG: $ranks ranks on $SLURM_JOB_NODELIST, $ranks_per_node a node, engine $engine, store at $MASTER_ADDR"
  if [ -n "$agent_nodes" ]; then
    start_agents "$@"
    set -- "$@" "rollout.sglang.agents=[$run_dir/agents]"
  fi

  [ -z "$stopping" ] || finish 75  # the signal came before there was anything to stop
  # One launcher a node. The job lives on for a minute after the first of them ends, which the others need to say why.
  # shellcheck disable=SC2016 # the task's own variables
  on "${hosts[@]:0:train_nodes}" -- bash -c 'exec "$ASYPPO_PYTHON" -m asyppo_megatron train "$@" --nodes "$TRAIN_NODES" \
    --node "$SLURM_NODEID" --rendezvous "$MASTER_ADDR:$ASYPPO_PORT" --job "$SLURM_JOB_ID"' train "$ASYPPO_CONFIG" "$@" &
  pid=$!
  while wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null; do :; done  # a trapped signal interrupts wait
  trap '' USR1 TERM  # what is left to do takes seconds
  [ -z "$agents_pid" ] || { kill -TERM "$agents_pid" 2>/dev/null && wait "$agents_pid"; }
  finish "$code"
}

# on NODE... -- COMMAND...: one task a node, a step of its own.
on() {
  local nodes=()
  while [ "$1" != -- ]; do nodes+=("$1"); shift; done
  shift
  exec srun --nodelist="$(IFS=,; echo "${nodes[*]}")" --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 \
    --overlap --kill-on-bad-exit=0 --wait=60 "${container[@]}" "$@"
}

# Node agents, which supervise the SGLang engines of their nodes: beside the actor, or on the nodes that ranks leave over.
start_agents() {
  local index nodes=() waited=0
  for index in $agent_nodes; do nodes+=("${hosts[index]}"); done
  rm -rf "$run_dir/agents"  # of an earlier start
  # Each listens on its node's own address: the driver, on the first node, has to reach it.
  # shellcheck disable=SC2016 # the task's own variables
  on "${nodes[@]}" -- bash -c 'exec "$ASYPPO_PYTHON" -m asyppo_megatron serve "$@" \
    "rollout.sglang.host=$SLURMD_NODENAME"' serve "$ASYPPO_CONFIG" "$@" &
  agents_pid=$!
  until [ "$(find "$run_dir/agents" -name '*.json' 2> /dev/null | wc -l)" -eq "${#nodes[@]}" ]; do
    sleep 1
    waited=$((waited + 1))
    kill -0 "$agents_pid" 2> /dev/null && [ "$waited" -lt 600 ] || { say "node agents did not start"; finish 1; }
  done
}

# Ends the job, or puts it back into the queue; its next start goes on from the last checkpoint.
finish() {
  local code=$1 state
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
  if [ "$code" -eq 0 ] || [ "$code" -eq 78 ] || [ "$state" != RUNNING ]; then
    say "ends with exit code $code ($state)"
    exit "$code"
  fi
  # A launcher that never got to count its start would fail again without end, unless a signal ended it.
  case $code in 75 | 138 | 143) stopping=1 ;; esac
  if [ -z "$stopping" ] && ! grep -qs "\"job\": \"$SLURM_JOB_ID\"" "$run_dir/attempts.json"; then
    say "failed before the run began, exit code $code: not started again"
    exit "$code"
  fi
  say "exit code $code: back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
}
