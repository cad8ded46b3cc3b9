"""All checks of one run file, in the order in which a user would meet their failures.

All but the bias take seconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_simct.alignment import AlignmentMap
from megatron_simct.alignment.coverage import Coverage
from megatron_simct.alignment.map_files import placement_balance
from megatron_simct.config.options import AttentionBackend, ModelConfig, ParallelConfig, TeacherConfig
from megatron_simct.config.run_file import Job, JobSize, RunFile
from megatron_simct.data.prompts import PromptSource, Row, read_prompts
from megatron_simct.loading import (
    describe_teacher,
    open_alignment_map,
    open_chat_template,
    open_held_out,
    open_tokenizer,
)
from megatron_simct.losses import check_config, check_has_units, teacher_needs
from megatron_simct.models.build import check_divides, layers_of_stages, padded_vocab_size
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.formats import folder_format
from megatron_simct.models.head import Head
from megatron_simct.models.kernels import check_backend, describe, uses_math
from megatron_simct.models.layers import Layer
from megatron_simct.models.lora import adapter_parameters
from megatron_simct.models.tensor_files import find_weights
from megatron_simct.parallel.initialize import check_layout
from megatron_simct.preflight import pair
from megatron_simct.preflight.bias import Bias
from megatron_simct.preflight.cluster import check_cluster
from megatron_simct.preflight.engines import check_engines
from megatron_simct.preflight.findings import Finding, failed, passed, warned
from megatron_simct.preflight.memory import (
    GIB,
    MemoryPlan,
    Sizes,
    as_gib,
    size_text,
    student_plan,
    teacher_plan,
    total_parameters,
)
from megatron_simct.preflight.stages import (
    even_stages,
    layer_operations,
    layout_text,
    loss_operations,
    unevenness,
)
from megatron_simct.preflight.traffic import Traffic, step_traffic
from megatron_simct.reporting.writers import check_writers
from megatron_simct.update.checkpoint import has_checkpoint
from megatron_simct.update.support import check_support

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
    bias: Bias | None = None
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
            "bias_nats_a_word": None if self.bias is None else self.bias.as_json(),
            "prompts": self.prompts,
        }


def check_run(run: RunFile, *, device_memory_gib: float | None = None, bias: bool = False) -> Report:
    """Every check that the file allows. User errors are returned as findings, not raised.

    device_memory_gib goes before cluster.device_memory_gib. bias: measure the loss of a student that is
    already right, which takes some seconds, for large vocabularies up to a minute.
    """
    return _Check(run, device_memory_gib or run.cluster.device_memory_gib, bias=bias).report()


class _Check:
    """Collects findings; a check whose input another one has refused is left out."""

    def __init__(self, run: RunFile, device_memory_gib: float | None, *, bias: bool) -> None:
        self._run = run
        self._wants_bias = bias
        self._device_memory_gib = device_memory_gib
        self._findings: list[Finding] = []
        config = self._config = run.config
        self._jobs = {job.name: (job, run.teacher_configs[job.name]) for job in run.of_kind("teacher")}
        """Teachers in jobs of their own."""
        self._flags = dict(zip(self._jobs, ("teacher-", "second-teacher-"), strict=False))
        self._flags |= {"student": ""} | ({} if self._jobs else {"teacher": "teacher-"})
        """Prefix of each model's flags in the student's command."""
        self._teacher_job = next((config for _, config in self._jobs.values()), None)
        self._colocated = not config.teacher_job.endpoint and config.rollout.load_debug_scored_data is None
        self._needs_teacher = config.needs_teacher
        self._sides: dict[str, pair.Side] = {}
        self._sound: set[str] = set()
        """Jobs whose options have a meaning: of the others there is neither layout nor plan."""
        self._undivided: set[str] = set()
        """Models whose layout does not divide them: they have no memory plan."""

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
            first, *others = self._jobs or ["teacher"]
            teacher = self._side(first, self._config.teacher)
            for name in others:
                self._side(name, self._config.second_teacher)
        elif self._jobs:
            message = (
                f"--simct-interface {self._config.interface.interface} uses no teacher; leave out the "
                "teachers' jobs"
            )
            findings.append(failed(next(iter(self._jobs)), "interface", message))
        findings += check_engines(self._run, self._device_memory_gib)
        if student is None or (teacher is None and self._needs_teacher):
            return Report(findings=findings)
        rows = self._rows(student, teacher)
        coverage, alignment_map, bias = None, None, None
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
            interface = self._config.interface
            if self._wants_bias:
                bias = self._try(
                    "pair", "bias", lambda: pair.bias_of(rows, interface, student=student, teacher=teacher)
                )
            if bias is not None:
                findings += pair.check_bias(bias, interface)
        findings += self._lengths(student, teacher, coverage)
        average = self._config.teacher_job.ema
        if average is not None and teacher is not None and teacher.architecture != student.architecture:
            said = (
                f"{average}: teacher and student must have the same architecture, but "
                "--teacher-hf-checkpoint "
                "has another"
            )
            findings.append(failed("teacher", "weights", said, flag="--teacher-ema"))
        plans = self._memory(student, teacher, alignment_map)
        traffic = self._traffic(teacher, coverage) if teacher is not None else None
        prompts = pair.side_by_side(student, teacher, rows[0]) if rows else {}
        return Report(
            findings=findings, plans=plans, traffic=traffic, coverage=coverage, bias=bias, prompts=prompts
        )

    def _options(self) -> None:
        """What the options say by themselves."""
        config, student = self._config, self._run.student

        def check() -> int:
            check_layout(config.parallel, student.world_size)
            parallel = config.parallel
            data_parallel_size = student.world_size // parallel.model_parallel_size
            config.check(data_parallel_size=data_parallel_size)
            check_config(config.interface, context_parallel_size=config.parallel.context_parallel_size)
            if config.output.gradient_parts_interval:
                check_has_units(config.interface, flag="--gradient-parts-interval")
            if self._run.cluster.container is None:
                check_writers(config.output)
            return data_parallel_size

        size = self._try("student", "options", check)
        if size is not None:
            self._sound.add("student")
            batches = config.global_batch_size // (config.training.micro_batch_size * size)
            cut = f"in {batches} micro-batches"
            if config.training.max_tokens_per_gpu is not None:
                cut = f"in micro-batches of at most {config.training.max_tokens_per_gpu:,} tokens"
            said = f"data-parallel size {size}, {config.global_batch_size} sequences a step {cut}"
            self._findings.append(passed("student", "options", said))
        output = config.output
        if output.load is not None and output.load != output.save and not has_checkpoint(output.load):
            message = f"--load {output.load}: no checkpoint there, and it is not the directory of --save"
            self._findings.append(failed("student", "resuming", message))
        for name, (job, teacher) in self._jobs.items():
            if self._try(name, "options", partial(_check_teacher_job, teacher, job.world_size)):
                self._sound.add(name)

    def _divides(
        self, name: str, architecture: Architecture, parallel: ParallelConfig, where: str, flag: str
    ) -> None:
        """One layout of one model."""

        def divides() -> bool:
            check_divides(architecture, parallel, flag=f"--{flag}hf-checkpoint")
            return True

        if not self._try(name, "layout", divides, lambda _: f"{where}{_layout(parallel)} divides the model"):
            self._undivided.add(name)

    def _side(self, name: str, model: ModelConfig) -> pair.Side | None:
        """One model: its architecture in its layout, its weights, its tokenizer and template."""
        flag = self._flags[name]
        folder = model.hf_checkpoint
        if folder is None:
            return None  # said by the options
        read = describe_teacher if self._has_engine(name) else read_architecture
        architecture = self._try(
            name, "family", lambda: read(folder, flag=f"--{flag}hf-checkpoint"), _describe
        )
        if isinstance(architecture, Architecture):
            for parallel, where in self._layouts(name):
                self._divides(name, architecture, parallel, where, flag)
                self._attention(name, architecture, parallel, f"--{flag}hf-checkpoint {folder}")
                if name == "student":
                    self._supports(architecture, parallel, f"--hf-checkpoint {folder}")
        self._weights(name, folder, model, flag, architecture)
        tokenizer = self._try(
            name, "tokenizer", lambda: open_tokenizer(model, prefix=flag), lambda found: found.name
        )
        for note in tokenizer.notes if tokenizer is not None else ():
            self._findings.append(warned(name, "tokenizer", note, flag=f"--{flag}tokenizer-model"))
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
        side = pair.Side(
            name=name, flag=flag, folder=folder, architecture=architecture, tokenizer=tokenizer, chat=chat
        )
        self._findings += pair.check_vocabulary(side)
        try:
            self._findings += pair.check_stop_tokens(side)
        except ValueError as error:  # a template without an end
            self._findings.append(failed(name, "chat template", str(error), flag=f"--{flag}hf-checkpoint"))
            return None
        self._sides[name] = side
        return side

    def _supports(self, architecture: Architecture, parallel: ParallelConfig, flag: str) -> None:
        """The options of the update, for the student."""
        on_gpu = self._run.student.gpus_per_node > 0
        try:
            check_support(self._config.update, parallel, architecture, transformer_engine=on_gpu, flag=flag)
        except ValueError as error:
            self._findings.append(failed("student", "options", str(error)))

    def _attention(self, name: str, architecture: Architecture, parallel: ParallelConfig, flag: str) -> None:
        """The kernels of a model's attention."""
        if name in self._jobs:
            job, teacher = self._jobs[name]
            backend, bf16 = teacher.serving.attention_backend, teacher.serving.bf16
        else:
            job, training = self._run.student, self._config.training
            backend, bf16 = training.attention_backend, training.bf16
        on_gpu = job.gpus_per_node > 0
        rollout = self._config.rollout
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
            self._findings.append(failed(name, "attention", str(error)))
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
            self._findings.append(failed(name, "attention", message, flag="--attention-backend"))
        else:
            self._findings.append(passed(name, "attention", f"{flag}: {said}"))

    def _layouts(self, name: str) -> Iterator[tuple[ParallelConfig, str]]:
        """Every layout that the model is built in, where it is one."""
        if name in self._jobs:
            if name in self._sound and not self._has_engine(name):
                yield self._jobs[name][1].parallel, ""
        elif "student" in self._sound and (name == "student" or self._colocated):
            if name == "student":
                yield self._config.parallel, ""
            else:
                yield self._config.parallel.for_teacher, "on the student's ranks, "

    def _has_engine(self, name: str) -> bool:
        """Whether an engine computes the hidden states of this model."""
        return name in self._jobs and bool(self._jobs[name][1].engine.endpoint)

    def _weights(
        self, name: str, folder: str, model: ModelConfig, flag: str, architecture: Architecture | Head | None
    ) -> None:
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
        if found is not None and isinstance(architecture, Architecture) and not self._has_engine(name):
            self._quantised(name, found, flag, architecture)
        if found is None and name in self._jobs:
            message = (
                f"--{flag}hf-checkpoint {folder} has no safetensors files, but a teacher needs weights; give "
                "a folder with weights, or"
            )
            self._findings.append(failed(name, "weights", f"{message} --{flag}pretrained-checkpoint"))
        elif found is None and name == "student" and self._config.terms.reference_kl_weight:
            message = f"{folder} has no safetensors, and --reference-kl-weight keeps the student near weights"
            self._findings.append(failed(name, "weights", message, flag="--reference-kl-weight"))
        elif found is None:
            message = f"{folder} has no safetensors files: the student would start from random weights"
            self._findings.append(warned(name, "weights", message, flag=f"--{flag}hf-checkpoint"))

    def _quantised(self, name: str, weights: Path, flag: str, architecture: Architecture) -> None:
        """What quantised weights take in files and in memory, where the plan counts them as what they
        become.
        """
        label = folder_format(str(weights.parent), flag=f"--{flag}hf-checkpoint")
        if label is None:
            return
        files = weights.parent.glob("*.safetensors") if weights.suffix == ".json" else [weights]
        in_files = sum(path.stat().st_size for path in files)
        job = self._jobs[name][1] if name in self._jobs else None
        bf16 = self._config.training.bf16 if job is None else job.serving.bf16
        parameters = total_parameters(architecture, vocab_size=architecture.vocab_size)
        said = (
            f"{label.label}, {size_text(in_files)} in files; {size_text(parameters * (2 if bf16 else 4))} of "
            f"{'bfloat16' if bf16 else 'float32'} in memory, over the ranks of one replica"
        )
        if name == "student":
            said += "; the student is trained and saved without quantisation"
            self._findings.append(warned(name, "weights", said, flag="--hf-checkpoint"))
        else:
            self._findings.append(passed(name, "weights", said))

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
                need_response=config.interface.interface == "sft" and config.data.simct_on == "sampled",
                need_label=False,
                transcripts=config.data.simct_on == "given",
            ),
        )
        if config.data.eval_prompt_data is not None:
            self._try("pair", "prompts", lambda: open_held_out(config))
        if rows is None:
            return []
        share = config.terms.given_share
        if share is not None:
            count = sum(row.response is not None for row in rows)
            said = f"--given-share {share}: {count} of {len(rows)} rows of --prompt-data have a response"
            finding = passed if count else failed
            self._findings.append(finding("student", "prompts", said))
        looked_at = rows[:: max(1, len(rows) // pair.MAX_TEXTS)]
        try:
            templates = pair.check_templates(
                student, teacher, looked_at, chat=config.data.apply_chat_template
            )
            source = PromptSource(
                looked_at,
                student=student.tokenizer,
                batch_size=None,
                samples_per_prompt=1,
                max_prompt_len=config.rollout.rollout_max_prompt_len,
                shuffle=False,
                seed=0,
                dp_rank=0,
                dp_size=1,
                flag="--prompt-data",
                student_chat=student.chat,
                teachers=[] if teacher is None else [(teacher.tokenizer, teacher.chat)],
                max_response_len=config.rollout.rollout_max_response_len,
            )
        except ValueError as error:
            message = str(error)
            flag = (
                "--rollout-max-prompt-len" if "all " in message and "exceed" in message else "--prompt-data"
            )
            self._findings.append(failed("pair", "prompts", message, flag=flag))
            return []
        self._findings += templates
        share = source.num_skipped / len(looked_at)
        said = f"{len(rows):,} prompts; {share:.1%} of the {len(looked_at)} checked are too long and left out"
        if source.num_masked:
            said += f"; {source.num_masked} have no answer that every chat template writes, and are left out"
        own = sum(row.teacher_prompt is not None for row in rows)
        if own and teacher is not None:
            said += f"; in {own:,} rows the teacher has its own prompt"
        if share > pair.SKIPPED_WARN:
            self._findings.append(warned("pair", "prompts", said, flag="--rollout-max-prompt-len"))
        else:
            self._findings.append(passed("pair", "prompts", said))
        return rows

    def _lengths(
        self, student: pair.Side, teacher: pair.Side | None, coverage: Coverage | None
    ) -> list[Finding]:
        rollout = self._config.rollout
        lengths = {
            "prompt_len": rollout.rollout_max_prompt_len,
            "response_len": rollout.rollout_max_response_len,
        }
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
        plans: dict[str, MemoryPlan] = {}
        on_its_ranks = {"student", "teacher"} if self._colocated else {"student"}
        if "student" in self._sound and not self._undivided & on_its_ranks:
            plans["student"] = self._student_plan(student, teacher, alignment_map)
            self._fits("student", plans["student"], self._run.student)
            self._propose_stages(student, teacher, alignment_map)
            if self._device_memory_gib is not None:
                self._propose(student, teacher, alignment_map, self._device_memory_gib)
        for name, (job, teacher_config) in self._jobs.items():
            if name in self._sides and name in self._sound - self._undivided and not self._has_engine(name):
                plans[name] = self._teacher_plan(self._sides[name], job, teacher_config)
                self._fits(name, plans[name], job)
        return plans

    def _propose(
        self, student: pair.Side, teacher: pair.Side | None, alignment_map: AlignmentMap | None, device: float
    ) -> None:
        """What would fit too, and be faster: more sequences decoded together, less tensor parallelism."""
        config, world_size = self._config, self._run.student.world_size
        parallel = config.parallel

        def fits(**changes: Any) -> bool:
            return (
                self._student_plan(student, teacher, alignment_map, **changes).peak
                <= MEMORY_WARN * device * GIB
            )

        ranks = parallel.model_parallel_size
        share = -(-config.global_batch_size * ranks // world_size)
        asked = best = min(config.rollout.rollout_engine_batch_size, share)
        while best < share and fits(engine_batch_size=min(2 * best, share)):
            best = min(2 * best, share)
        if best > asked and self._needs_teacher:
            said = (
                f"--rollout-engine-batch-size {best} would also fit, instead of {asked}: fewer rounds of "
                "decoding"
            )
            self._findings.append(passed("student", "proposal", said))
        tp = 1
        while tp < parallel.tensor_model_parallel_size:
            less = replace(
                parallel,
                tensor_model_parallel_size=tp,
                sequence_parallel=parallel.sequence_parallel and tp > 1,
            )
            if self._can_run(student, less) and fits(parallel=less):
                said = (
                    f"--tensor-model-parallel-size {tp} would also fit, instead of "
                    f"{parallel.tensor_model_parallel_size}"
                )
                self._findings.append(passed("student", "proposal", said))
                return
            tp *= 2

    def _propose_stages(
        self, student: pair.Side, teacher: pair.Side | None, alignment_map: AlignmentMap | None
    ) -> None:
        """Other layers for the pipeline stages, where one of them has much more to do than the others."""
        config, parallel = self._config, self._config.parallel
        pp, architecture = parallel.pipeline_model_parallel_size, _known(student.architecture)
        if (
            pp == 1
            or parallel.num_virtual_stages_per_pipeline_rank > 1
            or not self._can_run(student, parallel)
        ):
            return
        rollout, needs = config.rollout, teacher_needs(config.interface)
        costs = [
            layer_operations(
                layer,
                hidden_size=architecture.hidden_size,
                tokens=rollout.rollout_max_prompt_len + rollout.rollout_max_response_len,
                computed_again=config.update.recompute_granularity == "full",
            )
            for layer in architecture.layers
        ]
        sends_rows = alignment_map is not None and needs.hidden_rows != "none" and not needs.topk
        last = loss_operations(
            hidden_size=architecture.hidden_size,
            vocab_size=architecture.vocab_size,
            teacher_rows=alignment_map.teacher_vocab_size if alignment_map is not None and sends_rows else 0,
            teacher_hidden_size=0 if teacher is None else teacher.architecture.hidden_size,
            labels=rollout.rollout_max_response_len,
        )
        layers = even_stages(costs, last=last, stages=pp)
        now = unevenness(layers_of_stages(architecture, parallel), costs, last=last)
        then = unevenness(layers, costs, last=last)
        if now > 1.05 * then:
            text = layout_text(layers)
            fitting = replace(parallel.for_teacher, pipeline_model_parallel_layout=text)
            plan = self._student_plan(student, teacher, alignment_map, parallel=fitting)
            device = self._device_memory_gib
            if self._can_run(student, fitting) and (
                device is None or plan.peak <= MEMORY_WARN * device * GIB
            ):
                said = (
                    f"--pipeline-model-parallel-layout '{text}' would balance the stages: the stage with the "
                    f"most work has {then:.2f} times the mean of the matrix products, instead of {now:.2f} "
                    "(the last has the loss)"
                )
                self._findings.append(passed("student", "proposal", said))

    def _can_run(self, student: pair.Side, parallel: ParallelConfig) -> bool:
        """Whether the student and its batch divide over a layout."""
        world_size = self._run.student.world_size
        try:
            check_layout(parallel, world_size)
            check_divides(_known(student.architecture), parallel, flag="")
            replicas = world_size // parallel.model_parallel_size
            replace(self._config, parallel=parallel).check(data_parallel_size=replicas)
        except ValueError:
            return False
        return True

    def _student_plan(
        self,
        student: pair.Side,
        teacher: pair.Side | None,
        alignment_map: AlignmentMap | None,
        *,
        parallel: ParallelConfig | None = None,
        engine_batch_size: int | None = None,
    ) -> MemoryPlan:
        """parallel, engine_batch_size: in the place of those of the run."""
        config, job = self._config, self._run.student
        parallel, rollout = parallel or config.parallel, config.rollout
        sizes_of = partial(
            self._sizes, bf16=config.training.bf16, attention_backend=config.training.attention_backend
        )
        sizes = sizes_of(student, config.model, parallel)
        data_parallel_size = max(1, job.world_size // parallel.model_parallel_size)
        share = -(-config.global_batch_size // data_parallel_size)
        # What a rank has of a micro-batch, and of a step, in sequences.
        context = parallel.context_parallel_size
        sequences, of_step = config.training.micro_batch_size / context, share / context
        if config.training.max_tokens_per_gpu is not None:
            longest = rollout.rollout_max_prompt_len + rollout.rollout_max_response_len
            sequences = max(1.0 / context, config.training.max_tokens_per_gpu / longest)
        needs = teacher_needs(config.interface)
        rows = 0
        if alignment_map is not None and needs.hidden_rows != "none" and not needs.topk:
            tp = parallel.tensor_model_parallel_size
            rows = round(placement_balance(alignment_map, (tp,))[tp] * alignment_map.teacher_vocab_size / tp)
        return student_plan(
            sizes,
            optimizer=config.training.optimizer,
            micro_batch_size=min(sequences, of_step),
            num_micro_batches=max(1, int(of_step / sequences)),
            engine_batch_size=min(engine_batch_size or rollout.rollout_engine_batch_size, math.ceil(of_step)),
            update=config.update,
            data_parallel_size=data_parallel_size,
            prompt_len=rollout.rollout_max_prompt_len,
            response_len=rollout.rollout_max_response_len,
            loss_memory=config.interface.loss_memory_mib << 20,
            trains_on_given=not config.samples,
            on_gpu=job.gpus_per_node > 0,
            teacher=(
                sizes_of(teacher, config.teacher, parallel.for_teacher)
                if self._colocated and teacher is not None
                else None
            ),
            shared_rows=rows,
            teacher_hidden_size=0 if teacher is None else teacher.architecture.hidden_size,
            adapters=self._adapters(student),
            averages_teacher=config.teacher_job.ema is not None,
            keeps_start=config.terms.reference_kl_weight > 0,
        )

    def _adapters(self, student: pair.Side) -> dict[Layer, int] | None:
        """Numbers of each layer's adapters, if these are what is trained."""
        if not self._config.lora.rank:
            return None
        return self._try(
            "student",
            "adapters",
            lambda: adapter_parameters(
                _known(student.architecture),
                self._config.lora,
                tp_size=self._config.parallel.tensor_model_parallel_size,
                flag=f"--hf-checkpoint {student.folder}",
            ),
        )

    def _teacher_plan(self, teacher: pair.Side, job: Job, config: TeacherConfig) -> MemoryPlan:
        length = self._config.rollout.rollout_max_prompt_len + self._config.rollout.rollout_max_response_len
        return teacher_plan(
            self._sizes(
                teacher,
                config.teacher,
                config.parallel,
                bf16=config.serving.bf16,
                attention_backend=config.serving.attention_backend,
            ),
            tokens=config.serving.max_tokens_per_batch,
            length=min(length, config.serving.max_tokens_per_batch),
            on_gpu=job.gpus_per_node > 0,
        )

    @staticmethod
    def _sizes(
        side: pair.Side,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        bf16: bool,
        attention_backend: AttentionBackend,
    ) -> Sizes:
        rows = padded_vocab_size(
            side.architecture.vocab_size,
            divisible_by=model.make_vocab_size_divisible_by,
            tp_size=parallel.tensor_model_parallel_size,
        )
        return Sizes(
            architecture=_known(side.architecture),
            parallel=parallel,
            vocab_size=rows,
            bf16=bf16,
            attention_backend=attention_backend,
        )

    def _fits(self, job: str, plan: MemoryPlan, size: JobSize) -> None:
        device, peak = self._device_memory_gib, plan.peak / GIB
        parts = plan.held | plan.phases[plan.peak_phase]
        largest = max(parts, key=lambda name: parts[name])
        said = (
            f"{size_text(plan.peak)} a rank, in {plan.peak_phase}; the largest part is {largest} "
            f"({size_text(parts[largest])})"
        )
        if device is None:
            if size.gpus_per_node:
                message = f"{said}; GPU memory is not configured, so the plan was not checked against it"
                self._findings.append(warned(job, "memory", message, flag="--device-memory"))
            else:
                self._findings.append(passed(job, "memory", said))
            return
        if peak > device:
            flag, change = _remedy(job, plan, largest)
            self._findings.append(
                failed(job, "memory", f"{said}; a GPU has {device:g} GiB: {change}", flag=flag)
            )
        elif peak > MEMORY_WARN * device:
            flag, change = _remedy(job, plan, largest)
            self._findings.append(warned(job, "memory", f"{said}, of {device:g} GiB: almost full", flag=flag))
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
            f"at most {size_text(traffic.requests)} to the teacher and {size_text(traffic.answers)} back a "
            f"step; full logits would be {size_text(traffic.logits)}"
        )
        self._findings.append(passed("pair", "traffic", said))
        return traffic


def _check_shards(index: Path, *, flag: str) -> None:
    """ValueError where a file of the index is missing, as after a download that was cut off."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{flag} {index.parent}: {index.name} is damaged; download the folder again"
        ) from None
    missing = sorted(name for name in names if not (index.parent / name).exists())
    if missing:
        raise ValueError(
            f"{flag} {index.parent}: {len(missing)} of {len(names)} weight files are missing, such as "
            f"{missing[0]}; download the folder again"
        )


def _remedy(job: str, plan: MemoryPlan, largest: str) -> tuple[str, str]:
    """The flag of the job that lowers the largest part, and what to do with it."""
    if largest == "KV cache" or plan.peak_phase == "rollout" and largest == "forward pass":
        return "--rollout-engine-batch-size", "lower it, so that fewer sequences are decoded together"
    if largest == "activations" and job == "student":
        return "--micro-batch-size", "lower it, or add --recompute-granularity full"
    if largest in ("activations", "loss", "forward pass", "hidden states", "logits"):
        return "--micro-batch-size" if job == "student" else "--max-tokens-per-batch", "lower it"
    if largest == "start's hidden states":
        return "--rollout-batch-size", "lower it"
    if largest == "teacher weights":
        return (
            "--tensor-model-parallel-size",
            "raise it, or run the teacher in its own job (section teacher)",
        )
    more = ", or add --use-distributed-optimizer" if largest == "optimizer" else ""
    return "--tensor-model-parallel-size", f"raise it or --pipeline-model-parallel-size{more}"


def _known(architecture: Architecture | Head) -> Architecture:
    assert isinstance(architecture, Architecture), "only models of a known family are built here"
    return architecture


def _check_teacher_job(config: TeacherConfig, world_size: int) -> bool:
    check_layout(config.parallel, world_size)
    config.check()
    return True


def _describe(architecture: Architecture | Head) -> str:
    if isinstance(architecture, Head):
        return f"run by the engine; LM head {architecture.tensor}, hidden size {architecture.hidden_size}"
    heads = architecture.layers[0].attention.heads
    return f"{architecture.num_layers} layers, hidden size {architecture.hidden_size}, {heads} heads"


def _layout(parallel: ParallelConfig) -> str:
    context = f" x CP{parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else ""
    return f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}{context}"
