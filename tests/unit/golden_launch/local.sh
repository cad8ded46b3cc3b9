umask 077
mkdir -p -- /runs/first
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_DEBUG=WARN
CUDA_VISIBLE_DEVICES=8,9,10,11,12,13,14,15 /opt/env/bin/python -m torch.distributed.run --nnodes=1 --nproc-per-node=8 --max-restarts=0 --signals-to-handle=SIGINT,SIGHUP,SIGQUIT --rdzv-backend=c10d --rdzv-endpoint=localhost:0 -m megatron_simct.serve_teacher --teacher-hf-checkpoint=/models/teacher --tensor-model-parallel-size=8 --pipeline-model-parallel-size=2 --run-dir=/runs/first/teacher --rollout-max-prompt-len=512 --bf16 &
CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 /opt/env/bin/python -m torch.distributed.run --nnodes=1 --nproc-per-node=8 --max-restarts=0 --signals-to-handle=SIGINT,SIGHUP,SIGQUIT --rdzv-backend=c10d --rdzv-endpoint=localhost:0 -m megatron_simct.train --hf-checkpoint=/models/student --stop-token-ids 1 106 --teacher-hf-checkpoint=/models/teacher --teacher-endpoint /runs/first/teacher --prompt-data=/data/prompts.jsonl --no-rollout-shuffle --rollout-max-prompt-len=512 --train-iters=300 --bf16 --lr=1e-6 --save=/runs/first/checkpoint --save-interval=20 --load=/runs/first/checkpoint --exit-signal-handler --run-dir=/runs/first/student
