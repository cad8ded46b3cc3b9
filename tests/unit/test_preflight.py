"""Findings of the pre-flight, one misconfiguration after another; a right configuration has none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_simct.commands import check_pair
from megatron_simct.config.options import ParallelConfig
from megatron_simct.config.run_file import read_run_file
from megatron_simct.loading import open_pair
from megatron_simct.models.families import read_architecture
from megatron_simct.preflight.check import check_run
from megatron_simct.preflight.findings import Finding
from megatron_simct.preflight.memory import (
    GIB,
    Sizes,
    size_text,
    student_plan,
    teacher_plan,
    total_parameters,
)
from tests.examples import CONFIGS, PARAMETERS, stand_in
from tests.preflight import build_pair, edit_json, run_values, write_json, write_run

ROOT = Path(__file__).parents[2]
Change = Callable[[dict[str, Any], Path], None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    build_pair(folder)
    return folder


@pytest.fixture
def folder(pair, tmp_path) -> Path:
    """A copy that a test may damage."""
    copied = tmp_path / "pair"
    shutil.copytree(pair, copied)
    return copied


def findings(folder: Path, change: Change | None = None) -> list[Finding]:
    return check_run(read_run_file(str(write_run(folder, change)))).findings


def test_nothing_is_wrong_with_the_pair_itself(folder) -> None:
    found = findings(folder)
    # the tests' folder is node-local
    problems = [f for f in found if f.level != "pass" and f.flag != "run_dir"]
    assert problems == []
    assert {f.side for f in found} == {"student", "teacher", "pair", "cluster"}


def test_quantised_weights_are_said_with_their_bytes_in_files_and_in_memory(folder) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for side, level, dtype in (("teacher", "pass", "bfloat16"), ("student", "warn", "bfloat16")):
        edit_json(folder / side / "config.json", quantization_config=settings)
        architecture = read_architecture(str(folder / side), flag="")
        memory = 2 * total_parameters(architecture, vocab_size=architecture.vocab_size)
        (found,) = [
            f for f in findings(folder) if f.side == side and "fp8 in blocks of 128 x 128" in f.message
        ]
        assert found.level == level
        in_files = (folder / side / "model.safetensors").stat().st_size
        assert f"{size_text(in_files)} in files; {size_text(memory)} of {dtype} in memory" in found.message


def test_the_plan_of_a_student_with_adapters_has_gradients_and_optimizer_for_these_alone(folder) -> None:
    whole = check_run(read_run_file(str(write_run(folder)))).plans["student"]
    adapted = check_run(read_run_file(str(write_run(folder, student(lora_rank=2))))).plans["student"]
    more = adapted.held["weights"] - whole.held["weights"]
    assert 0 < more < whole.held["weights"] / 4
    assert adapted.held["gradients"] == 2 * more  # float32 beside bfloat16
    assert adapted.held["optimizer"] == 6 * more
    wrong = findings(folder, student(lora_rank=2, lora_target_modules=["q_prj"]))
    assert any("--lora-target-modules q_prj" in f.message and f.level == "fail" for f in wrong)


def test_layers_are_proposed_for_stages_where_the_head_weighs_much(folder) -> None:
    two = student(pipeline_model_parallel_size=2)
    said = [
        f.message
        for f in findings(folder, both(two, config("student", vocab_size=3000)))
        if f.check == "proposal"
    ]
    assert any("--pipeline-model-parallel-layout 'Et*3|tL' would balance the stages" in text for text in said)
    given = both(two, student(pipeline_model_parallel_layout="Et*3|tL"))
    for change in (
        both(given, config("student", vocab_size=3000)),
        both(two, config("student", vocab_size=400)),
    ):
        assert not any("balance the stages" in finding.message for finding in findings(folder, change))


def student(**values: Any) -> Change:
    return lambda run, folder: run["student"].update(values)


def teacher(**values: Any) -> Change:
    return lambda run, folder: run["teacher"].update(values)


def cluster(job: str | None = None, **values: Any) -> Change:
    return lambda run, folder: (run["cluster"] if job is None else run["cluster"][job]).update(values)


def colocated(run: dict[str, Any], folder: Path) -> None:
    run["student"]["teacher_hf_checkpoint"] = run.pop("teacher")["teacher_hf_checkpoint"]


def config(side: str, **values: Any) -> Change:
    return lambda run, folder: edit_json(folder / side / "config.json", **values)


def prompts(*rows: dict[str, Any]) -> Change:
    return lambda run, folder: (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
    )


def both(*changes: Change) -> Change:
    def apply(run: dict[str, Any], folder: Path) -> None:
        for change in changes:
            change(run, folder)

    return apply


def remove(name: str) -> Change:
    return lambda run, folder: (folder / name).unlink()


def template(side: str, text: str | None) -> Change:
    def apply(run: dict[str, Any], folder: Path) -> None:
        (folder / side / "chat_template.jinja").unlink(missing_ok=True)
        edit_json(folder / side / "tokenizer_config.json", chat_template=text)

    return apply


def single_digits(side: str) -> Change:
    def apply(run: dict[str, Any], folder: Path) -> None:
        path = folder / side / "tokenizer.json"
        text = path.read_text()
        assert r"\\p{N}{1,3}" in text
        path.write_text(text.replace(r"\\p{N}{1,3}", r"\\p{N}"))

    return apply


def index(side: str, *names: str) -> Change:
    def apply(run: dict[str, Any], folder: Path) -> None:
        (folder / side / "model.safetensors").rename(folder / side / names[0])
        weights = {f"tensor{i}": name for i, name in enumerate(names)}
        write_json(folder / side / "model.safetensors.index.json", {"weight_map": weights})

    return apply


def image(runtime: str, **values: Any) -> Change:
    def apply(run: dict[str, Any], folder: Path) -> None:
        container = {"runtime": runtime, "image": "registry#simct:1", "mounts": [f"{folder}:{folder}"]}
        run["cluster"]["container"] = container | values

    return apply


@dataclass(frozen=True, kw_only=True)
class Case:
    """One change to a run that works, and the finding that it must cause."""

    what: str
    change: Change
    flag: str
    words: tuple[str, ...]
    """Parts of the message."""
    side: str | None = None
    """The finding's side; None: any."""

    def is_found(self, finding: Finding) -> bool:
        """Whether a finding is the expected one."""
        return (
            finding.flag == self.flag
            and self.side in (None, finding.side)
            and all(words in finding.message for words in self.words)
        )


def name_of(case: Case) -> str:
    return case.what


LOSSY = {"normalizer": {"type": "NFKC"}}
USER = {"role": "user", "content": "How many?"}
WRONG = [
    Case(
        what="student: world size is not a multiple of the model-parallel size",
        change=student(tensor_model_parallel_size=3),
        side="student",
        flag="--tensor-model-parallel-size",
        words=("world size (4)", "3"),
    ),
    Case(
        what="student: tensor parallelism does not divide the heads",
        change=both(
            config("student", num_attention_heads=6, num_key_value_heads=2),
            student(tensor_model_parallel_size=4),
        ),
        side="student",
        flag="--tensor-model-parallel-size",
        words=("num_attention_heads (6)",),
    ),
    Case(
        what="student: tensor parallelism does not divide the query groups",
        change=both(
            config("student", num_key_value_heads=3, num_attention_heads=12, head_dim=8),
            student(tensor_model_parallel_size=2),
        ),
        side="student",
        flag="--tensor-model-parallel-size",
        words=("num_query_groups (3)",),
    ),
    Case(
        what="more stages than layers",
        change=both(config("student", num_hidden_layers=1), student(pipeline_model_parallel_size=2)),
        side="student",
        flag="--pipeline-model-parallel-size",
        words=("num_layers (1)",),
    ),
    Case(
        what="virtual stages do not divide the layers",
        change=both(
            config("student", num_hidden_layers=6),
            student(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2),
        ),
        side="student",
        flag="--pipeline-model-parallel-size",
        words=("num_layers (6)", "--num-virtual-stages-per-pipeline-rank 2"),
    ),
    Case(
        what="virtual stages without pipeline stages",
        change=student(num_virtual_stages_per_pipeline_rank=2),
        side="student",
        flag="--num-virtual-stages-per-pipeline-rank",
        words=("--pipeline-model-parallel-size is 1",),
    ),
    Case(
        what="sequence parallelism with one tensor-parallel rank",
        change=student(tensor_model_parallel_size=1, sequence_parallel=True),
        side="student",
        flag="--sequence-parallel",
        words=("--tensor-model-parallel-size is 1",),
    ),
    Case(
        what="world size is not a multiple of the context-parallel size",
        change=student(context_parallel_size=3),
        side="student",
        flag="--tensor-model-parallel-size",
        words=("--context-parallel-size (3)",),
    ),
    Case(
        what="expert parallelism does not divide the data-parallel size",
        change=teacher(expert_model_parallel_size=4),
        side="teacher",
        flag="--expert-model-parallel-size",
        words=("data-parallel size",),
    ),
    Case(
        what="batch does not divide into micro-batches",
        change=student(rollout_batch_size=18),
        side="student",
        flag="--micro-batch-size",
        words=("18", "use a --rollout-batch-size"),
    ),
    Case(
        what="global batch size differs from prompts x samples",
        change=student(global_batch_size=8),
        side="student",
        flag="--global-batch-size",
        words=("must equal",),
    ),
    Case(
        what="micro-batch size 0",
        change=student(micro_batch_size=0),
        side="student",
        flag="--micro-batch-size",
        words=("at least 1",),
    ),
    Case(
        what="tensor-parallel size 0",
        change=student(tensor_model_parallel_size=0),
        side="student",
        flag="--tensor-model-parallel-size",
        words=("at least 1",),
    ),
    Case(
        what="vocabulary padding 0",
        change=student(make_vocab_size_divisible_by=0),
        side="student",
        flag="--make-vocab-size-divisible-by",
        words=("at least 1",),
    ),
    Case(
        what="teacher batch of 0 tokens",
        change=teacher(max_tokens_per_batch=0),
        side="teacher",
        flag="--max-tokens-per-batch",
        words=("at least 1",),
    ),
    Case(
        what="teacher: world size is not a multiple of the model-parallel size",
        change=teacher(tensor_model_parallel_size=3),
        side="teacher",
        flag="--tensor-model-parallel-size",
        words=("world size (8)",),
    ),
    Case(
        what="teacher: tensor parallelism does not divide the MLP",
        change=config("teacher", intermediate_size=127),
        side="teacher",
        flag="--tensor-model-parallel-size",
        words=("ffn_hidden_size (127)", "--teacher-hf-checkpoint"),
    ),
    Case(
        what="no student folder",
        change=student(hf_checkpoint="/nowhere"),
        side="student",
        flag="--hf-checkpoint",
        words=("/nowhere", "config.json"),
    ),
    Case(
        what="no teacher folder",
        change=teacher(teacher_hf_checkpoint="/nowhere"),
        side="teacher",
        flag="--teacher-hf-checkpoint",
        words=("/nowhere",),
    ),
    Case(
        what="unknown model family",
        change=config("teacher", model_type="mamba"),
        side="teacher",
        flag="--teacher-hf-checkpoint",
        words=("mamba", "llama"),
    ),
    Case(
        what="config.json field that is not implemented",
        change=config("student", rope_scaling={"type": "dynamic", "factor": 4}),
        side="student",
        flag="--hf-checkpoint",
        words=("dynamic",),
    ),
    Case(
        what="quantisation that is not supported",
        change=config("teacher", quantization_config={"quant_method": "gptq"}),
        side="teacher",
        flag="--teacher-hf-checkpoint",
        words=("gptq", "fp8", "16-bit"),
    ),
    Case(
        what="teacher without weights",
        change=remove("teacher/model.safetensors"),
        side="teacher",
        flag="--teacher-hf-checkpoint",
        words=("no safetensors", "--teacher-pretrained-checkpoint"),
    ),
    Case(
        what="incomplete download",
        change=index("teacher", "model-1.safetensors", "model-2.safetensors"),
        side="teacher",
        flag="--teacher-hf-checkpoint",
        words=("1 of 2", "model-2.safetensors"),
    ),
    Case(
        what="weights in another format",
        change=lambda run, folder: (folder / "student/model.safetensors").rename(
            folder / "student/pytorch_model.bin"
        ),
        side="student",
        flag="--hf-checkpoint",
        words=("pytorch_model.bin",),
    ),
    Case(
        what="no Megatron checkpoint to start from",
        change=student(pretrained_checkpoint="/nowhere"),
        side="student",
        flag="--pretrained-checkpoint",
        words=("/nowhere",),
    ),
    Case(
        what="no tokenizer",
        change=remove("student/tokenizer.json"),
        side="student",
        flag="--tokenizer-model",
        words=("no tokenizer",),
    ),
    Case(
        what="tokenizer that rewrites text",
        change=lambda run, folder: edit_json(folder / "teacher/tokenizer.json", **LOSSY),
        side="teacher",
        flag="--teacher-tokenizer-model",
        words=("tokenizer.json",),
    ),
    Case(
        what="tokenizer of another model",
        change=config("student", vocab_size=300),
        side="student",
        flag="--tokenizer-model",
        words=("320", "300"),
    ),
    Case(
        what="stop token outside the vocabulary",
        change=student(stop_token_ids=[4000]),
        side="student",
        flag="--tokenizer-model",
        words=("4000",),
    ),
    Case(
        what="stop token differs from the template's end of turn",
        change=student(stop_token_ids=[316]),
        side="student",
        flag="--stop-token-ids",
        words=("<|im_end|>", "318"),
    ),
    Case(
        what="no chat template",
        change=template("teacher", None),
        side="teacher",
        flag="--teacher-hf-checkpoint",
        words=("chat template",),
    ),
    Case(
        what="broken chat template",
        change=template("student", "{% if %}"),
        side="student",
        flag="--hf-checkpoint",
        words=("line 1",),
    ),
    Case(
        what="template with endless output",
        change=template("student", "{% for i in range(999) %}{{ 'a' * 99999 }}{% endfor %}"),
        side="student",
        flag="--hf-checkpoint",
        words=("tokenizer_config.json writes more than 16,777,216 characters",),
    ),
    Case(
        what="template argument that the template does not read",
        change=student(chat_template_kwargs={"enable_thinking": False}),
        side="student",
        flag="--chat-template-kwargs",
        words=("does not read enable_thinking",),
    ),
    Case(
        what="date in another format",
        change=student(chat_template_date="31.12.2025"),
        side="student",
        flag="--chat-template-date",
        words=("31.12",),
    ),
    Case(
        what="template arguments without --apply-chat-template",
        change=student(apply_chat_template=False, chat_template_kwargs="{}"),
        side="student",
        flag="--chat-template-kwargs",
        words=("needs --apply-chat-template",),
    ),
    Case(
        what="messages without --apply-chat-template",
        change=both(prompts({"messages": [USER]}), student(apply_chat_template=False)),
        side="pair",
        flag="--prompt-data",
        words=("line 1", "--apply-chat-template"),
    ),
    Case(
        what="plain prompts with template markers",
        change=both(
            prompts({"prompt": "<|im_start|>user\nHi<|im_end|>\n"}), student(apply_chat_template=False)
        ),
        side="pair",
        flag="--apply-chat-template",
        words=("<|im_start|>", "line 1"),
    ),
    Case(
        what="prompt that is rendered already",
        change=prompts({"prompt": "<|im_start|>user\nHi<|im_end|>\n"}),
        side="student",
        flag="--prompt-data",
        words=("rendered twice",),
    ),
    Case(
        what="template with two BOS tokens",
        change=template("teacher", "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}"),
        side="teacher",
        flag="--teacher-hf-checkpoint",
        words=("two beginning-of-sequence tokens",),
    ),
    Case(
        what="role that the teacher's template refuses",
        change=prompts({"messages": [{"role": "system", "content": "Be brief."}, USER]}),
        side="pair",
        flag="--prompt-data",
        words=("no role system", "--teacher-hf-checkpoint"),
    ),
    Case(
        what="no prompts",
        change=student(prompt_data="/nowhere.jsonl"),
        side="pair",
        flag="--prompt-data",
        words=("/nowhere.jsonl",),
    ),
    Case(
        what="prompts without the input key",
        change=student(input_key="question"),
        side="pair",
        flag="--prompt-data",
        words=("no question", "prompt, label"),
    ),
    Case(
        what="held-out prompts without labels",
        change=both(
            lambda run, folder: (folder / "held_out.jsonl").write_text('{"prompt": "a"}\n'),
            lambda run, folder: run["student"].update(eval_prompt_data=str(folder / "held_out.jsonl")),
        ),
        side="pair",
        flag="--eval-prompt-data",
        words=("no label",),
    ),
    Case(
        what="given rows without responses",
        change=student(given_share=0.5),
        side="student",
        flag="--given-share",
        words=("0 of 20 rows of --prompt-data have a response",),
    ),
    Case(
        what="a start without weights",
        change=lambda run, folder: (
            (folder / "student" / "model.safetensors").unlink(),
            student(reference_kl_weight=0.1)(run, folder),
        ),
        side="student",
        flag="--reference-kl-weight",
        words=("no safetensors",),
    ),
    Case(
        what="--teacher-ema with two architectures",
        change=lambda run, folder: (
            colocated(run, folder),
            edit_json(folder / "teacher" / "config.json", intermediate_size=256),
            student(teacher_ema=0.9)(run, folder),
        ),
        side="teacher",
        flag="--teacher-ema",
        words=("the same architecture",),
    ),
    Case(
        what="teacher suffix that is not a string",
        change=prompts({"prompt": "Hi", "teacher_suffix": 5}),
        side="pair",
        flag="--prompt-data",
        words=("line 1", "'teacher_suffix' is not a string"),
    ),
    Case(
        what="teacher prompt that is too long",
        change=prompts({"prompt": "Hi", "teacher_suffix": " ha" * 300}),
        side="pair",
        flag="--rollout-max-prompt-len",
        words=("exceed",),
    ),
    Case(
        what="teacher prompt with template markers",
        change=prompts({"prompt": "Hi", "teacher_prompt": "[INST]Hi[/INST]"}),
        side="teacher",
        flag="--prompt-data",
        words=("markers of a chat template",),
    ),
    Case(
        what="prompts too long",
        change=student(rollout_max_prompt_len=3),
        side="pair",
        flag="--rollout-max-prompt-len",
        words=("exceed",),
    ),
    Case(
        what="student: too few positions",
        change=student(rollout_max_response_len=400),
        side="student",
        flag="--rollout-max-response-len",
        words=("600", "512"),
    ),
    Case(
        what="teacher: too few positions",
        change=config("teacher", max_position_embeddings=256),
        side="teacher",
        flag="--rollout-max-response-len",
        words=("256",),
    ),
    Case(
        what="teacher batch smaller than a sample",
        change=teacher(max_tokens_per_batch=64),
        side="teacher",
        flag="--max-tokens-per-batch",
        words=("64", "refused"),
    ),
    Case(
        what="alignment map that does not exist",
        change=student(simct_alignment_map="/nowhere"),
        side="pair",
        flag="--simct-alignment-map",
        words=("/nowhere",),
    ),
    Case(
        what="alignment map with --simct-shared released",
        change=student(simct_interface="code", simct_shared="released", simct_alignment_map="maps/one"),
        side="pair",
        flag="--simct-alignment-map",
        words=("maps/one", "--simct-shared released"),
    ),
    Case(
        what="teacher job for an interface without teacher",
        change=both(prompts({"prompt": "a", "response": "b"}), student(simct_interface="sft")),
        side="teacher",
        flag="--simct-interface",
        words=("sft",),
    ),
    Case(
        what="temperature with interface bytes",
        change=student(simct_temperature=2.0),
        side="student",
        flag="--simct-temperature",
        words=("bytes",),
    ),
    Case(
        what="teacher timeout above the collective timeout",
        change=student(teacher_timeout_minutes=30),
        side="student",
        flag="--teacher-timeout-minutes",
        words=("must be below",),
    ),
    Case(
        what="student: weights exceed GPU memory",
        change=cluster(device_memory_gib=2.0),
        side="student",
        flag="--tensor-model-parallel-size",
        words=("GiB", "2 GiB"),
    ),
    Case(
        what="student: activations exceed GPU memory",
        change=both(
            config("student", max_position_embeddings=100000, num_hidden_layers=80, intermediate_size=4096),
            config("teacher", max_position_embeddings=100000),
            student(rollout_max_response_len=15000, micro_batch_size=8),
        ),
        side="student",
        flag="--micro-batch-size",
        words=("activations", "80 GiB", "lower it"),
    ),
    Case(
        what="student: KV cache exceeds GPU memory",
        change=both(
            config("student", max_position_embeddings=100000, head_dim=1024, num_hidden_layers=80),
            config("teacher", max_position_embeddings=100000),
            student(rollout_max_response_len=15000, micro_batch_size=1, rollout_batch_size=128),
        ),
        side="student",
        flag="--rollout-engine-batch-size",
        words=("KV cache", "lower it"),
    ),
    Case(
        what="teacher: forward pass exceeds GPU memory",
        change=both(
            config("student", max_position_embeddings=400000),
            config("teacher", max_position_embeddings=400000, intermediate_size=65536),
            teacher(max_tokens_per_batch=300000),
        ),
        side="teacher",
        flag="--max-tokens-per-batch",
        words=("forward pass", "80 GiB", "lower it"),
    ),
    Case(
        what="teacher: weights exceed GPU memory",
        change=both(config("teacher", num_hidden_layers=40, hidden_size=32768, intermediate_size=131072)),
        side="teacher",
        flag="--tensor-model-parallel-size",
        words=("weights", "--pipeline-model-parallel-size"),
    ),
    Case(
        what="bf16 on CPU",
        change=cluster("student", gpus_per_node=0, processes_per_node=4),
        side="student",
        flag="--bf16",
        words=("GPUs",),
    ),
    Case(
        what="local attention in float32",
        change=both(student(attention_backend="local"), lambda run, folder: run["student"].pop("bf16")),
        side="student",
        flag="--attention-backend",
        words=("math kernel", "float32", "use auto"),
    ),
    Case(
        what="flash attention in float32",
        change=both(student(attention_backend="flash"), lambda run, folder: run["student"].pop("bf16")),
        side="student",
        flag="--attention-backend",
        words=("the flash kernel has no float32", "--bf16"),
    ),
    Case(
        what="more processes than GPUs",
        change=cluster("student", processes_per_node=8),
        side="student",
        flag="cluster.student.processes_per_node",
        words=("8", "4"),
    ),
    Case(
        what="several nodes in a local run",
        change=cluster(kind="local"),
        side="teacher",
        flag="cluster.teacher.nodes",
        words=("2", "cluster.kind slurm"),
    ),
    Case(
        what="ipc between nodes",
        change=teacher(bind="ipc"),
        side="teacher",
        flag="--bind",
        words=("one machine",),
    ),
    Case(
        what="requeued run that cannot resume",
        change=student(load="/nowhere"),
        side="student",
        flag="--load",
        words=("/nowhere", "start from the beginning"),
    ),
    Case(
        what="--load without a checkpoint",
        change=both(student(load="/nowhere"), cluster(requeue=False)),
        side="student",
        flag="--load",
        words=("/nowhere", "no checkpoint there"),
    ),
    Case(
        what="path outside the container's mounts",
        change=image("pyxis", mounts=["/usr:/usr"]),
        side="cluster",
        flag="cluster.container.mounts",
        words=("run_dir",),
    ),
    Case(
        what="relative path in a container",
        change=both(image("pyxis"), student(prompt_data="prompts.jsonl")),
        side="cluster",
        flag="--prompt-data",
        words=("relative", "prompts.jsonl"),
    ),
    Case(
        what="container image that does not exist",
        change=image("apptainer", image="/nowhere.sif"),
        side="cluster",
        flag="cluster.container.image",
        words=("/nowhere.sif",),
    ),
    Case(
        what="mount that does not exist",
        change=image("pyxis", mounts=["/nowhere:/data", "/:/"]),
        side="cluster",
        flag="cluster.container.mounts",
        words=("/nowhere",),
    ),
    Case(
        what="container in a local run",
        change=both(image("pyxis"), cluster(kind="local")),
        side="cluster",
        flag="cluster.container",
        words=("local run",),
    ),
    Case(
        what="run_dir that cannot be created",
        change=lambda run, folder: run.update(run_dir="/proc/version/run"),
        side="cluster",
        flag="run_dir",
        words=("/proc/version", "cannot be written"),
    ),
]


@pytest.mark.parametrize("case", WRONG, ids=name_of)
def test_each_misconfiguration_names_its_flag(folder: Path, case: Case) -> None:
    found = [finding for finding in findings(folder, case.change) if finding.level == "fail"]
    matching = [finding for finding in found if case.is_found(finding)]
    assert matching, [(f.side, f.flag, f.message) for f in found]
    assert "\n" not in matching[0].message


WARNINGS = [
    Case(
        what="plain prompts for a chat model",
        change=student(apply_chat_template=False),
        flag="--apply-chat-template",
        words=("plain text",),
    ),
    Case(
        what="digits split differently",
        change=both(single_digits("student"), student(simct_interface="paper")),
        flag="--simct-interface",
        words=("digits",),
    ),
    Case(
        what="student with random weights",
        change=remove("student/model.safetensors"),
        flag="--hf-checkpoint",
        words=("random",),
    ),
    Case(
        what="thinking mode of one template",
        change=template("teacher", "{{ bos_token }}{{ messages[0]['content'] }}<think>\n"),
        flag="--teacher-hf-checkpoint",
        words=("thinking",),
    ),
    Case(
        what="thinking mode that an argument switches off",
        change=template(
            "teacher",
            "{{ bos_token }}{{ messages[0]['content'] }}{% if enable_thinking is false %}.{% endif %}",
        ),
        flag="--teacher-chat-template-kwargs",
        words=('set {"enable_thinking": false}',),
    ),
    Case(
        what="no time limit",
        change=lambda run, folder: run["cluster"].pop("time"),
        flag="cluster.time",
        words=("limit",),
    ),
    Case(
        what="no checkpoints",
        change=lambda run, folder: run["student"].pop("save_interval"),
        flag="--save-interval",
        words=("checkpoint",),
    ),
    Case(
        what="float32 on GPUs",
        change=lambda run, folder: run["student"].pop("bf16"),
        flag="--bf16",
        words=("float32",),
    ),
    Case(
        what="GPU memory not configured",
        change=lambda run, folder: run["cluster"].pop("device_memory_gib"),
        flag="--device-memory",
        words=("not configured",),
    ),
    Case(
        what="tensor parallelism over nodes",
        change=both(cluster("student", nodes=2, gpus_per_node=1), student(tensor_model_parallel_size=2)),
        flag="--tensor-model-parallel-size",
        words=("network",),
    ),
    Case(
        what="CUDA_DEVICE_MAX_CONNECTIONS not set",
        change=student(sequence_parallel=True),
        flag="env.CUDA_DEVICE_MAX_CONNECTIONS",
        words=("overlap",),
    ),
]


@pytest.mark.parametrize("case", WARNINGS, ids=name_of)
def test_what_may_be_meant_is_a_warning(folder: Path, case: Case) -> None:
    found = findings(folder, case.change)
    assert any(finding.level == "warn" and case.is_found(finding) for finding in found), found
    assert not any(finding.level == "fail" for finding in found)


def test_texts_that_cannot_be_compared_fail(folder, monkeypatch) -> None:
    """No pair of loadable tokenizers loses a fifth of its bytes, so a tokenizer that spells
    something else stands in.
    """
    from megatron_simct.preflight import pair as module

    monkeypatch.setattr(module, "LOST_FAIL", -1.0)
    (found,) = [finding for finding in findings(folder) if finding.level == "fail"]
    assert found.flag == "--teacher-tokenizer-model" and "1:1" in found.message


def test_what_the_teacher_alone_reads_is_shown(folder, capsys) -> None:
    prompts({"prompt": "Hi", "teacher_suffix": " Ha"}, {"prompt": "Ho"})({}, folder)
    check_pair.main([str(write_run(folder)), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert "Hi Ha" in report["prompts"]["teacher"] and "Ha" not in report["prompts"]["student"]
    (said,) = [f["message"] for f in report["findings"] if f["check"] == "prompts"]
    assert "in 1 rows the teacher has its own prompt" in said


def by_row(values: dict[str, Any], folder: Path) -> None:
    """A teacher in a job of its own, and one on the student's ranks."""
    sizes = {name: values["cluster"].pop(name) for name in ("student", "teacher")}
    options = values.pop("student") | {
        "teachers": {"maths": {}, "here": {"hf_checkpoint": str(folder / "teacher")}}
    }
    values["jobs"] = [
        {"name": "student", "kind": "student", "options": options, **sizes["student"]},
        {"name": "maths", "kind": "teacher", "options": values.pop("teacher"), **sizes["teacher"]},
    ]


def test_each_of_several_teachers_is_checked_on_its_rows(folder) -> None:
    rows = [{"prompt": f"Tom has {i} apples.", "teacher": "maths" if i % 4 else "here"} for i in range(8)]
    prompts(*rows)({}, folder)
    report = check_run(read_run_file(str(write_run(folder, by_row))))
    assert not report.failed, [f for f in report.findings if f.level == "fail"]
    for name in ("maths", "here"):
        checks = {f.check for f in report.findings if f.side == name}
        assert checks >= {"tokenizer", "shared vocabulary", "coverage", "interface", "context", "traffic"}
    assert report.plans.keys() == {"student", "maths"}
    numbers = report.as_json()["teachers"]
    assert numbers.keys() == {"maths", "here"} and report.as_json()["coverage"] is None
    for of in numbers.values():
        assert of["traffic_bytes"]["answers"] > 0 and of["coverage"]["bytes"] > 0
    assert numbers["maths"]["coverage"]["bytes"] == 3 * numbers["here"]["coverage"]["bytes"]
    alone = check_run(read_run_file(str(write_run(folder, both(colocated))))).plans["student"]
    assert report.plans["student"].held["teacher weights"] == alone.held["teacher weights"] > 0

    prompts(*[row | {"teacher": "maths"} for row in rows])({}, folder)
    (warning,) = [f for f in findings(folder, by_row) if f.flag == "--teachers"]
    assert (warning.side, warning.level) == ("here", "warn") and "no row of --prompt-data" in warning.message

    prompts(*rows, {"prompt": "Who?", "teacher": "law"})({}, folder)
    (failure,) = [f for f in findings(folder, by_row) if f.level == "fail"]
    assert "prompts.jsonl, line 9: the unknown teacher 'law'" in failure.message


def test_the_plan_counts_the_average_of_a_teachers_weights(folder) -> None:
    def teacher_weights(*changes: Change) -> int:
        report = check_run(read_run_file(str(write_run(folder, both(colocated, *changes)))))
        return report.plans["student"].held["teacher weights"]

    assert teacher_weights(student(teacher_ema=0.99)) == 3 * teacher_weights()  # 4 bytes beside 2


def test_the_plan_counts_the_student_at_its_start(folder) -> None:
    plain, kept = (
        check_run(read_run_file(str(write_run(folder, student(reference_kl_weight=w))))).plans["student"]
        for w in (0.0, 0.1)
    )
    assert kept.held["start's weights"] == kept.held["weights"] == plain.held["weights"]
    assert kept.phases["start"]["forward pass"] > 0 and "start" not in plain.phases
    # 16 sequences on 2 data-parallel ranks: 8 of 100 labels each, 64 numbers of bfloat16 a label.
    assert kept.phases["update"]["start's hidden states"] == 8 * 100 * 64 * 2
    assert kept.phases["update"]["loss"] > plain.phases["update"]["loss"]


def test_the_tool_prints_a_table_or_json_and_fails(folder, capsys) -> None:
    path = str(write_run(folder))
    assert check_pair.main([path]) == 0
    table = capsys.readouterr().out
    assert "0 failed" in table and "KV cache" in table and "<|im_start|>user" in table and "[INST]" in table
    assert check_pair.main([path, "--json", "student.micro_batch_size=5"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] and report["traffic_bytes"]["answers"] > 0 and report["coverage"]["units"] > 0
    assert [f["flag"] for f in report["findings"] if f["level"] == "fail"] == ["--micro-batch-size"]
    assert report["bias_nats_a_word"]["words"] > 20
    for options in (["paper"], ["bytes", "student.simct_byte_bounds=any"]):
        assert check_pair.main([path, "--json", f"student.simct_interface={options[0]}", *options[1:]]) == 0
        report = json.loads(capsys.readouterr().out)
        (found,) = [f for f in report["findings"] if f["check"] == "bias"]
        assert found["level"] == ("pass" if "any" in options[-1] else "warn")
        assert (report["bias_nats_a_word"]["perfect"] < 1e-12) == (found["level"] == "pass")
    assert check_pair.main([path, "--device-memory", "0.5"]) == 1
    assert "--tensor-model-parallel-size" in capsys.readouterr().out
    for none in ("0", "nan"):
        assert check_pair.main([path, "--device-memory", none]) == 1
        assert f"--device-memory {float(none)}: must be above 0" in capsys.readouterr().err
    assert check_pair.main([str(folder / "nowhere.yaml")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_what_takes_long_at_the_start_is_said(folder) -> None:
    """With bounds for any tokenizer: one line for each tokenizer whose table is made."""
    lines: list[str] = []
    pair = open_pair(
        read_run_file(str(write_run(folder, student(simct_byte_bounds="any")))).config, say=lines.append
    )
    assert pair.student.continuations is not None and pair.teachers[0].tokenizer.continuations is not None
    assert len(lines) == 2 and all("finding the tokens that may follow each of" in line for line in lines)
    open_pair(read_run_file(str(write_run(folder))).config, say=lines.append)
    assert len(lines) == 2


# A teacher of 235 billion parameters


def test_golden_plan_of_a_235b_teacher(tmp_path) -> None:
    """TP8 x PP2, bfloat16: 47 layers each. The last stage needs the most, with the head and the answers."""
    write_json(tmp_path / "config.json", CONFIGS["Qwen3-235B-A22B"])
    architecture = read_architecture(str(tmp_path), flag="--teacher-hf-checkpoint")
    assert total_parameters(architecture, vocab_size=151936) == 235_093_634_560
    parallel = ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=2)
    sizes = Sizes(architecture=architecture, parallel=parallel, vocab_size=152064, bf16=True)
    plan = teacher_plan(sizes, tokens=16384, length=6144, on_gpu=True)
    # By hand: one layer over 8 ranks has (64 + 8) x 128 / 8 x 4096 of queries, keys and values, 64 x 128 / 8
    # x 4096 of the projection, 2 x 128 of their norms, 128 experts of 3 x 4096 x 1536 / 8, 128 x 4096 of the
    # router, 2 x 4096 of norms. 47 of them, an eighth of the head and the last norm.
    layer = 4_718_592 + 4_194_304 + 256 + 301_989_888 + 524_288 + 8_192
    last = 47 * layer + 152064 // 8 * 4096 + 4096
    assert plan.held == {"weights": 2 * last, "GPU context": 2 * GIB}
    # Whole micro-batches, which sequences of 6,144 tokens would not fill. The last stage keeps their hidden
    # states for the answers.
    rows = 16384
    assert plan.phases == {
        "scoring": {
            "forward pass": rows * 2 * (3 * 4096 + 4 * 8 * 1536 // 8 + 2 * 8 * 4096),
            "hidden states": rows * 4096 * 6,
            "logits": (2 + 8) * 4096 * 8192,
        }
    }
    assert plan.peak / GIB == pytest.approx(35.27, abs=0.02)
    # Experts over 8 data-parallel ranks too, on 128 GPUs.
    spread = ParallelConfig(
        tensor_model_parallel_size=8, pipeline_model_parallel_size=2, expert_model_parallel_size=8
    )
    sizes = Sizes(architecture=architecture, parallel=spread, vocab_size=152064, bf16=True)
    few = teacher_plan(sizes, tokens=16384, length=6144, on_gpu=True)
    assert few.held["weights"] == 2 * (last - 47 * 301_989_888 * 7 // 8)


def test_plan_of_a_student(tmp_path) -> None:
    """Against arithmetic by hand: an 8B model, TP2, bfloat16 with AdamW, one micro-batch of one sequence."""
    fields = {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    write_json(tmp_path / "config.json", fields)
    architecture = read_architecture(str(tmp_path), flag="--hf-checkpoint")
    assert total_parameters(architecture, vocab_size=151936) == 8_190_735_360
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    plan = student_plan(
        Sizes(architecture=architecture, parallel=parallel, vocab_size=152064, bf16=True),
        optimizer="adam",
        micro_batch_size=1,
        num_micro_batches=4,
        engine_batch_size=16,
        prompt_len=2048,
        response_len=4096,
        loss_memory=128 << 20,
        trains_on_given=False,
        on_gpu=True,
        shared_rows=40000,
        teacher_hidden_size=4096,
    )
    layer = 4096 * 48 * 128 // 2 + 32 * 128 // 2 * 4096 + 2 * 128 + 3 * 4096 * 6144 + 2 * 4096
    parameters = 36 * layer + 2 * 76032 * 4096 + 4096
    assert plan.held == {
        "weights": 2 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 12 * parameters,
        "teacher head": 40000 * 4096 * 2,
        "GPU context": 2 * GIB,
    }
    assert plan.phases["rollout"]["KV cache"] == 2 * 16 * 6144 * 36 * 4 * 128 * 2
    tokens = 6144
    assert plan.phases["update"]["activations"] == 36 * tokens * 2 * (
        10 * 4096 // 2 + 3 * 6144 + 5 * 20 * 128
    )
    assert plan.peak_phase == "update"


def test_pipeline_stages_cache_all_sequences_and_compute_a_lane_of_them(tmp_path) -> None:
    """Each of two stages caches all rows, at least one a lane, for half of the layers; the last one has the
    logits of a lane."""
    shape = {"hidden_size": 64, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields = {**shape, "model_type": "llama", "num_hidden_layers": 4, "vocab_size": 50_000}
    fields |= {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64}
    write_json(tmp_path / "config.json", fields)
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    architecture = read_architecture(str(tmp_path), flag="--hf-checkpoint")
    sizes = Sizes(architecture=architecture, parallel=parallel, vocab_size=50_000, bf16=False)
    for batch, rows, lane in ((1, 2, 1), (7, 7, 4), (8, 8, 4)):
        plan = student_plan(
            sizes,
            optimizer="sgd",
            micro_batch_size=1,
            num_micro_batches=2,
            engine_batch_size=batch,
            prompt_len=3,
            response_len=5,
            loss_memory=1 << 30,
            trains_on_given=False,
            on_gpu=False,
        )
        assert plan.phases["rollout"]["KV cache"] == 2 * rows * (3 + 5) * 2 * (2 * 16) * 4
        assert plan.phases["rollout"]["forward pass"] == 4 * 4 * lane * 50_000


# The shipped examples


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name, tmp_path) -> None:
    write_json(tmp_path / "config.json", CONFIGS[name])
    architecture = read_architecture(str(tmp_path), flag="--hf-checkpoint")
    assert total_parameters(architecture, vocab_size=architecture.vocab_size) == PARAMETERS[name]


CLUSTER_EXAMPLES = [
    path
    for path in sorted((ROOT / "examples").glob("*/run.yaml"))
    if not (path.parent / "prepare.sh").exists()  # which makes the folders that such an example names
]


@pytest.mark.parametrize("path", CLUSTER_EXAMPLES, ids=lambda path: path.parent.name)
def test_shipped_examples_fit_on_paper(path, tmp_path) -> None:
    """With folders of the published architectures instead of downloaded ones, nothing fails."""
    run = stand_in(path, tmp_path)
    report = check_run(run)
    assert [f for f in report.findings if f.level == "fail"] == []
    assert {"student"} <= report.plans.keys()


def test_a_teacher_that_runs_elsewhere_takes_none_of_the_students_memory(folder) -> None:
    def elsewhere(run: dict[str, Any], folder: Path) -> None:
        colocated(run, folder)
        run["student"]["teacher_endpoint"] = [str(folder / "other")]

    plans = {
        name: check_run(read_run_file(str(write_run(folder, change)))).plans
        for name, change in (("colocated", colocated), ("elsewhere", elsewhere))
    }
    assert all(plan.keys() == {"student"} for plan in plans.values())
    assert "teacher weights" in plans["colocated"]["student"].held
    assert "teacher weights" not in plans["elsewhere"]["student"].held


def test_answers_from_disk_need_no_teacher_in_memory(folder) -> None:
    def from_disk(run: dict[str, Any], folder: Path) -> None:
        colocated(run, folder)
        run["student"]["load_debug_scored_data"] = str(folder / "answers")

    plan = check_run(read_run_file(str(write_run(folder, from_disk)))).plans["student"]
    assert "teacher weights" not in plan.held and "teacher" not in plan.phases


def test_likeliest_tokens_come_in_place_of_hidden_states(folder) -> None:
    """uld: no head of the teacher on the student's ranks, and --simct-uld-topk numbers a
    row between the jobs.
    """
    reports = {
        topk: check_run(
            read_run_file(str(write_run(folder, student(simct_interface="uld", simct_uld_topk=topk))))
        )
        for topk in (1, 9, 0)
    }
    assert all("teacher head" not in report.plans["student"].held for report in reports.values())
    few, more, all_tokens = (report.numbers.traffic.answers for report in reports.values())
    assert (all_tokens - few) / (more - few) == (340 - 1) / (9 - 1), "the teacher has 340 tokens"


def test_values_of_the_pair_are_read(folder) -> None:
    run = read_run_file(str(write_run(folder)))
    assert run.config.rollout.rollout_batch_size == run_values(folder)["student"]["rollout_batch_size"]
