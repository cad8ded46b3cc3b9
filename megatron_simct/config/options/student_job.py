"""The whole configuration of a student's job, and the checks over several groups of options."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace

from megatron_simct.config.interfaces import METHODS
from megatron_simct.config.options.data import DataConfig
from megatron_simct.config.options.declare import check_all_ranges
from megatron_simct.config.options.evaluation import EvaluationConfig
from megatron_simct.config.options.loss import InterfaceConfig, TermsConfig
from megatron_simct.config.options.model import ModelConfig, check_attention
from megatron_simct.config.options.output import OutputConfig
from megatron_simct.config.options.parallel import ParallelConfig
from megatron_simct.config.options.rollout import (
    ENVIRONMENT_WORKERS,
    GRADED_REWARDS,
    RewardConfig,
    RolloutConfig,
)
from megatron_simct.config.options.teacher import (
    MixtureConfig,
    RoutingConfig,
    TeacherJobConfig,
    TeacherOptions,
    read_teachers,
)
from megatron_simct.config.options.update import LoraConfig, TrainingConfig, UpdateConfig

_PLACE = re.compile(r"[\w.]+:\w+")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole job. If a group has a prefix in its metadata, each of its flags begins with it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: ModelConfig = field(default_factory=ModelConfig, metadata={"prefix": "teacher"})
    teacher_job: TeacherJobConfig = field(default_factory=TeacherJobConfig, metadata={"prefix": "teacher"})
    second_teacher: ModelConfig = field(default_factory=ModelConfig, metadata={"prefix": "second_teacher"})
    mixture: MixtureConfig = field(default_factory=MixtureConfig, metadata={"prefix": "second_teacher"})
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    interface: InterfaceConfig = field(default_factory=InterfaceConfig, metadata={"prefix": "simct"})
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    terms: TermsConfig = field(default_factory=TermsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig, metadata={"prefix": "lora"})
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @property
    def needs_teacher(self) -> bool:
        """Whether the interface compares the student with a teacher."""
        method = METHODS.get(self.interface.method().interface)
        return method is None or method.teacher

    @property
    def teachers(self) -> tuple[TeacherOptions, ...]:
        """All teachers, whether or not the interface uses one: those of --teachers; the one of the other
        flags, without a name; or that and a second one, which get names. Raises ValueError if --teachers is
        not what it should be."""
        if self.routing.teachers is not None:
            return read_teachers(self.routing.teachers)
        first = TeacherOptions(
            name="first" if self.mixes_teachers else "",
            prefix="teacher-",
            model=self.teacher,
            job=self.teacher_job,
            alignment_map=self.data.simct_alignment_map,
        )
        if not self.mixes_teachers:
            return (first,)
        second = TeacherOptions(
            name="second", prefix="second-teacher-", model=self.second_teacher, job=self.mixture
        )
        return (first, second)

    @property
    def routes_rows(self) -> bool:
        """Whether each row has a teacher of its own choice: --teachers."""
        return self.routing.teachers is not None

    @property
    def names_teachers(self) -> bool:
        """Whether teachers have names, by which rows have one of them or a mixture: those of --teachers, and
        the two of which every row has the same mixture."""
        return self.routes_rows or self.mixes_teachers

    @property
    def mixture_of_all_rows(self) -> dict[str, float]:
        """With a second teacher, the weights of both in every row, by name; else nothing."""
        if not self.mixes_teachers:
            return {}
        first, second = self.teachers
        return {first.name: 1 - self.mixture.weight, second.name: self.mixture.weight}

    @property
    def interface_names(self) -> tuple[str, ...]:
        """The interfaces that compare rows: that of the run, or those of the entries of --teachers."""
        if not self.routes_rows:
            return (self.interface.interface,)
        own = [one.comparison.get("interface", self.interface.interface) for one in self.teachers]
        return tuple(dict.fromkeys(own))

    @property
    def samples(self) -> bool:
        """Whether the student samples the responses that it trains on."""
        return self.interface.interface != "sft" and self.data.simct_on == "sampled"

    @property
    def keeps_fields(self) -> bool:
        """Whether a function reads the rows of prompts."""
        return self.reward.reward is not None or self.rollout.environment is not None

    @property
    def global_batch_size(self) -> int:
        """Sequences of one optimizer step."""
        return self.rollout.rollout_batch_size * self.rollout.n_samples_per_prompt

    @property
    def sampled_prompts(self) -> int:
        """Prompts of a step whose responses are not given rows of --given-share."""
        return self.rollout.rollout_batch_size - round(
            (self.terms.given_share or 0) * self.rollout.rollout_batch_size
        )

    @property
    def given_rows(self) -> int:
        """Sequences of a step that --given-share gives."""
        given = self.rollout.rollout_batch_size - self.sampled_prompts
        return given * self.rollout.n_samples_per_prompt

    @property
    def sft_weight(self) -> float:
        """--sft-weight, or its default."""
        return 1.0 if self.terms.sft_weight is None else self.terms.sft_weight

    def check(self, *, data_parallel_size: int) -> None:
        """Raises ValueError, with numbers and flag, if options are invalid or contradict each other."""
        check_all_ranges(self)
        self._check_batch(data_parallel_size)
        self._check_terms(data_parallel_size)
        self._check_required()
        self._check_evaluation()
        self._check_output()
        self._check_rollout_engine()
        self._check_oversampling(data_parallel_size)
        self._check_reward()
        self._check_importance_weights()
        self._check_update()
        self._check_routing()
        self._check_remote_teacher()
        self._check_mixture()
        self._check_average()
        self._check_templates()
        self._check_given()
        self._check_environment(data_parallel_size)

    def _check_batch(self, data_parallel_size: int) -> None:
        """Raises ValueError for a batch size that is not that of the rollouts, or that cannot be divided."""
        size = self.global_batch_size
        wanted = self.training.global_batch_size
        if wanted is not None and wanted != size:
            raise ValueError(
                f"--global-batch-size {wanted}: training is on policy, one optimizer step a rollout batch, "
                f"so it must equal --rollout-batch-size ({self.rollout.rollout_batch_size}) x "
                f"--n-samples-per-prompt ({self.rollout.n_samples_per_prompt}) = {size}"
            )
        self._check_micro_batches(size, data_parallel_size)

    def _check_given(self) -> None:
        """Raises ValueError for options of sampling beside given responses."""
        if self.data.simct_on == "sampled":
            return
        rollout = self.rollout
        against = {
            **{
                f"--simct-interface {name}": (name in ("reward", "scalar"), "it compares sampled responses")
                for name in self.interface_names
            },
            "--reward": (self.reward.reward is not None, "it judges sampled responses"),
            "--rollout-engine vllm": (rollout.rollout_engine == "vllm", "nothing is sampled"),
            "--rollout-importance-weights": (
                rollout.rollout_importance_weights is not None,
                "given responses have no probabilities of a sampling",
            ),
            "--given-share": (self.terms.given_share is not None, "all responses are given"),
            "--reference-kl-weight": (self.terms.reference_kl_weight > 0, "its mean is over sampled labels"),
        }
        for flag, (given, why) in against.items():
            if given:
                raise ValueError(f"--simct-on given: not with {flag}: {why}; leave one of them out")

    def _check_environment(self, data_parallel_size: int) -> None:
        """Raises ValueError for an environment without sampled responses, or beside parts that read one."""
        rollout = self.rollout
        if rollout.environment is None:
            if rollout.environment_timeout_seconds != RolloutConfig().environment_timeout_seconds:
                raise ValueError("--environment-timeout-seconds needs --environment")
            return
        if not _PLACE.fullmatch(rollout.environment):
            raise ValueError(f"--environment {rollout.environment}: must be MODULE:FUNCTION")
        why = "not implemented for responses of several turns"
        against = {
            "--simct-on given": (self.data.simct_on == "given", "nothing is sampled"),
            "--simct-interface sft": (self.interface.interface == "sft", "nothing is sampled"),
            "--simct-interface scalar": ("scalar" in self.interface_names, why),
            "--reward": (self.reward.reward is not None, why),
            "--reference-kl-weight": (self.terms.reference_kl_weight > 0, why),
            "--rollout-engine vllm": (rollout.rollout_engine == "vllm", why),
            "--rollout-importance-weights": (rollout.rollout_importance_weights is not None, why),
        }
        for flag, (given, reason) in against.items():
            if given:
                raise ValueError(f"--environment: not with {flag}: {reason}; leave one of them out")
        # A rank waits for the replies of a turn while another one asks for those of its conversations.
        asked = self.sampled_prompts * rollout.n_samples_per_prompt // data_parallel_size
        asked = min(asked, rollout.rollout_wave_size or asked)
        longest = math.ceil(asked / ENVIRONMENT_WORKERS) * rollout.environment_timeout_seconds
        limit = self.parallel.distributed_timeout_minutes
        if longest >= 60 * limit:
            raise ValueError(
                f"--environment-timeout-seconds {rollout.environment_timeout_seconds:g}: a turn of {asked} "
                f"conversations in {ENVIRONMENT_WORKERS} processes may wait {longest:g} seconds, and other "
                f"ranks wait {limit} minutes; lower it or --rollout-wave-size, or raise "
                "--distributed-timeout-minutes"
            )

    def _check_required(self) -> None:
        """Raises ValueError if an option is missing that every run needs."""
        required = {
            "--hf-checkpoint": self.model.hf_checkpoint,
            "--tokenizer-model": self.model.tokenizer_place,
            "--prompt-data": self.data.prompt_data,
        }
        if self.needs_teacher and not self.routes_rows:
            required["--teacher-hf-checkpoint"] = self.teacher.hf_checkpoint
            required["--teacher-tokenizer-model"] = self.teacher.tokenizer_place
        missing = [flag for flag, value in required.items() if not value]
        if missing:
            raise ValueError(
                f"missing {', '.join(missing)}: --simct-interface {self.interface.interface} needs it"
            )

    def _check_evaluation(self) -> None:
        """Raises ValueError for options of the evaluation without held-out prompts."""
        if self.evaluation.eval_benchmark != "exact_match" and self.data.eval_prompt_data is None:
            raise ValueError(
                f"--eval-benchmark {self.evaluation.eval_benchmark} needs --eval-prompt-data, the "
                "benchmark's file"
            )
        if self.evaluation.exit_eval_accuracy is not None and self.data.eval_prompt_data is None:
            raise ValueError("--exit-eval-accuracy needs --eval-prompt-data, a held-out set to measure it on")

    def _check_output(self) -> None:
        """Raises ValueError for options of checkpoints, traces and logs whose directory is missing."""
        needs_save = {
            "--exit-signal-handler": self.output.exit_signal_handler,
            "--exit-duration-in-mins": self.output.exit_duration_in_mins is not None,
            "--save-interval": bool(self.output.save_interval),
            "--save-retain": self.output.save_retain is not None,
            "--async-save": self.output.async_save,
        }
        for flag, given in needs_save.items():
            if given and self.output.save is None:
                raise ValueError(f"{flag} needs --save, the directory of checkpoints")
        if self.output.ckpt_step is not None and self.output.load is None:
            raise ValueError("--ckpt-step needs --load, the directory of checkpoints")
        if self.output.profile and self.output.run_dir is None:
            raise ValueError("--profile needs --run-dir, where the trace is written")
        if self.output.profile and self.output.profile_step_end <= self.output.profile_step_start:
            raise ValueError(
                f"--profile-step-end {self.output.profile_step_end}: must be above --profile-step-start "
                f"({self.output.profile_step_start})"
            )
        if self.output.wandb_save_dir is not None and self.output.wandb_project is None:
            raise ValueError("--wandb-save-dir needs --wandb-project")

    def _check_update(self) -> None:
        """Raises ValueError for options of the update, or adapters, that contradict others."""
        self.update.check()
        check_attention(self.training.attention_backend)
        self.lora.check()
        if self.lora.rank and self.model.pretrained_checkpoint is not None:
            raise ValueError(
                "--lora-rank needs the weights of --hf-checkpoint, because adapters are exported for that "
                "folder; convert --pretrained-checkpoint to such a folder first (convert_checkpoint.py "
                "megatron-to-hf)"
            )
        if self.update.overlap_param_gather and not self.parallel.overlap_grad_reduce:
            raise ValueError("--overlap-param-gather needs --overlap-grad-reduce")
        if self.update.use_distributed_optimizer and self.training.optimizer != "adam":
            raise ValueError(
                f"--use-distributed-optimizer: megatron-core supports it for adam, not for --optimizer "
                f"{self.training.optimizer}"
            )
        if self.parallel.ddp_bucket_size is not None and not self.parallel.overlap_grad_reduce:
            raise ValueError("--ddp-bucket-size needs --overlap-grad-reduce")

    def _check_routing(self) -> None:
        """Raises ValueError for --teachers beside the flags of a single teacher, or without a use."""
        if not self.routes_rows:
            if self.routing.missing_teacher == "drop":
                raise ValueError("--missing-teacher drop needs --teachers, whose other rows go on")
            return
        if not self.needs_teacher:
            raise ValueError(
                f"--teachers: --simct-interface {self.interface.interface} uses no teacher; leave it out"
            )
        job, shared = self.teacher_job, ("timeout_minutes", "window_tokens")  # of every teacher
        single = replace(job, **{key: getattr(TeacherJobConfig(), key) for key in shared})
        for flags, given, instead in (
            ("--teacher-hf-checkpoint and others of its model", self.teacher != ModelConfig(), True),
            ("--teacher-endpoint, -client-key, -cache and -ema", single != TeacherJobConfig(), True),
            ("--second-teacher flags", self.second_teacher != ModelConfig() or self.mixes_teachers, True),
            ("--simct-alignment-map", self.data.simct_alignment_map is not None, True),
            ("--save-debug-scored-data", self.rollout.save_debug_scored_data is not None, False),
            ("--load-debug-scored-data", self.rollout.load_debug_scored_data is not None, False),
        ):
            if given:
                way_out = "write them into its entries" if instead else "leave one of them out"
                raise ValueError(f"--teachers: not with {flags}, which are of a single teacher; {way_out}")
        if self.parallel.num_virtual_stages_per_pipeline_rank > 1:
            here = [teacher.name for teacher in self.teachers if not teacher.job.endpoint]
            if here:
                raise ValueError(
                    f"--teachers {here[0]}: with --num-virtual-stages-per-pipeline-rank it needs an "
                    "endpoint, a job of its own: its rows in a step are not a multiple of the stages"
                )

    def _check_remote_teacher(self) -> None:
        """Raises ValueError for options of a teacher in another job that contradict each other."""
        remote = [teacher for teacher in self.teachers if teacher.job.endpoint]
        if remote and self.teacher_job.timeout_minutes >= self.parallel.distributed_timeout_minutes:
            raise ValueError(
                f"--teacher-timeout-minutes ({self.teacher_job.timeout_minutes:g}) must be below "
                f"--distributed-timeout-minutes ({self.parallel.distributed_timeout_minutes}): while one "
                "rank waits for the teacher, others wait for that rank"
            )
        if self.training.lag and len(remote) < len(self.teachers):
            needed = "an endpoint for each of --teachers" if self.routes_rows else "--teacher-endpoint"
            raise ValueError(
                f"--schedule one_step_off needs {needed}: it overlaps training with a teacher in another job"
            )
        if self.teacher_job.cache is not None and not self.teacher_job.endpoint:
            raise ValueError(
                "--teacher-cache needs --teacher-endpoint; to train from a cache alone use "
                "--load-debug-scored-data"
            )
        if self.rollout.load_debug_scored_data is not None and self.teacher_job.endpoint:
            raise ValueError(
                "--load-debug-scored-data never asks a teacher; leave out --teacher-endpoint, or use "
                "--teacher-cache"
            )
        for teacher in remote:
            places = teacher.job.endpoint
            num_addresses = sum("://" in place for place in places)
            if num_addresses < len(places) and len(places) > 1:
                raise ValueError(
                    f"--{teacher.prefix}endpoint {' '.join(places)}: give one directory, or addresses only"
                )

    def _check_templates(self) -> None:
        """Raises ValueError for options of chat templates without --apply-chat-template."""
        for flag, text in {
            "--chat-template-kwargs": self.model.chat_template_kwargs,
            **{f"--{of.prefix}chat-template-kwargs": of.model.chat_template_kwargs for of in self.teachers},
            "--chat-template-date": self.data.chat_template_date,
        }.items():
            if text is not None and not self.data.apply_chat_template:
                raise ValueError(f"{flag} needs --apply-chat-template")

    def _check_rollout_engine(self) -> None:
        """Raises ValueError for engine options without an engine, or if a required option is missing."""
        rollout = self.rollout
        if rollout.rollout_engine == "megatron":
            if rollout.rollout_engine_endpoint or rollout.rollout_engine_weights is not None:
                raise ValueError(
                    "--rollout-engine-endpoint and --rollout-engine-weights need --rollout-engine vllm"
                )
            return
        if not rollout.rollout_engine_endpoint:
            raise ValueError(
                "--rollout-engine vllm needs --rollout-engine-endpoint, the addresses of the servers"
            )
        if rollout.rollout_engine_weights is None and self.output.run_dir is None:
            raise ValueError(
                "--rollout-engine vllm needs --rollout-engine-weights, or --run-dir to put them under"
            )
        if rollout.rollout_engine_timeout_minutes >= self.parallel.distributed_timeout_minutes:
            raise ValueError(
                f"--rollout-engine-timeout-minutes ({rollout.rollout_engine_timeout_minutes:g}) must be "
                f"below --distributed-timeout-minutes ({self.parallel.distributed_timeout_minutes}): while "
                "one rank waits for the engine, others wait for that rank"
            )
        if self.parallel.context_parallel_size > 1:
            raise ValueError(
                "--rollout-engine vllm: not implemented with --context-parallel-size; leave it out"
            )
        if self.lora.rank:
            raise ValueError(
                "--rollout-engine vllm: the servers receive whole weights, not adapters; leave out "
                "--lora-rank"
            )
        if self.interface.interface == "sft":
            raise ValueError(
                "--rollout-engine vllm: --simct-interface sft trains on given responses; leave it out"
            )

    def _check_importance_weights(self) -> None:
        """Raises ValueError if the interface or the layout does not support importance weights."""
        if self.rollout.rollout_importance_weights is None:
            return
        flag = "--rollout-importance-weights"
        for name in self.interface_names:
            if name in ("sft", "scalar"):
                why = "trains on given responses" if name == "sft" else "already has an importance ratio"
                raise ValueError(f"{flag}: --simct-interface {name} {why}; leave it out")
        if self.parallel.context_parallel_size > 1:
            raise ValueError(
                f"{flag}: needs whole responses on a rank; leave it out, or --context-parallel-size"
            )

    @property
    def max_lag(self) -> int | None:
        """The most optimizer steps between sampling and training weights; None: no limit."""
        if self.rollout.rollout_max_lag is not None:
            return self.rollout.rollout_max_lag
        if self.rollout.load_debug_rollout_data is not None:
            return None
        return self.training.lag + (1 if self.rollout.rollout_oversample else 0)

    def _check_oversampling(self, data_parallel_size: int) -> None:
        """Raises ValueError if no response can be carried over into the next step."""
        rollout, lag = self.rollout, self.training.lag
        if not rollout.rollout_oversample:
            return
        flag = f"--rollout-oversample {rollout.rollout_oversample:g}"
        if rollout.rollout_engine != "vllm":
            raise ValueError(
                f"{flag}: needs --rollout-engine vllm; the default engine decodes a wave of responses in "
                "lock-step on the ranks that train, and cannot continue single responses later"
            )
        for other, value, why in (
            ("--load-debug-rollout-data", rollout.load_debug_rollout_data, "stored responses are finished"),
            ("--rollout-wave-size", rollout.rollout_wave_size, "all responses are requested at once"),
        ):
            if value is not None:
                raise ValueError(f"{flag}: not with {other}: {why}; leave one of them out")
        if rollout.rollout_max_lag is not None and rollout.rollout_max_lag <= lag:
            raise ValueError(
                f"{flag}: a response that is carried over is at least {lag + 1} steps old, and "
                f"--rollout-max-lag is {rollout.rollout_max_lag}; leave one of them out"
            )
        if self.sampled_prompts % data_parallel_size:
            raise ValueError(
                f"{flag}: each data-parallel replica samples all responses to its prompts, so the prompts "
                "that a step samples (--rollout-batch-size without the share of --given-share: "
                f"{self.sampled_prompts}) must be a multiple of the data-parallel size ({data_parallel_size})"
            )

    def _check_micro_batches(self, size: int, data_parallel_size: int) -> None:
        """Raises ValueError if `size` sequences cannot be divided over ranks and micro-batches."""
        context, of_teacher = self.parallel.context_parallel_size, self.training.teacher_context_parallel_size
        if of_teacher not in (None, 1, context):
            raise ValueError(
                f"--teacher-context-parallel-size {of_teacher}: must be 1 or --context-parallel-size "
                f"({context}); a teacher with --teacher-endpoint has its own --context-parallel-size"
            )
        if of_teacher is not None and all(teacher.job.endpoint for teacher in self.teachers):
            endpoint = "endpoints of all --teachers" if self.routes_rows else "--teacher-endpoint"
            raise ValueError(
                "--teacher-context-parallel-size applies to a teacher on the student's ranks; with "
                f"{endpoint} give --context-parallel-size to the teacher's job"
            )
        by_tokens = self.training.max_tokens_per_gpu is not None
        step = self._divisor(data_parallel_size)
        unit = "" if by_tokens else f"--micro-batch-size ({self.training.micro_batch_size}) x "
        if of_teacher == 1 < context:  # the ranks share a teacher's sequences one by one
            unit = f"{unit}--context-parallel-size ({context}) x "
        if size % step:
            multiple = step // math.gcd(step, self.rollout.n_samples_per_prompt)
            below = self.rollout.rollout_batch_size // multiple * multiple
            fitting = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise ValueError(
                f"global batch size ({size}) must be a multiple of {unit}data-parallel size "
                f"({data_parallel_size}){'' if by_tokens else f' = {step}'}; use a --rollout-batch-size of "
                f"{fitting}"
            )
        stages = self.parallel.pipeline_model_parallel_size
        if self.parallel.num_virtual_stages_per_pipeline_rank > 1 and size // step % stages:
            raise ValueError(
                "--num-virtual-stages-per-pipeline-rank "
                f"{self.parallel.num_virtual_stages_per_pipeline_rank}: the interleaved schedule needs "
                f"{'samples a rank' if by_tokens else 'micro-batches'} ({size // step} a step: global batch "
                f"size ({size}) / ({unit}data-parallel size) ({step})) in a multiple of "
                f"--pipeline-model-parallel-size ({stages})"
            )

    def _divisor(self, data_parallel_size: int) -> int:
        """The number of which the sequences of a step are a multiple."""
        by_tokens = self.training.max_tokens_per_gpu is not None
        step = data_parallel_size * (1 if by_tokens else self.training.micro_batch_size)
        context = self.parallel.context_parallel_size
        return step * context if self.training.teacher_context_parallel_size == 1 < context else step

    def _check_terms(self, data_parallel_size: int) -> None:
        """Raises ValueError for terms without rows, or if the rows cannot be divided over ranks."""
        terms, interface = self.terms, self.interface.interface
        if terms.sft_weight is not None and terms.given_share is None:
            raise ValueError("--sft-weight needs --given-share, the rows that it is of")
        for flag, given in {
            f"--given-share {terms.given_share}": terms.given_share is not None,
            f"--reference-kl-weight {terms.reference_kl_weight}": terms.reference_kl_weight > 0,
        }.items():
            if given and interface == "sft":
                raise ValueError(
                    f"{flag}: --simct-interface sft samples nothing, all its rows are given; leave it out"
                )
            if given and self.output.gradient_parts_interval:
                raise ValueError(
                    f"{flag}: --gradient-parts-interval compares parts of the interface's gradient alone; "
                    "leave one of them out"
                )
        if terms.given_share is None:
            return
        prompts, samples = self.rollout.rollout_batch_size, self.rollout.n_samples_per_prompt
        step = self._divisor(data_parallel_size)
        if self.parallel.num_virtual_stages_per_pipeline_rank > 1:
            step *= self.parallel.pipeline_model_parallel_size

        def fits(given: int) -> bool:
            return given * samples % step == 0 and (prompts - given) * samples % step == 0

        wanted = terms.given_share * prompts
        if abs(wanted - round(wanted)) < 1e-6 and 0 < round(wanted) < prompts and fits(round(wanted)):
            return
        fitting = sorted(filter(fits, range(1, prompts)), key=lambda given: abs(given - wanted))[:3]
        shares = ", ".join(f"{given / prompts:g}" for given in sorted(fitting))
        why = (
            f"--given-share {terms.given_share} of --rollout-batch-size {prompts} is {wanted:g} prompts of "
            f"{samples} sequences each; these sequences, and the others, must be a multiple of {step}, as "
            "those of a step are"
        )
        raise ValueError(f"{why}; use {shares}" if shares else f"{why}; raise --rollout-batch-size")

    @property
    def teacher_context_parallel_size(self) -> int:
        """Ranks that share each sequence of a teacher on the student's ranks."""
        return self.training.teacher_context_parallel_size or self.parallel.context_parallel_size

    @property
    def mixes_teachers(self) -> bool:
        """Whether there is a second teacher."""
        return bool(self.mixture.endpoint)

    def _check_reward(self) -> None:
        """Raises ValueError if --reward has no samples to compare, or if an option needs a --reward."""
        reward, interface = self.reward.reward, self.interface.interface
        if reward is None:
            if interface == "reward":
                raise ValueError("--simct-interface reward needs --reward")
            given = {
                f"--{f.name.replace('_', '-')}": getattr(self.reward, f.name) != f.default
                for f in fields(RewardConfig)
            }
            for flag, differs in given.items():
                if differs:
                    raise ValueError(f"{flag} needs --reward")
            return
        if interface == "sft":
            raise ValueError(
                "--reward: --simct-interface sft trains on given responses; leave one of them out"
            )
        if reward not in GRADED_REWARDS and not _PLACE.fullmatch(reward):
            raise ValueError(
                f"--reward {reward}: must be one of {', '.join(GRADED_REWARDS)}, or MODULE:FUNCTION"
            )
        if self.rollout.n_samples_per_prompt < 2:
            raise ValueError(
                "--reward compares the responses to one prompt: --n-samples-per-prompt must be at least 2"
            )

    def _check_average(self) -> None:
        """Raises ValueError if the teacher of --teacher-ema cannot follow the student's weights."""
        if self.teacher_job.ema is None:
            return
        against = {
            "--teacher-endpoint": (
                self.teacher_job.endpoint,
                "a teacher in another job cannot read the student's weights",
            ),
            "--load-debug-scored-data": (
                self.rollout.load_debug_scored_data,
                "stored answers come from other weights",
            ),
            "--save-debug-scored-data": (
                self.rollout.save_debug_scored_data,
                "its answers would come from weights that change",
            ),
            "--lora-rank": (self.lora.rank, "the student has adapters, the teacher has none"),
            f"--simct-interface {self.interface.interface}": (not self.needs_teacher, "it uses no teacher"),
        }
        for flag, (given, why) in against.items():
            if given:
                raise ValueError(
                    f"--teacher-ema {self.teacher_job.ema} cannot be used with {flag}: {why}; leave one of "
                    "them out"
                )

    def _check_mixture(self) -> None:
        """Raises ValueError for second-teacher options without an endpoint, or for teachers that cannot be
        mixed.
        """
        if not self.mixes_teachers:
            if (self.second_teacher, self.mixture) != (ModelConfig(), MixtureConfig()):
                raise ValueError(
                    "--second-teacher-endpoint is missing: the other --second-teacher flags need it"
                )
            return
        if self.interface.interface != "bytes":
            raise ValueError(
                f"--second-teacher-endpoint: --simct-interface {self.interface.interface} compares tokens, "
                "and only distributions over bytes can be mixed; use --simct-interface bytes"
            )
        for flag, value in {
            "--teacher-endpoint": self.teacher_job.endpoint,
            "--second-teacher-hf-checkpoint": self.second_teacher.hf_checkpoint,
            "--second-teacher-tokenizer-model": self.second_teacher.tokenizer_place,
        }.items():
            if not value:
                raise ValueError(f"missing {flag}: --second-teacher-endpoint needs it")
        for flag, value in {
            "--save-debug-scored-data": self.rollout.save_debug_scored_data,
            "--teacher-cache": self.teacher_job.cache,
            "--simct-alignment-map": self.data.simct_alignment_map,
        }.items():
            if value is not None:
                raise ValueError(
                    f"{flag} supports one teacher only; leave it out, or --second-teacher-endpoint"
                )
