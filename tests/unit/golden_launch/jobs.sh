#!/usr/bin/env bash
# Written by megatron_simct.launch. By hand: sbatch /runs/first/job.sh
# Component 0 is the student; its first node runs this script.
# Component 1: vllm, of kind engine.
# Component 2: front, of kind teacher.
# Component 3: small, of kind teacher.
# Component 4: sampler, of kind engine.
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
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gpus-per-node=8
#SBATCH --constraint=h100
#SBATCH hetjob
#SBATCH --partition=gpu
#SBATCH --account=team
#SBATCH --time=04:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --constraint=h100
#SBATCH hetjob
#SBATCH --partition=gpu
#SBATCH --account=team
#SBATCH --time=04:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gpus-per-node=8
#SBATCH --constraint=h100
#SBATCH hetjob
#SBATCH --partition=gpu
#SBATCH --account=team
#SBATCH --time=04:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
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
    /runs/first/front
    --second-teacher-hf-checkpoint=/models/small
    --second-teacher-endpoint
    /runs/first/small
    --simct-interface=bytes
    --prompt-data=/data/prompts.jsonl
    --no-rollout-shuffle
    --rollout-max-prompt-len=512
    --rollout-engine=vllm
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
)
prefix_student=(
    env
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
)
# vllm, an engine: its command; how each task is started; what stands before the command there.
job_vllm=(
    /opt/vllm/bin/python
    -m
    vllm.entrypoints.openai.api_server
    --model
    /models/teacher
    --port
    8100
)
task_vllm=(
    --ntasks-per-node=1
    --cpu-bind=none
    --kill-on-bad-exit=1
    --open-mode=append
)
prefix_vllm=(
    env
    VLLM_LOGGING_LEVEL=WARNING
)
# front: torchrun's options and its own; how each task is started; what stands before them.
job_front=(
    /opt/env/bin/python
    --nnodes=1
    --nproc-per-node=1
    --max-restarts=0
    --signals-to-handle=SIGINT,SIGHUP,SIGQUIT
    --rdzv-backend=c10d
    -m
    megatron_simct.serve_teacher
    --teacher-hf-checkpoint=/models/teacher
    --run-dir=/runs/first/front
    --rollout-max-prompt-len=512
)
task_front=(
    --ntasks-per-node=1
    --cpu-bind=none
    --kill-on-bad-exit=1
    --open-mode=append
)
prefix_front=(
)
# small: torchrun's options and its own; how each task is started; what stands before them.
job_small=(
    /opt/env/bin/python
    --nnodes=2
    --nproc-per-node=8
    --max-restarts=0
    --signals-to-handle=SIGINT,SIGHUP,SIGQUIT
    --rdzv-backend=c10d
    -m
    megatron_simct.serve_teacher
    --teacher-hf-checkpoint=/models/small
    --tensor-model-parallel-size=8
    --pipeline-model-parallel-size=2
    --run-dir=/runs/first/small
    --rollout-max-prompt-len=512
    --bf16
)
task_small=(
    --ntasks-per-node=1
    --cpu-bind=none
    --kill-on-bad-exit=1
    --open-mode=append
)
prefix_small=(
)
# sampler, an engine: its command; how each task is started; what stands before the command there.
job_sampler=(
    /opt/vllm/bin/python
    -m
    x
    --port=81
)
task_sampler=(
    --ntasks-per-node=1
    --cpu-bind=none
    --kill-on-bad-exit=1
    --open-mode=append
)
prefix_sampler=(
)

# A task: torchrun, whose rendezvous lies on the first node. SIGTERM is for the processes that it starts, which save and
# exit; it waits for them.
run='trap "" TERM
exec "$1" -m torch.distributed.run --rdzv-conf=is_host="$((SLURM_NODEID == 0))" "${@:2}"'
# The same for a teacher, which each node offers at its address towards the student.
serve='trap "" TERM
address=$("$2" -m megatron_simct.launch.address "$1")
exec "$2" -m torch.distributed.run --rdzv-conf=is_host="$((SLURM_NODEID == 0))" "${@:3}" --bind="tcp://$address"'
# An engine, started as often as the first argument says.
engine='for ((start = 0; start < $1; start++)); do
    ! "${@:2}" || exit 0
done
exit 1'

# The address at which Slurm itself reaches the first of these nodes.
first_address() {
    local first address
    read -r first < <(scontrol show hostnames "$1")
    read -r address < <(sinfo --noheader --nodes="$first" --format=%o)
    printf '%s' "$address"
}

# The addresses of an engine on all of these nodes, with its port.
engine_addresses() {
    local node address
    while read -r node; do
        address=$(first_address "$node")
        printf 'http://%s:%s\n' "$address" "$2"
    done < <(scontrol show hostnames "$1")
}

mapfile -t engines < <(engine_addresses "$SLURM_JOB_NODELIST_HET_GROUP_4" 81)
job_student+=(--rollout-engine-endpoint "${engines[@]}")
mapfile -t engines < <(engine_addresses "$SLURM_JOB_NODELIST_HET_GROUP_1" 8100)
job_front+=(--engine-endpoint "${engines[@]}")
student_host=$(first_address "$SLURM_JOB_NODELIST_HET_GROUP_0")
srun --het-group=1 --job-name=vllm --nodes=2 "${task_vllm[@]}" --output="$run_dir/logs/vllm-%n.log" \
    "${prefix_vllm[@]}" bash -c "$engine" bash 4 "${job_vllm[@]}" &
vllm_pid=$!

front_host=$(first_address "$SLURM_JOB_NODELIST_HET_GROUP_2")
srun --het-group=2 --job-name=front --nodes=1 "${task_front[@]}" --output="$run_dir/logs/front-%n.log" \
    "${prefix_front[@]}" bash -c "$serve" bash "$student_host" \
    "${job_front[@]:0:1}" --rdzv-endpoint="$front_host:$((20000 + SLURM_JOB_ID % 10000))" "${job_front[@]:1}" &
front_pid=$!

small_host=$(first_address "$SLURM_JOB_NODELIST_HET_GROUP_3")
srun --het-group=3 --job-name=small --nodes=2 "${task_small[@]}" --output="$run_dir/logs/small-%n.log" \
    "${prefix_small[@]}" bash -c "$serve" bash "$student_host" \
    "${job_small[@]:0:1}" --rdzv-endpoint="$small_host:$((20000 + SLURM_JOB_ID % 10000))" "${job_small[@]:1}" &
small_pid=$!

srun --het-group=4 --job-name=sampler --nodes=1 "${task_sampler[@]}" --output="$run_dir/logs/sampler-%n.log" \
    "${prefix_sampler[@]}" bash -c "$engine" bash 1 "${job_sampler[@]}" &
sampler_pid=$!

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
ask_to_stop front "$SLURM_JOB_ID_HET_GROUP_2"
for ((second = 0; second < 30; second++)); do
    kill -0 "$front_pid" 2> /dev/null || break
    sleep 1
done
kill "$front_pid" 2> /dev/null || true

# The teacher finishes what it holds.
ask_to_stop small "$SLURM_JOB_ID_HET_GROUP_3"
for ((second = 0; second < 30; second++)); do
    kill -0 "$small_pid" 2> /dev/null || break
    sleep 1
done
kill "$small_pid" 2> /dev/null || true

# The engine is needed no more.
ask_to_stop vllm "$SLURM_JOB_ID_HET_GROUP_1"
for ((second = 0; second < 30; second++)); do
    kill -0 "$vllm_pid" 2> /dev/null || break
    sleep 1
done
kill "$vllm_pid" 2> /dev/null || true

# The engine is needed no more.
ask_to_stop sampler "$SLURM_JOB_ID_HET_GROUP_4"
for ((second = 0; second < 30; second++)); do
    kill -0 "$sampler_pid" 2> /dev/null || break
    sleep 1
done
kill "$sampler_pid" 2> /dev/null || true

# Queued again, it resumes from its checkpoint.
iteration=0
tracker=/runs/first/checkpoint/latest_checkpointed_iteration.txt
[ ! -e "$tracker" ] || read -r iteration < "$tracker" || true
if [ "$code" = 0 ] && [ "$iteration" -lt 300 ]; then
    echo "iteration $iteration of 300: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
