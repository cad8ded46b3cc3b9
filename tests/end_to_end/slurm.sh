#!/usr/bin/env bash
# A real Slurm on this machine, two nodes of one core each, for as long as the test lasts: what megatron_simct.launch
# queues, how it is pre-empted, resumed and cancelled. Needs root and Debian's packages slurm-wlm and munge.
#   ./tests/end_to_end/slurm.sh
set -euo pipefail
# shellcheck source=tests/end_to_end/own_namespaces.sh
source "$(dirname "$0")/own_namespaces.sh"
cd "$(dirname "$0")/../.."
need_packages slurm-wlm munge
source tools/environment.sh
ensure_packages requirements-test.txt
ensure_packages examples/quickstart/requirements.txt --no-deps

chmod 711 "$folder"
mkdir "$folder/state" "$folder/munge"
head -c 1024 /dev/urandom > "$folder/munge/key"
chmod 400 "$folder/munge/key"
chown -R munge "$folder/munge"
for name in key:key-file socket:socket pid:pid-file log:log-file seed:seed-file; do
    munge_options="${munge_options:-} --${name#*:}=$folder/munge/${name%:*}"
done
su munge -s /bin/sh -c "$(command -v munged) $munge_options"

export SLURM_CONF=$folder/slurm.conf
host=$(hostname)
cat > "$SLURM_CONF" << END
ClusterName=simct
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
AuthInfo=socket=$folder/munge/socket,cred_expire=5
SlurmUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
SlurmctldParameters=preempt_send_user_signal
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16821 CPUs=1 RealMemory=2000
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16822 CPUs=1 RealMemory=2000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END
slurmctld -c
slurmd -N node1
slurmd -N node2

OMP_NUM_THREADS=1 "$PYTHON" -m tests.end_to_end.slurm "$folder"
