#!/usr/bin/env bash
# A real Slurm on this machine for the tests: one controller and a few nodes that are daemons here. Needs root and the
# packages slurmctld, slurmd, munge and slurm-client. No accounting, no cgroups, no systemd.
#
#   local_slurm.sh start DIR NODES GPUS     start; GPUS a node are null devices
#   local_slurm.sh kill-node DIR NAME       as if its power failed: the daemon, its steps and their tasks get SIGKILL
#   local_slurm.sh start-node DIR NAME
#   local_slurm.sh stop DIR
set -euo pipefail
command=$1 dir=$2
export SLURM_CONF=$dir/slurm.conf
host=$(hostname -s)

running() { [ -s "$1" ] && [ -e "/proc/$(cat "$1")" ] && ! grep -q '^State:.Z' "/proc/$(cat "$1")/status"; }

until_true() { for _ in $(seq 600); do "$@" > /dev/null 2>&1 && return; sleep 0.1; done; echo "never: $*" >&2; return 1; }

free_ports() { # as many as asked for, from the kernel
  python3 - "$1" <<'P'
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in held))
P
}

write_conf() {
  local nodes=$1 gpus=$2 gres="" ports i
  read -ra ports <<< "$(free_ports $((nodes + 1)))"
  mkdir -p "$dir"/{state,log,run,spool,munge}
  chmod 755 "$dir" "$dir/run" "$dir/log"
  chmod 700 "$dir/munge"
  [ "$gpus" = 0 ] || gres=" Gres=gpu:$gpus"
  {
    cat <<C
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
FirstJobId=$((1 + RANDOM % 9000)) # a job's port follows from its number: others' jobs on this machine have others
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/run/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=10
JobRequeue=1
C
    [ "$gpus" = 0 ] || echo "GresTypes=gpu"
    for i in $(seq "$nodes"); do
      echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$i]} CPUs=8 RealMemory=8000$gres"
    done
    echo "PartitionName=all Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE State=UP"
  } > "$SLURM_CONF"
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nIgnoreSystemd=yes\n' > "$dir/cgroup.conf"
  [ "$gpus" = 0 ] && return
  for i in $(seq 0 $((gpus - 1))); do mknod "$dir/run/gpu$i" c 1 3; done
  echo "Name=gpu File=$dir/run/gpu[0-$((gpus - 1))]" > "$dir/gres.conf"
}

name_nodes() { # job scripts resolve the names of nodes; another Slurm here has lines of its own
  local i
  for i in $(seq "$1"); do echo "127.0.0.1 node$i # local_slurm $dir" >> /etc/hosts; done
}

start_munge() {
  (umask 077; head -c 128 /dev/urandom > "$dir/munge/key")
  munged --key-file="$dir/munge/key" --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" --force 2>> "$dir/log/munged.err"
  until_true munge --socket="$dir/run/munge.socket" --no-input
}

start_node() {
  mkdir -p "$dir/spool/$1"
  slurmd -N "$1" -f "$SLURM_CONF"
}

all_up() { [ "$(sinfo --noheader --Node --states=idle --format=%N | sort -u | wc -l)" = "$1" ]; }

kill_node() {
  local file pid parent tasks=() steps=()
  kill -9 "$(cat "$dir/run/slurmd.$1.pid")"
  rm -f "$dir/run/slurmd.$1.pid"
  for file in $(grep -lzx "SLURMD_NODENAME=$1" /proc/[0-9]*/environ 2> /dev/null || true); do
    grep -qzx "SLURM_CONF=$SLURM_CONF" "$file" 2> /dev/null || continue
    pid=${file//[^0-9]/}
    parent=$(awk '/^PPid/{print $2}' "/proc/$pid/status" 2> /dev/null) || continue
    tasks+=("$pid")
    [ "$(cat "/proc/$parent/comm" 2> /dev/null)" != slurmstepd ] || steps+=("$parent")
  done
  # First those who could still tell the controller how their tasks ended: a node without power tells nothing.
  kill -9 "${steps[@]}" "${tasks[@]}" 2> /dev/null || true
}

stop() {
  local file
  scancel --user=root --signal=KILL --full 2> /dev/null || true
  scancel --user=root 2> /dev/null || true
  for _ in $(seq 300); do [ -n "$(squeue --noheader 2> /dev/null)" ] || break; sleep 0.1; done
  for file in "$dir"/run/slurmd.*.pid "$dir/run/slurmctld.pid" "$dir/run/munged.pid"; do
    running "$file" || continue
    kill "$(cat "$file")"
    for _ in $(seq 50); do running "$file" || break; sleep 0.1; done
    ! running "$file" || kill -9 "$(cat "$file")"
  done
  local kept
  kept=$(grep -vF "# local_slurm $dir" /etc/hosts) && printf '%s\n' "$kept" > /etc/hosts  # it may be a mount: no rename
}

case $command in
  start)
    write_conf "$3" "$4"
    name_nodes "$3"
    start_munge
    slurmctld -f "$SLURM_CONF"
    for i in $(seq "$3"); do start_node "node$i"; done
    until_true all_up "$3"
    ;;
  kill-node) kill_node "$3" ;;
  start-node) start_node "$3" ;;
  stop) stop ;;
esac
