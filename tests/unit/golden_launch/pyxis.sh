#!/usr/bin/env bash
# Written by megatron_simct.launch. By hand: sbatch /runs/first/job.sh
# Component 0 is the student; its first node runs this script.
# Component 1: teacher, of kind teacher.
# shellcheck disable=SC2016,SC2054,SC2317  # values are quoted one by one, expanded on the node; a trap is reachable
#SBATCH --job-name=simct
#SBATCH --output=/runs/first/logs/job.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --partition=gpu
#SBATCH --account=team
#SBATCH --time=04:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gpus-per-node=8
#SBATCH --constraint=h100
#SBATCH hetjob
#SBATCH --partition=gpu
#SBATCH --account=team
#SBATCH --time=04:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --constraint=h100

set -euo pipefail
umask 077
cd /code
run_dir=/runs/first
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_DEBUG=WARN

# student: torchrun's options and its own; how each task is started; what stands before them.
job_student=(
    /opt/env/bin/python
    --nnodes=1
    --nproc-per-node=8
    --max-restarts=2
    --signals-to-handle=SIGINT,SIGHUP,SIGQUIT
    --rdzv-backend=c10d
    -m
    megatron_simct.train
    --hf-checkpoint=/models/student
    --stop-token-ids
    1
    106
    --teacher-hf-checkpoint=/models/teacher
    --teacher-endpoint
    /runs/first/teacher
    --prompt-data=/data/prompts.jsonl
    --no-rollout-shuffle
    --rollout-max-prompt-len=512
    --train-iters=300
    --bf16
    --lr=1e-6
    --save=/runs/first/checkpoint
    --save-interval=20
    --load=/runs/first/checkpoint
    --exit-signal-handler
    --exit-duration-in-mins=230.0
    --run-dir=/runs/first/student
)
task_student=(
    --ntasks-per-node=1
    --cpu-bind=none
    --kill-on-bad-exit=1
    --open-mode=append
    --container-image=/images/simct.sqsh
    --container-mounts=/models:/models:ro,/runs:/runs
    --container-env=CUDA_DEVICE_MAX_CONNECTIONS,NCCL_DEBUG
)
prefix_student=(
    env
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
)
# teacher: torchrun's options and its own; how each task is started; what stands before them.
job_teacher=(
    /opt/env/bin/python
    --nnodes=2
    --nproc-per-node=8
    --max-restarts=0
    --signals-to-handle=SIGINT,SIGHUP,SIGQUIT
    --rdzv-backend=c10d
    -m
    megatron_simct.serve_teacher
    --teacher-hf-checkpoint=/models/teacher
    --tensor-model-parallel-size=8
    --pipeline-model-parallel-size=2
    --run-dir=/runs/first/teacher
    --rollout-max-prompt-len=512
    --bf16
)
task_teacher=(
    --ntasks-per-node=1
    --cpu-bind=none
    --kill-on-bad-exit=1
    --open-mode=append
    --container-image=/images/simct.sqsh
    --container-mounts=/models:/models:ro,/runs:/runs
    --container-env=CUDA_DEVICE_MAX_CONNECTIONS,NCCL_DEBUG
)
prefix_teacher=(
)

# A task: torchrun, whose rendezvous lies on the first node. SIGTERM is for the processes that it starts, which save and
# exit; it waits for them.
run='trap "" TERM
exec "$1" -m torch.distributed.run --rdzv-conf=is_host="$((SLURM_NODEID == 0))" "${@:2}"'
# The same for a teacher, which each node offers at its address towards the student.
serve='trap "" TERM
address=$("$2" -m megatron_simct.launch.address "$1")
exec "$2" -m torch.distributed.run --rdzv-conf=is_host="$((SLURM_NODEID == 0))" "${@:3}" --bind="tcp://$address"'

# The address at which Slurm itself reaches the first of these nodes.
first_address() {
    local first address
    read -r first < <(scontrol show hostnames "$1")
    read -r address < <(sinfo --noheader --nodes="$first" --format=%o)
    printf '%s' "$address"
}

student_host=$(first_address "$SLURM_JOB_NODELIST_HET_GROUP_0")
teacher_host=$(first_address "$SLURM_JOB_NODELIST_HET_GROUP_1")
srun --het-group=1 --job-name=teacher --nodes=2 "${task_teacher[@]}" --output="$run_dir/logs/teacher-%n.log" \
    "${prefix_teacher[@]}" bash -c "$serve" bash "$student_host" \
    "${job_teacher[@]:0:1}" --rdzv-endpoint="$teacher_host:$((20000 + SLURM_JOB_ID % 10000))" "${job_teacher[@]:1}" &
teacher_pid=$!

srun --het-group=0 --job-name=student --nodes=1 "${task_student[@]}" --output="$run_dir/logs/student-%n.log" \
    "${prefix_student[@]}" bash -c "$run" bash \
    "${job_student[@]:0:1}" --rdzv-endpoint="$student_host:$((10000 + SLURM_JOB_ID % 10000))" "${job_student[@]:1}" &
student_pid=$!

# SIGTERM to the processes of this job's step of that name, whose number is another one each time that a job is queued.
ask_to_stop() {
    local id name
    while read -r id name; do
        [ "$name" != "$1" ] || scancel --signal=TERM "$id"
    done < <(squeue --noheader --steps --format='%i %j' --jobs="$2")
}

# The nodes are wanted back, or the time is nearly over: the student finishes its step, saves and exits with code 0.
stopping=no
on_signal() {
    stopping=yes
    ask_to_stop student "$SLURM_JOB_ID"
}
trap on_signal USR1 TERM

while kill -0 "$student_pid" 2> /dev/null; do
    sleep 2 &
    wait "$!" || true  # a signal ends it
done
code=0
wait "$student_pid" || code=$?
echo "the student ended with exit code $code; told to stop: $stopping"

# The teacher finishes what it holds.
ask_to_stop teacher "$SLURM_JOB_ID_HET_GROUP_1"
for ((second = 0; second < 30; second++)); do
    kill -0 "$teacher_pid" 2> /dev/null || break
    sleep 1
done
kill "$teacher_pid" 2> /dev/null || true

# Queued again, it resumes from its checkpoint.
iteration=0
tracker=/runs/first/checkpoint/latest_checkpointed_iteration.txt
[ ! -e "$tracker" ] || read -r iteration < "$tracker" || true
if [ "$code" = 0 ] && [ "$iteration" -lt 300 ]; then
    echo "iteration $iteration of 300: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
