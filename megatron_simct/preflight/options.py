"""Options of each job that are checked without the models."""

from __future__ import annotations

from functools import partial

from megatron_simct.config.options import TeacherConfig
from megatron_simct.losses import check_comparisons
from megatron_simct.parallel.initialize import check_layout
from megatron_simct.preflight.findings import failed, passed
from megatron_simct.preflight.state import State
from megatron_simct.reporting.writers import check_writers
from megatron_simct.teacher.build import check_dense
from megatron_simct.update.checkpoint import has_checkpoint


def check_options(state: State) -> None:
    """Check the options alone."""
    config, student = state.config, state.run.student

    def check() -> int:
        check_layout(config.parallel, student.world_size)
        parallel = config.parallel
        data_parallel_size = student.world_size // parallel.model_parallel_size
        config.check(data_parallel_size=data_parallel_size)
        check_comparisons(config)
        if config.routes_rows:
            check_dense(config)
        if state.run.cluster.container is None:
            check_writers(config.output)
        return data_parallel_size

    size = state.attempt("student", "options", check)
    if size is not None:
        state.sound.add("student")
        batches = config.global_batch_size // (config.training.micro_batch_size * size)
        cut = f"in {batches} micro-batches"
        if config.training.max_tokens_per_gpu is not None:
            cut = f"in micro-batches of at most {config.training.max_tokens_per_gpu:,} tokens"
        said = f"data-parallel size {size}, {config.global_batch_size} sequences a step {cut}"
        state.findings.append(passed("student", "options", said))
    output = config.output
    if output.load is not None and output.load != output.save and not has_checkpoint(output.load):
        message = f"--load {output.load}: no checkpoint there, and it is not the directory of --save"
        state.findings.append(failed("student", "resuming", message))
    for name, (job, teacher) in state.jobs.items():
        if state.attempt(name, "options", partial(_check_teacher_job, teacher, job.world_size)):
            state.sound.add(name)


def _check_teacher_job(config: TeacherConfig, world_size: int) -> bool:
    check_layout(config.parallel, world_size)
    config.check()
    return True
