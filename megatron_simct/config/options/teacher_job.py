"""The whole configuration of a teacher's job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_simct.config.options.declare import check_all_ranges, option
from megatron_simct.config.options.model import AttentionBackend, ModelConfig, check_attention
from megatron_simct.config.options.parallel import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """How a teacher's job answers requests."""

    run_dir: str | None = option(
        None,
        "directory where the replicas register; it is the student's --teacher-endpoint",
        metavar="DIR",
    )
    bind: str = option(
        "ipc",
        "ipc: for students on this host; tcp://HOST or tcp://HOST:PORT: encrypted; HOST is the name by "
        "which students reach this host, and replica i listens on PORT + i",
        metavar="ADDRESS",
    )
    teacher_hidden_dtype: Literal["fp32", "bf16", "int8"] = option(
        "bf16",
        "data type in which hidden states are sent; int8 has one scale for each row; for interface bytes, "
        "all but fp32 send float16",
    )
    max_tokens_per_batch: int = option(
        16384, "maximum tokens in one micro-batch of packed samples; a longer sample is refused", at_least=1
    )
    simct_alignment_map: str | None = option(
        None,
        "alignment map that students must use; default: any map of this teacher's tokenizer",
        metavar="DIR",
    )
    rollout_max_prompt_len: int = option(
        2048, "must match the student's value; only LongRoPE reads it", at_least=1, at_most=2**24
    )
    rollout_max_response_len: int = option(
        1024, "must match the student's value; only LongRoPE reads it", at_least=1, at_most=2**24
    )
    bf16: bool = option(False, "bf16 parameters (GPU only)")
    attention_backend: AttentionBackend = option("auto", "as in the student's job: auto, flash or local")
    verify_checkpoint: bool = option(
        True,
        "before use, check the hash of every file of a checkpoint, and of weights whose hashes are known",
    )


@dataclass(frozen=True, kw_only=True)
class EngineTeacherConfig:
    """An inference engine that computes the teacher's hidden states instead of this job.

    Flags: --engine-*
    """

    endpoint: tuple[str, ...] = option(
        (),
        "http://HOST:PORT of vLLM servers in pooling mode that serve --teacher-hf-checkpoint; this job "
        "then loads only the LM head; default: this job runs the model",
        metavar="URL",
    )
    hidden_dtype: Literal["float32", "float16"] = option(
        "float32",
        "data type in which the engine sends hidden states; with float16 a value beyond 65504 is an error",
    )
    answers: Literal["hidden_states", "prompt_logprobs", "echo"] = option(
        "hidden_states",
        "what the servers return: hidden_states; or prompt_logprobs or echo: the log-probabilities of the "
        "response's tokens, from vLLM's prompt_logprobs or OpenAI's echo (SGLang) in /v1/completions of "
        "servers that generate, enough for the interfaces alm and scalar",
    )
    check_endpoint: str | None = option(
        None,
        "http://HOST:PORT of a server that generates with the same model; before the first answer, its "
        "log-probabilities of the probe text are compared with those of this job",
        metavar="URL",
    )
    probe_text: str | None = option(
        None,
        "file with a text that is likely under the teacher, used to check the LM head and the engine "
        "before the first answer; default: a few English sentences",
        metavar="FILE",
    )
    start_minutes: float = option(30.0, "how long to wait for the first answer of an engine", at_least=0)
    timeout_s: float = option(
        120.0, "seconds after which a request to an engine counts as lost and is sent again", above=0
    )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The whole job of a teacher."""

    teacher: ModelConfig = field(default_factory=ModelConfig, metadata={"prefix": "teacher"})
    engine: EngineTeacherConfig = field(default_factory=EngineTeacherConfig, metadata={"prefix": "engine"})
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)

    def check(self) -> None:
        """Raises ValueError, with the flag, if an option is invalid, or a required one is missing."""
        check_all_ranges(self)
        required = {
            "--teacher-hf-checkpoint": self.teacher.hf_checkpoint,
            "--teacher-tokenizer-model": self.teacher.tokenizer_place,
            "--run-dir": self.serving.run_dir,
        }
        missing = [flag for flag, value in required.items() if not value]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}: a teacher's job needs it")
        check_attention(self.serving.attention_backend)
        if not self.engine.endpoint:
            if self.engine != EngineTeacherConfig():
                raise ValueError("--engine-endpoint is missing: the other --engine flags need it")
            return
        if self.engine.answers != "hidden_states" and self.engine.check_endpoint is not None:
            raise ValueError(
                f"--engine-check-endpoint: --engine-answers {self.engine.answers} reads log-probabilities "
                "from --engine-endpoint already; leave it out"
            )
        if self.teacher.pretrained_checkpoint is not None:
            raise ValueError(
                "--teacher-pretrained-checkpoint: an engine serves Hugging Face folders; leave it out"
            )
        ranks = self.parallel.tensor_model_parallel_size * self.parallel.pipeline_model_parallel_size
        if ranks > 1:
            raise ValueError(
                "--engine-endpoint: this job loads only the LM head, on one rank; leave out "
                "--tensor-model-parallel-size and --pipeline-model-parallel-size"
            )
