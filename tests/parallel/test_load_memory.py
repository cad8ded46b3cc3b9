"""Memory of a load, in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.huggingface import save_model

pytest.importorskip("transformers")

FOLDER_FIELDS = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 12000}

_PROGRAM = """
import sys
from megatron_simct.config.options import ParallelConfig
from megatron_simct.models.build import build_model
from megatron_simct.models.families import read_architecture
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.parallel.initialize import process_groups

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

architecture = read_architecture(sys.argv[1], flag="")
with process_groups(ParallelConfig(), seed=1) as groups:
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
    model = build_model(
        architecture, ParallelConfig(), groups, vocab_size=90, divisible_by=128, bf16=True, flag="",
        initialize=False,
    )
    load_hf_weights(model, architecture, sys.argv[1], groups, flag="")
    print((memory("VmHWM") - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_a_load_needs_little_more_than_the_parameters(tmp_path) -> None:
    save_model(tmp_path, "llama", **FOLDER_FIELDS).to(torch.bfloat16).save_pretrained(str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert 0.95 < float(run.stdout.split()[-1]) < 1.2
