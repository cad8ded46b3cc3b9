"""From a torchrun or Slurm environment to process groups; a shared disk; what CPU runs need."""
