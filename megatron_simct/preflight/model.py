"""One model of a run: architecture, layout, attention, tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_simct.config.options import ModelConfig, ParallelConfig
from megatron_simct.loading import describe_teacher, open_chat_template, open_tokenizer
from megatron_simct.models.build import check_divides
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.head import Head
from megatron_simct.models.kernels import check_backend, describe, uses_math
from megatron_simct.preflight import pair
from megatron_simct.preflight.findings import failed, passed, warned
from megatron_simct.preflight.state import State
from megatron_simct.preflight.weights import check_weights
from megatron_simct.update.support import check_support


def check_model(state: State, name: str, model: ModelConfig) -> pair.Side | None:
    """Check one model: architecture, layout, weights, tokenizer and chat template. None if it
    cannot be compared.
    """
    flag = state.flags[name]
    folder = model.hf_checkpoint
    if folder is None:
        return None  # the check of options reports it
    read = describe_teacher if state.has_engine(name) else read_architecture
    architecture = state.attempt(
        name, "family", lambda: read(folder, flag=f"--{flag}hf-checkpoint"), _describe
    )
    if isinstance(architecture, Architecture):
        for parallel, where in _layouts(state, name):
            _check_layout(state, name, architecture, parallel, where, flag)
            _check_attention(state, name, architecture, parallel, f"--{flag}hf-checkpoint {folder}")
            if name == "student":
                _check_update(state, architecture, parallel, f"--hf-checkpoint {folder}")
    check_weights(state, name, folder, model, flag, architecture)
    tokenizer = state.attempt(
        name, "tokenizer", lambda: open_tokenizer(model, prefix=flag), lambda found: found.name
    )
    for note in tokenizer.notes if tokenizer is not None else ():
        state.findings.append(warned(name, "tokenizer", note, flag=f"--{flag}tokenizer-model"))
    if tokenizer is None or architecture is None:
        return None
    if state.config.data.apply_chat_template:
        try:
            chat = open_chat_template(state.config, model, tokenizer, prefix=flag)
        except ValueError as error:
            state.findings.append(failed(name, "chat template", str(error)))
            return None
    else:
        chat = None
    side = pair.Side(
        name=name, flag=flag, folder=folder, architecture=architecture, tokenizer=tokenizer, chat=chat
    )
    state.findings += pair.check_vocabulary(side)
    try:
        state.findings += pair.check_stop_tokens(side)
    except ValueError as error:  # the template has no end of a turn
        state.findings.append(failed(name, "chat template", str(error), flag=f"--{flag}hf-checkpoint"))
        return None
    state.sides[name] = side
    return side


def _check_layout(
    state: State, name: str, architecture: Architecture, parallel: ParallelConfig, where: str, flag: str
) -> None:
    """Check one layout of one model."""

    def divides() -> bool:
        check_divides(architecture, parallel, flag=f"--{flag}hf-checkpoint")
        return True

    if not state.attempt(name, "layout", divides, lambda _: f"{where}{_layout(parallel)} divides the model"):
        state.undivided.add(name)


def _check_update(state: State, architecture: Architecture, parallel: ParallelConfig, flag: str) -> None:
    """Check the options of the update, for the student."""
    on_gpu = state.run.student.gpus_per_node > 0
    try:
        check_support(state.config.update, parallel, architecture, transformer_engine=on_gpu, flag=flag)
    except ValueError as error:
        state.findings.append(failed("student", "options", str(error)))


def _check_attention(
    state: State, name: str, architecture: Architecture, parallel: ParallelConfig, flag: str
) -> None:
    """Check the kernels of a model's attention."""
    if name in state.jobs:
        job, teacher = state.jobs[name]
        backend, bf16 = teacher.serving.attention_backend, teacher.serving.bf16
    else:
        job, training = state.run.student, state.config.training
        backend, bf16 = training.attention_backend, training.bf16
    on_gpu = job.gpus_per_node > 0
    rollout = state.config.rollout
    longest = rollout.rollout_max_prompt_len + rollout.rollout_max_response_len
    context = parallel.context_parallel_size
    try:
        check_backend(
            backend,
            architecture.scores,
            on_gpu=on_gpu,
            bf16=bf16,
            longest=longest,
            context_parallel_size=context,
            flag=flag,
        )
    except ValueError as error:
        state.findings.append(failed(name, "attention", str(error)))
        return
    if not on_gpu:
        return
    said = describe(
        architecture.scores,
        backend,
        bf16=bf16,
        longest=longest,
        context_parallel_size=context,
    )
    if uses_math(architecture.scores, backend, bf16=bf16, longest=longest, context_parallel_size=context):
        message = f"{flag}: {said}; use auto"
        state.findings.append(failed(name, "attention", message, flag="--attention-backend"))
    else:
        state.findings.append(passed(name, "attention", f"{flag}: {said}"))


def _layouts(state: State, name: str) -> Iterator[tuple[ParallelConfig, str]]:
    """Every layout in which the job builds the model; none if its options are invalid."""
    if name in state.jobs:
        if name in state.sound and not state.has_engine(name):
            yield state.jobs[name][1].parallel, ""
    elif "student" in state.sound and (name == "student" or name in state.colocated):
        if name == "student":
            yield state.config.parallel, ""
        else:
            yield state.config.parallel.for_teacher, "on the student's ranks, "


def _describe(architecture: Architecture | Head) -> str:
    if isinstance(architecture, Head):
        return f"run by the engine; LM head {architecture.tensor}, hidden size {architecture.hidden_size}"
    heads = architecture.layers[0].attention.heads
    return f"{architecture.num_layers} layers, hidden size {architecture.hidden_size}, {heads} heads"


def _layout(parallel: ParallelConfig) -> str:
    context = f" x CP{parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else ""
    return f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}{context}"
