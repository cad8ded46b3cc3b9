"""One thread a process, set before any parallel region runs: the multi-process tests fork from this process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tests.distributed  # noqa: E402,F401  (imports torch and megatron-core once, patched for CPU)
