"""From a torchrun or Slurm environment to process groups; padded micro-batches; a shared disk; what CPU runs need."""
