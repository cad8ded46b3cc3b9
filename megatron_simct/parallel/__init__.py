"""From a torchrun or Slurm environment to process groups; padded micro-batches; what CPU runs need."""
