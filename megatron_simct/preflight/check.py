"""All checks of one run file, in the order in which a user would meet their failures. The longest takes seconds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_simct.alignment import AlignmentMap
from megatron_simct.alignment.coverage import Coverage
from megatron_simct.alignment.map_files import placement_balance
from megatron_simct.config import ModelConfig, ParallelConfig, TeacherConfig
from megatron_simct.data.prompts import PromptSource, Row, read_prompts
from megatron_simct.launch.run_file import JobSize, RunFile
from megatron_simct.loading import open_alignment_map, open_chat_template, open_held_out, open_tokenizer
from megatron_simct.losses import check_config, teacher_needs
from megatron_simct.models.build import check_divides, padded_vocab_size
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.hf_load import find_weights
from megatron_simct.parallel.initialize import check_layout
from megatron_simct.preflight import pair
from megatron_simct.preflight.cluster import check_cluster
from megatron_simct.preflight.findings import Finding, failed, passed, warned
from megatron_simct.preflight.memory import GIB, MemoryPlan, Sizes, as_gib, size_text, student_plan, teacher_plan
from megatron_simct.preflight.traffic import Traffic, step_traffic
from megatron_simct.update.checkpoint import has_checkpoint
from megatron_simct.writers import check_writers

MEMORY_WARN = 0.9
"""Share of the device from which a plan is pointed out."""

_VALUE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found, and the numbers behind it. Parts that could not be looked at are missing."""

    findings: list[Finding]
    plans: dict[str, MemoryPlan] = field(default_factory=dict)
    """student and teacher job -> plan."""
    traffic: Traffic | None = None
    coverage: Coverage | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    """The first prompt, as each side reads it."""

    @property
    def failed(self) -> bool:
        return any(finding.level == "fail" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """One object; memory in GiB."""
        return {
            "failed": self.failed,
            "findings": [finding.as_json() for finding in self.findings],
            "memory_gib": {
                job: {
                    "peak": round(plan.peak / GIB, 2),
                    "held": as_gib(plan.held),
                    "phases": {phase: as_gib(parts) for phase, parts in plan.phases.items()},
                    "parameters": plan.num_parameters,
                }
                for job, plan in self.plans.items()
            },
            "traffic_bytes": None if self.traffic is None else dataclasses.asdict(self.traffic),
            "coverage": None if self.coverage is None else self.coverage.as_json(),
            "prompts": self.prompts,
        }


def check_run(run: RunFile, *, device_memory_gib: float | None = None) -> Report:
    """Every check that the file allows. Nothing is raised for what a user can mend: it is a finding.

    device_memory_gib goes before cluster.device_memory_gib.
    """
    return _Check(run, device_memory_gib or run.cluster.device_memory_gib).report()


class _Check:
    """Collects findings; a check whose input another one has refused is left out."""

    def __init__(self, run: RunFile, device_memory_gib: float | None) -> None:
        self._run = run
        self._device_memory_gib = device_memory_gib
        self._findings: list[Finding] = []
        config = run.config
        # Whether there is a GPU is asked of the nodes, not of the machine that launches.
        training = dataclasses.replace(config.training, bf16=False)
        self._config = dataclasses.replace(config, training=training)
        self._bf16 = config.training.bf16
        self._teacher_job = run.teacher_config
        self._colocated = not config.teacher_job.endpoint and config.rollout.load_debug_scored_data is None
        self._needs_teacher = config.interface.interface != "sft"
        self._sound: set[str] = set()
        """Jobs whose options have a meaning: of the others there is neither layout nor plan."""

    def _try(
        self, side: str, check: str, function: Callable[[], T], said: Callable[[T], str] | None = None
    ) -> T | None:
        """The function's value, or None and a failed finding with what it raised."""
        try:
            value = function()
        except ValueError as error:
            self._findings.append(failed(side, check, str(error)))
            return None
        if said is not None:
            self._findings.append(passed(side, check, said(value)))
        return value

    def report(self) -> Report:
        findings = self._findings
        findings += check_cluster(self._run)
        self._options()
        student, teacher = self._side("student", self._config.model), None
        if self._needs_teacher:
            teacher = self._side("teacher", self._config.teacher)
        elif self._run.teacher is not None:
            findings.append(
                failed("teacher", "interface", "--simct-interface sft asks no teacher; leave out the section teacher")
            )
        if student is None or (teacher is None and self._needs_teacher):
            return Report(findings=findings)
        rows = self._rows(student, teacher)
        coverage, alignment_map = None, None
        if teacher is not None:
            alignment_map = self._try(
                "pair",
                "shared vocabulary",
                lambda: open_alignment_map(self._config, student.tokenizer, teacher.tokenizer),
                lambda found: f"{found.num_shared:,} tokens",
            )
        if teacher is not None and alignment_map is not None and rows:
            coverage = pair.coverage_of(rows, student=student, teacher=teacher, alignment_map=alignment_map)
            findings += pair.check_coverage(coverage)
            findings += pair.check_interface(
                self._config.interface.interface, coverage, student=student, teacher=teacher
            )
        findings += self._lengths(student, teacher, coverage)
        plans = self._memory(student, teacher, alignment_map)
        traffic = self._traffic(teacher, coverage) if teacher is not None else None
        prompts = pair.side_by_side(student, teacher, rows[0].prompt) if rows else {}
        return Report(findings=findings, plans=plans, traffic=traffic, coverage=coverage, prompts=prompts)

    def _options(self) -> None:
        """What the options say by themselves."""
        config, student = self._config, self._run.cluster.student

        def check() -> int:
            check_layout(config.parallel, student.world_size)
            parallel = config.parallel
            ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
            data_parallel_size = student.world_size // ranks
            config.check(data_parallel_size=data_parallel_size)
            check_config(config.interface)
            if self._run.cluster.container is None:
                check_writers(config.output)
            return data_parallel_size

        size = self._try("student", "options", check)
        if size is not None:
            self._sound.add("student")
            batches = config.global_batch_size // (config.training.micro_batch_size * size)
            said = f"data-parallel size {size}, {config.global_batch_size} sequences a step in {batches} micro-batches"
            self._findings.append(passed("student", "options", said))
        output = config.output
        if output.load is not None and output.load != output.save and not has_checkpoint(output.load):
            message = f"--load {output.load}: no checkpoint there, and it is not the directory of --save"
            self._findings.append(failed("student", "resuming", message))
        if self._teacher_job is not None:
            parallel, cluster = self._teacher_job.parallel, self._run.cluster.teacher
            serving = dataclasses.replace(self._teacher_job.serving, bf16=False)
            job = dataclasses.replace(self._teacher_job, serving=serving)

            def check_job() -> bool:
                check_layout(parallel, cluster.world_size)
                job.check()
                return True

            if self._try("teacher", "options", check_job):
                self._sound.add("teacher")

    def _divides(self, name: str, architecture: Architecture, parallel: ParallelConfig, where: str, flag: str) -> None:
        """One layout of one model."""
        self._try(
            name,
            "layout",
            lambda: check_divides(architecture, parallel, flag=f"--{flag}hf-checkpoint"),
            lambda _: f"{where}{_layout(parallel)} divides the model",
        )

    def _side(self, name: str, model: ModelConfig) -> pair.Side | None:
        """One model: its architecture in its layout, its weights, its tokenizer and template."""
        flag = "" if name == "student" else "teacher-"
        folder = model.hf_checkpoint
        if folder is None:
            return None  # said by the options
        architecture = self._try(
            name, "family", lambda: read_architecture(folder, flag=f"--{flag}hf-checkpoint"), _describe
        )
        if architecture is not None:
            for parallel, where in self._layouts(name):
                self._divides(name, architecture, parallel, where, flag)
        self._weights(name, folder, model, flag)
        if model.tokenizer is None:
            message = f"--{flag}hf-checkpoint {folder} has no tokenizer; give --{flag}tokenizer-model"
            self._findings.append(failed(name, "tokenizer", message, flag=f"--{flag}tokenizer-model"))
            return None
        tokenizer = self._try(name, "tokenizer", lambda: open_tokenizer(model, prefix=flag), lambda found: found.name)
        if tokenizer is None or architecture is None:
            return None
        if self._config.data.apply_chat_template:
            try:
                chat = open_chat_template(self._config, model, tokenizer, prefix=flag)
            except ValueError as error:
                self._findings.append(failed(name, "chat template", str(error)))
                return None
        else:
            chat = None
        side = pair.Side(name=name, flag=flag, folder=folder, architecture=architecture, tokenizer=tokenizer, chat=chat)
        self._findings += [*pair.check_vocabulary(side), *pair.check_stop_tokens(side)]
        return side

    def _layouts(self, name: str) -> Iterator[tuple[ParallelConfig, str]]:
        """Every layout that the model is built in, where it is one."""
        if name == "teacher" and self._teacher_job is not None:
            if "teacher" in self._sound:
                yield self._teacher_job.parallel, ""
        elif "student" in self._sound and (name == "student" or self._colocated):
            yield self._config.parallel, "" if name == "student" else "on the student's ranks, "

    def _weights(self, name: str, folder: str, model: ModelConfig, flag: str) -> None:
        if model.pretrained_checkpoint is not None:
            if not has_checkpoint(model.pretrained_checkpoint):
                message = f"--{flag}pretrained-checkpoint {model.pretrained_checkpoint}: no checkpoint there"
                self._findings.append(failed(name, "weights", message))
            return
        try:
            found = find_weights(folder, flag=f"--{flag}hf-checkpoint")
        except ValueError as error:
            self._findings.append(failed(name, "weights", str(error)))
            return
        if found is not None and found.name.endswith(".index.json"):
            self._try(name, "weights", lambda: _check_shards(found, flag=f"--{flag}hf-checkpoint"))
        if found is None and name == "teacher" and self._teacher_job is not None:
            message = f"--{flag}hf-checkpoint {folder} has no safetensors, and a teacher needs weights; or give"
            self._findings.append(failed(name, "weights", f"{message} --{flag}pretrained-checkpoint"))
        elif found is None:
            message = f"{folder} has no safetensors: the weights would be random"
            self._findings.append(warned(name, "weights", message, flag=f"--{flag}hf-checkpoint"))

    def _rows(self, student: pair.Side, teacher: pair.Side | None) -> list[Row]:
        """The prompts, where they can be read and rendered; else none."""
        config = self._config
        if config.data.prompt_data is None:
            return []  # said by the options

        rows = self._try(
            "pair",
            "prompts",
            lambda: read_prompts(
                config.data.prompt_data or "",
                flag="--prompt-data",
                input_key=config.data.input_key,
                response_key=config.data.response_key,
                label_key=config.data.label_key,
                chat=config.data.apply_chat_template,
                need_response=not self._needs_teacher,
                need_label=False,
            ),
        )
        if config.data.eval_prompt_data is not None:
            self._try("pair", "prompts", lambda: open_held_out(config))
        if rows is None:
            return []
        looked_at = rows[:: max(1, len(rows) // pair.MAX_TEXTS)]
        try:
            templates = pair.check_templates(student, teacher, looked_at, chat=config.data.apply_chat_template)
            source = PromptSource(
                looked_at,
                student=student.tokenizer,
                teacher=None if teacher is None else teacher.tokenizer,
                batch_size=None,
                samples_per_prompt=1,
                max_prompt_len=config.rollout.rollout_max_prompt_len,
                shuffle=False,
                seed=0,
                dp_rank=0,
                dp_size=1,
                flag="--prompt-data",
                student_chat=student.chat,
                teacher_chat=None if teacher is None else teacher.chat,
            )
        except ValueError as error:
            message = str(error)
            flag = "--rollout-max-prompt-len" if "all " in message and "exceed" in message else "--prompt-data"
            self._findings.append(failed("pair", "prompts", message, flag=flag))
            return []
        self._findings += templates
        share = source.num_skipped / len(looked_at)
        said = f"{len(rows):,} prompts; of {len(looked_at)} looked at {share:.1%} are too long and left out"
        if share > pair.SKIPPED_WARN:
            self._findings.append(warned("pair", "prompts", said, flag="--rollout-max-prompt-len"))
        else:
            self._findings.append(passed("pair", "prompts", said))
        return rows

    def _lengths(self, student: pair.Side, teacher: pair.Side | None, coverage: Coverage | None) -> list[Finding]:
        rollout = self._config.rollout
        lengths = {"prompt_len": rollout.rollout_max_prompt_len, "response_len": rollout.rollout_max_response_len}
        findings = pair.check_length(student, **lengths)
        if teacher is not None:
            lengths["response_len"] = self._teacher_labels(coverage)
            findings += pair.check_length(teacher, **lengths)
            limit = None if self._teacher_job is None else self._teacher_job.serving.max_tokens_per_batch
            if limit is not None and sum(lengths.values()) > limit:
                message = f"--max-tokens-per-batch {limit}: {sum(lengths.values()):,} tokens would be refused"
                findings.append(failed("teacher", "context", message))
        return findings

    def _teacher_labels(self, coverage: Coverage | None) -> int:
        """Teacher's tokens of a response of full length."""
        ratio = 1.0 if coverage is None else coverage.teacher_tokens / max(coverage.student_tokens, 1)
        return round(self._config.rollout.rollout_max_response_len * ratio)

    def _memory(
        self, student: pair.Side, teacher: pair.Side | None, alignment_map: AlignmentMap | None
    ) -> dict[str, MemoryPlan]:
        """A plan for each job, and whether it fits."""
        cluster = self._run.cluster
        plans: dict[str, MemoryPlan] = {}
        if "student" in self._sound:
            plans["student"] = self._student_plan(student, teacher, alignment_map)
            self._fits("student", plans["student"], cluster.student)
        if teacher is not None and self._teacher_job is not None and "teacher" in self._sound:
            plans["teacher"] = self._teacher_plan(teacher, self._teacher_job)
            self._fits("teacher", plans["teacher"], cluster.teacher)
        return plans

    def _student_plan(
        self, student: pair.Side, teacher: pair.Side | None, alignment_map: AlignmentMap | None
    ) -> MemoryPlan:
        config, cluster = self._config, self._run.cluster
        parallel, rollout = config.parallel, config.rollout
        sizes = self._sizes(student, config.model, parallel, bf16=self._bf16)
        ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        data_parallel_size = max(1, cluster.student.world_size // ranks)
        share = -(-config.global_batch_size // data_parallel_size)
        needs = teacher_needs(config.interface)
        rows = 0
        if alignment_map is not None and needs.hidden_rows != "none" and not needs.topk:
            tp = parallel.tensor_model_parallel_size
            rows = round(placement_balance(alignment_map, (tp,))[tp] * alignment_map.teacher_vocab_size / tp)
        return student_plan(
            sizes,
            optimizer=config.training.optimizer,
            micro_batch_size=config.training.micro_batch_size,
            num_micro_batches=max(1, share // config.training.micro_batch_size),
            engine_batch_size=min(rollout.rollout_engine_batch_size, share),
            prompt_len=rollout.rollout_max_prompt_len,
            response_len=rollout.rollout_max_response_len,
            loss_memory=config.interface.loss_memory_mib << 20,
            trains_on_given=not self._needs_teacher,
            on_gpu=cluster.student.gpus_per_node > 0,
            teacher=(
                self._sizes(teacher, config.teacher, parallel, bf16=self._bf16)
                if self._colocated and teacher is not None
                else None
            ),
            shared_rows=rows,
            teacher_hidden_size=0 if teacher is None else teacher.architecture.hidden_size,
        )

    def _teacher_plan(self, teacher: pair.Side, job: TeacherConfig) -> MemoryPlan:
        length = self._config.rollout.rollout_max_prompt_len + self._config.rollout.rollout_max_response_len
        return teacher_plan(
            self._sizes(teacher, job.teacher, job.parallel, bf16=job.serving.bf16),
            tokens=job.serving.max_tokens_per_batch,
            length=min(length, job.serving.max_tokens_per_batch),
            on_gpu=self._run.cluster.teacher.gpus_per_node > 0,
        )

    @staticmethod
    def _sizes(side: pair.Side, model: ModelConfig, parallel: ParallelConfig, *, bf16: bool) -> Sizes:
        rows = padded_vocab_size(
            side.architecture.vocab_size,
            divisible_by=model.make_vocab_size_divisible_by,
            tp_size=parallel.tensor_model_parallel_size,
        )
        return Sizes(architecture=side.architecture, parallel=parallel, vocab_size=rows, bf16=bf16)

    def _fits(self, job: str, plan: MemoryPlan, size: JobSize) -> None:
        device, peak = self._device_memory_gib, plan.peak / GIB
        parts = plan.held | plan.phases[plan.peak_phase]
        largest = max(parts, key=lambda name: parts[name])
        said = (
            f"{size_text(plan.peak)} a rank, in {plan.peak_phase}; the most for {largest} ({size_text(parts[largest])})"
        )
        if device is None:
            if size.gpus_per_node:
                message = f"{said}; how much a GPU has is not said, so it was not compared"
                self._findings.append(warned(job, "memory", message, flag="--device-memory"))
            else:
                self._findings.append(passed(job, "memory", said))
            return
        if peak > device:
            flag, change = _remedy(job, plan, largest)
            self._findings.append(failed(job, "memory", f"{said}; a device has {device:g} GiB: {change}", flag=flag))
        elif peak > MEMORY_WARN * device:
            flag, change = _remedy(job, plan, largest)
            self._findings.append(warned(job, "memory", f"{said}, of {device:g} GiB: little room", flag=flag))
        else:
            self._findings.append(passed(job, "memory", f"{said}, of {device:g} GiB"))

    def _traffic(self, teacher: pair.Side, coverage: Coverage | None) -> Traffic:
        config = self._config
        needs = teacher_needs(config.interface)
        labels = self._teacher_labels(coverage)
        rows = labels
        if coverage is not None and needs.hidden_rows == "first":
            rows = round(labels * coverage.units / max(coverage.teacher_tokens, 1))
        elif coverage is not None and needs.hidden_rows == "one_to_one":
            one_to_one = coverage.student_token_shares["1_1"] * coverage.student_tokens
            rows = round(labels * one_to_one / max(coverage.teacher_tokens, 1))
        elif needs.hidden_rows == "none":
            rows = 0
        hidden_dtype = self._teacher_job.serving.teacher_hidden_dtype if self._teacher_job else "bf16"
        traffic = step_traffic(
            needs,
            sequences=config.global_batch_size,
            prompt_len=config.rollout.rollout_max_prompt_len,
            teacher_labels=labels,
            rows=rows,
            hidden_size=teacher.architecture.hidden_size,
            value_bytes=_VALUE_BYTES[hidden_dtype],
            vocab_size=teacher.tokenizer.table.num_ids,
        )
        said = (
            f"at most {size_text(traffic.requests)} to the teacher and {size_text(traffic.answers)} back a step; whole "
            f"logits would be {size_text(traffic.logits)}"
        )
        self._findings.append(passed("pair", "traffic", said))
        return traffic


def _check_shards(index: Path, *, flag: str) -> None:
    """ValueError where a file of the index is missing, as after a download that was cut off."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{flag} {index.parent}: {index.name} is damaged; fetch the folder again") from None
    missing = sorted(name for name in names if not (index.parent / name).exists())
    if missing:
        raise ValueError(
            f"{flag} {index.parent}: {len(missing)} of {len(names)} weight files are missing, {missing[0]} first; "
            "fetch the folder again"
        )


def _remedy(job: str, plan: MemoryPlan, largest: str) -> tuple[str, str]:
    """The flag of the job that lowers the largest part, and what to do with it."""
    if largest == "KV cache" or plan.peak_phase == "rollout" and largest == "forward pass":
        return "--rollout-engine-batch-size", "lower it, so that fewer sequences are decoded together"
    if largest in ("activations", "loss", "forward pass", "hidden states", "logits"):
        return "--micro-batch-size" if job == "student" else "--max-tokens-per-batch", "lower it"
    if largest == "teacher weights":
        return "--tensor-model-parallel-size", "raise it, or give the teacher a job of its own (section teacher)"
    return "--tensor-model-parallel-size", "raise it or --pipeline-model-parallel-size"


def _describe(architecture: Architecture) -> str:
    return (
        f"{architecture.num_layers} layers, hidden size {architecture.hidden_size}, "
        f"{architecture.num_attention_heads} heads"
    )


def _layout(parallel: ParallelConfig) -> str:
    return f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}"
