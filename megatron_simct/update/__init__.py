"""One optimizer step on one rollout batch, through Megatron's schedule, optimizer and checkpoints."""
