"""What the pre-flight finds, one misconfiguration after another, and that it is silent where nothing is
wrong.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_simct.commands import check_pair
from megatron_simct.config.options import ParallelConfig
from megatron_simct.config.run_file import read_run_file
from megatron_simct.loading import open_pair
from megatron_simct.models.families import read_architecture
from megatron_simct.preflight.check import check_run
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
    """A copy that a test may spoil."""
    copied = tmp_path / "pair"
    shutil.copytree(pair, copied)
    return copied


def findings(folder: Path, change: Change | None = None) -> list:
    return check_run(read_run_file(str(write_run(folder, change)))).findings


def test_nothing_is_wrong_with_the_pair_itself(folder):
    found = findings(folder)
    # the tests' folder is one of this node
    problems = [f for f in found if f.level != "pass" and f.flag != "run_dir"]
    assert problems == []
    assert {f.side for f in found} == {"student", "teacher", "pair", "cluster"}


def test_quantised_weights_are_said_with_their_bytes_in_files_and_in_memory(folder):
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


def test_the_plan_of_a_student_with_adapters_has_gradients_and_optimizer_for_these_alone(folder):
    whole = check_run(read_run_file(str(write_run(folder)))).plans["student"]
    adapted = check_run(read_run_file(str(write_run(folder, student(lora_rank=2))))).plans["student"]
    more = adapted.held["weights"] - whole.held["weights"]
    assert 0 < more < whole.held["weights"] / 4
    assert adapted.held["gradients"] == 2 * more  # float32 beside bfloat16
    assert adapted.held["optimizer"] == 6 * more
    wrong = findings(folder, student(lora_rank=2, lora_target_modules=["q_prj"]))
    assert any("--lora-target-modules q_prj" in f.message and f.level == "fail" for f in wrong)


def test_layers_are_proposed_for_stages_where_the_head_weighs_much(folder):
    two = student(pipeline_model_parallel_size=2)
    said = [
        f.message
        for f in findings(folder, both(two, config("student", vocab_size=3000)))
        if f.check == "proposal"
    ]
    assert any(
        "--pipeline-model-parallel-layout 'Et*3|tL' would even out the stages" in text for text in said
    )
    given = both(two, student(pipeline_model_parallel_layout="Et*3|tL"))
    for change in (
        both(given, config("student", vocab_size=3000)),
        both(two, config("student", vocab_size=400)),
    ):
        assert not any("even out" in finding.message for finding in findings(folder, change))


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


LOSSY = {"normalizer": {"type": "NFKC"}}
USER = {"role": "user", "content": "How many?"}
WRONG: dict[str, tuple[Change, str, str, tuple[str, ...]]] = {
    # name: (change, side, flag, words of the message)
    "student world": (
        student(tensor_model_parallel_size=3),
        "student",
        "--tensor-model-parallel-size",
        ("world size (4)", "3"),
    ),
    "student heads": (
        both(
            config("student", num_attention_heads=6, num_key_value_heads=2),
            student(tensor_model_parallel_size=4),
        ),
        "student",
        "--tensor-model-parallel-size",
        ("num_attention_heads (6)",),
    ),
    "student query groups": (
        both(
            config("student", num_key_value_heads=3, num_attention_heads=12, head_dim=8),
            student(tensor_model_parallel_size=2),
        ),
        "student",
        "--tensor-model-parallel-size",
        ("num_query_groups (3)",),
    ),
    "more stages than layers": (
        both(config("student", num_hidden_layers=1), student(pipeline_model_parallel_size=2)),
        "student",
        "--pipeline-model-parallel-size",
        ("num_layers (1)",),
    ),
    "virtual stages": (
        both(
            config("student", num_hidden_layers=6),
            student(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2),
        ),
        "student",
        "--pipeline-model-parallel-size",
        ("num_layers (6)", "--num-virtual-stages-per-pipeline-rank 2"),
    ),
    "virtual stages of nothing": (
        student(num_virtual_stages_per_pipeline_rank=2),
        "student",
        "--num-virtual-stages-per-pipeline-rank",
        ("--pipeline-model-parallel-size is 1",),
    ),
    "sequence parallelism of one rank": (
        student(tensor_model_parallel_size=1, sequence_parallel=True),
        "student",
        "--sequence-parallel",
        ("--tensor-model-parallel-size is 1",),
    ),
    "context parallelism": (
        student(context_parallel_size=3),
        "student",
        "--tensor-model-parallel-size",
        ("--context-parallel-size (3)",),
    ),
    "ranks for experts": (
        teacher(expert_model_parallel_size=4),
        "teacher",
        "--expert-model-parallel-size",
        ("data-parallel size",),
    ),
    "batch": (
        student(rollout_batch_size=18),
        "student",
        "--micro-batch-size",
        ("18", "use a --rollout-batch-size"),
    ),
    "global batch": (student(global_batch_size=8), "student", "--global-batch-size", ("must equal",)),
    "micro-batches of nothing": (
        student(micro_batch_size=0),
        "student",
        "--micro-batch-size",
        ("at least 1",),
    ),
    "ranks of nothing": (
        student(tensor_model_parallel_size=0),
        "student",
        "--tensor-model-parallel-size",
        ("at least 1",),
    ),
    "padding to nothing": (
        student(make_vocab_size_divisible_by=0),
        "student",
        "--make-vocab-size-divisible-by",
        ("at least 1",),
    ),
    "batches of nothing": (
        teacher(max_tokens_per_batch=0),
        "teacher",
        "--max-tokens-per-batch",
        ("at least 1",),
    ),
    "teacher world": (
        teacher(tensor_model_parallel_size=3),
        "teacher",
        "--tensor-model-parallel-size",
        ("world size (8)",),
    ),
    "teacher MLP": (
        config("teacher", intermediate_size=127),
        "teacher",
        "--tensor-model-parallel-size",
        ("ffn_hidden_size (127)", "--teacher-hf-checkpoint"),
    ),
    "no student folder": (
        student(hf_checkpoint="/nowhere"),
        "student",
        "--hf-checkpoint",
        ("/nowhere", "config.json"),
    ),
    "no teacher folder": (
        teacher(teacher_hf_checkpoint="/nowhere"),
        "teacher",
        "--teacher-hf-checkpoint",
        ("/nowhere",),
    ),
    "family": (
        config("teacher", model_type="mamba"),
        "teacher",
        "--teacher-hf-checkpoint",
        ("mamba", "llama"),
    ),
    "field": (
        config("student", rope_scaling={"type": "dynamic", "factor": 4}),
        "student",
        "--hf-checkpoint",
        ("dynamic",),
    ),
    "quantised": (
        config("teacher", quantization_config={"quant_method": "gptq"}),
        "teacher",
        "--teacher-hf-checkpoint",
        ("gptq", "fp8", "16-bit"),
    ),
    "teacher without weights": (
        remove("teacher/model.safetensors"),
        "teacher",
        "--teacher-hf-checkpoint",
        ("no safetensors", "--teacher-pretrained-checkpoint"),
    ),
    "a download cut off": (
        index("teacher", "model-1.safetensors", "model-2.safetensors"),
        "teacher",
        "--teacher-hf-checkpoint",
        ("1 of 2", "model-2.safetensors"),
    ),
    "weights of another format": (
        lambda run, folder: (folder / "student/model.safetensors").rename(
            folder / "student/pytorch_model.bin"
        ),
        "student",
        "--hf-checkpoint",
        ("pytorch_model.bin",),
    ),
    "no checkpoint to start from": (
        student(pretrained_checkpoint="/nowhere"),
        "student",
        "--pretrained-checkpoint",
        ("/nowhere",),
    ),
    "no tokenizer": (remove("student/tokenizer.json"), "student", "--tokenizer-model", ("no tokenizer",)),
    "tokenizer that rewrites": (
        lambda run, folder: edit_json(folder / "teacher/tokenizer.json", **LOSSY),
        "teacher",
        "--teacher-tokenizer-model",
        ("tokenizer.json",),
    ),
    "tokenizer of another model": (
        config("student", vocab_size=300),
        "student",
        "--tokenizer-model",
        ("320", "300"),
    ),
    "stop token outside": (student(stop_token_ids=[4000]), "student", "--tokenizer-model", ("4000",)),
    "stop token that no turn ends with": (
        student(stop_token_ids=[316]),
        "student",
        "--stop-token-ids",
        ("<|im_end|>", "318"),
    ),
    "no chat template": (template("teacher", None), "teacher", "--teacher-hf-checkpoint", ("chat template",)),
    "broken chat template": (template("student", "{% if %}"), "student", "--hf-checkpoint", ("line 1",)),
    "a template without an end": (
        template("student", "{% for i in range(999) %}{{ 'a' * 99999 }}{% endfor %}"),
        "student",
        "--hf-checkpoint",
        ("tokenizer_config.json writes more than 16,777,216 characters",),
    ),
    "a switch that the template lacks": (
        student(chat_template_kwargs={"enable_thinking": False}),
        "student",
        "--chat-template-kwargs",
        ("does not read enable_thinking",),
    ),
    "a date in another form": (
        student(chat_template_date="31.12.2025"),
        "student",
        "--chat-template-date",
        ("31.12",),
    ),
    "arguments without a template": (
        student(apply_chat_template=False, chat_template_kwargs="{}"),
        "student",
        "--chat-template-kwargs",
        ("needs --apply-chat-template",),
    ),
    "messages without a template": (
        both(prompts({"messages": [USER]}), student(apply_chat_template=False)),
        "pair",
        "--prompt-data",
        ("line 1", "--apply-chat-template"),
    ),
    "prompts with markers": (
        both(prompts({"prompt": "<|im_start|>user\nHi<|im_end|>\n"}), student(apply_chat_template=False)),
        "pair",
        "--apply-chat-template",
        ("<|im_start|>", "line 1"),
    ),
    "rendered twice": (
        prompts({"prompt": "<|im_start|>user\nHi<|im_end|>\n"}),
        "student",
        "--prompt-data",
        ("rendered twice",),
    ),
    "BOS twice": (
        template("teacher", "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}"),
        "teacher",
        "--teacher-hf-checkpoint",
        ("beginning-of-sequence token twice",),
    ),
    "a role that the teacher refuses": (
        prompts({"messages": [{"role": "system", "content": "Be brief."}, USER]}),
        "pair",
        "--prompt-data",
        ("no role system", "--teacher-hf-checkpoint"),
    ),
    "no prompts": (student(prompt_data="/nowhere.jsonl"), "pair", "--prompt-data", ("/nowhere.jsonl",)),
    "another key": (student(input_key="question"), "pair", "--prompt-data", ("no question", "prompt, label")),
    "no labels": (
        both(
            lambda run, folder: (folder / "held_out.jsonl").write_text('{"prompt": "a"}\n'),
            lambda run, folder: run["student"].update(eval_prompt_data=str(folder / "held_out.jsonl")),
        ),
        "pair",
        "--eval-prompt-data",
        ("no label",),
    ),
    "given rows without responses": (
        student(given_share=0.5),
        "student",
        "--given-share",
        ("0 of 20 rows of --prompt-data have a response",),
    ),
    "a start without weights": (
        lambda run, folder: (
            (folder / "student" / "model.safetensors").unlink(),
            student(reference_kl_weight=0.1)(run, folder),
        ),
        "student",
        "--reference-kl-weight",
        ("no safetensors",),
    ),
    "an average of two architectures": (
        lambda run, folder: (
            colocated(run, folder),
            edit_json(folder / "teacher" / "config.json", intermediate_size=256),
            student(teacher_ema=0.9)(run, folder),
        ),
        "teacher",
        "--teacher-ema",
        ("one architecture",),
    ),
    "a teacher's prompt without meaning": (
        prompts({"prompt": "Hi", "teacher_suffix": 5}),
        "pair",
        "--prompt-data",
        ("line 1", "'teacher_suffix' is not a text"),
    ),
    "a teacher's prompt that is too long": (
        prompts({"prompt": "Hi", "teacher_suffix": " ha" * 300}),
        "pair",
        "--rollout-max-prompt-len",
        ("exceed",),
    ),
    "markers in the teacher's prompt": (
        prompts({"prompt": "Hi", "teacher_prompt": "[INST]Hi[/INST]"}),
        "teacher",
        "--prompt-data",
        ("template's own markers",),
    ),
    "prompts too long": (student(rollout_max_prompt_len=3), "pair", "--rollout-max-prompt-len", ("exceed",)),
    "student's positions": (
        student(rollout_max_response_len=400),
        "student",
        "--rollout-max-response-len",
        ("600", "512"),
    ),
    "teacher's positions": (
        config("teacher", max_position_embeddings=256),
        "teacher",
        "--rollout-max-response-len",
        ("256",),
    ),
    "teacher's batches": (
        teacher(max_tokens_per_batch=64),
        "teacher",
        "--max-tokens-per-batch",
        ("64", "refused"),
    ),
    "map of others": (
        student(simct_alignment_map="/nowhere"),
        "pair",
        "--simct-alignment-map",
        ("/nowhere",),
    ),
    "map of other pairs": (
        student(simct_interface="code", simct_shared="released", simct_alignment_map="maps/one"),
        "pair",
        "--simct-alignment-map",
        ("maps/one", "--simct-shared released"),
    ),
    "interface without a teacher": (
        both(prompts({"prompt": "a", "response": "b"}), student(simct_interface="sft")),
        "teacher",
        "--simct-interface",
        ("sft",),
    ),
    "temperature of bytes": (student(simct_temperature=2.0), "student", "--simct-temperature", ("bytes",)),
    "time-outs": (
        student(teacher_timeout_minutes=30),
        "student",
        "--teacher-timeout-minutes",
        ("must be below",),
    ),
    "student's memory": (
        cluster(device_memory_gib=2.0),
        "student",
        "--tensor-model-parallel-size",
        ("GiB", "2 GiB"),
    ),
    "student's activations": (
        both(
            config("student", max_position_embeddings=100000, num_hidden_layers=80, intermediate_size=4096),
            config("teacher", max_position_embeddings=100000),
            student(rollout_max_response_len=15000, micro_batch_size=8),
        ),
        "student",
        "--micro-batch-size",
        ("activations", "80 GiB", "lower it"),
    ),
    "student's cache": (
        both(
            config("student", max_position_embeddings=100000, head_dim=1024, num_hidden_layers=80),
            config("teacher", max_position_embeddings=100000),
            student(rollout_max_response_len=15000, micro_batch_size=1, rollout_batch_size=128),
        ),
        "student",
        "--rollout-engine-batch-size",
        ("KV cache", "lower it"),
    ),
    "teacher's batches in memory": (
        both(
            config("student", max_position_embeddings=400000),
            config("teacher", max_position_embeddings=400000, intermediate_size=65536),
            teacher(max_tokens_per_batch=300000),
        ),
        "teacher",
        "--max-tokens-per-batch",
        ("forward pass", "80 GiB", "lower it"),
    ),
    "teacher's memory": (
        both(config("teacher", num_hidden_layers=40, hidden_size=32768, intermediate_size=131072)),
        "teacher",
        "--tensor-model-parallel-size",
        ("weights", "--pipeline-model-parallel-size"),
    ),
    "bf16 on CPU": (
        cluster("student", gpus_per_node=0, processes_per_node=4),
        "student",
        "--bf16",
        ("GPUs",),
    ),
    "processes on one GPU": (
        cluster("student", processes_per_node=8),
        "student",
        "cluster.student.processes_per_node",
        ("8", "4"),
    ),
    "nodes of one machine": (
        cluster(kind="local"),
        "teacher",
        "cluster.teacher.nodes",
        ("2", "cluster.kind slurm"),
    ),
    "ipc between nodes": (teacher(bind="ipc"), "teacher", "--bind", ("one machine",)),
    "nothing to resume": (student(load="/nowhere"), "student", "--load", ("/nowhere", "start over")),
    "loads nothing": (
        both(student(load="/nowhere"), cluster(requeue=False)),
        "student",
        "--load",
        ("/nowhere", "no checkpoint there"),
    ),
    "path outside of the image": (
        image("pyxis", mounts=["/usr:/usr"]),
        "cluster",
        "cluster.container.mounts",
        ("run_dir",),
    ),
    "relative path": (
        both(image("pyxis"), student(prompt_data="prompts.jsonl")),
        "cluster",
        "--prompt-data",
        ("relative", "prompts.jsonl"),
    ),
    "no image": (
        image("apptainer", image="/nowhere.sif"),
        "cluster",
        "cluster.container.image",
        ("/nowhere.sif",),
    ),
    "nothing to mount": (
        image("pyxis", mounts=["/nowhere:/data", "/:/"]),
        "cluster",
        "cluster.container.mounts",
        ("/nowhere",),
    ),
    "image on this machine": (
        both(image("pyxis"), cluster(kind="local")),
        "cluster",
        "cluster.container",
        ("local run",),
    ),
    "run_dir that cannot be": (
        lambda run, folder: run.update(run_dir="/proc/version/run"),
        "cluster",
        "run_dir",
        ("/proc/version", "cannot be written"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_misconfiguration_names_its_flag(folder, name):
    change, side, flag, words = WRONG[name]
    found = [finding for finding in findings(folder, change) if finding.level == "fail"]
    matching = [
        f for f in found if f.side == side and f.flag == flag and all(word in f.message for word in words)
    ]
    assert matching, [(f.side, f.flag, f.message) for f in found]
    assert "\n" not in matching[0].message


WARNINGS: dict[str, tuple[Change, str, str]] = {
    "plain prompts for a chat model": (
        student(apply_chat_template=False),
        "--apply-chat-template",
        "plain text",
    ),
    "digits": (
        both(single_digits("student"), student(simct_interface="paper")),
        "--simct-interface",
        "digits",
    ),
    "random student": (remove("student/model.safetensors"), "--hf-checkpoint", "random"),
    "thinking": (
        template("teacher", "{{ bos_token }}{{ messages[0]['content'] }}<think>\n"),
        "--teacher-hf-checkpoint",
        "thinking",
    ),
    "a thinking switch": (
        template(
            "teacher",
            "{{ bos_token }}{{ messages[0]['content'] }}{% if enable_thinking is false %}.{% endif %}",
        ),
        "--teacher-chat-template-kwargs",
        'set {"enable_thinking": false}',
    ),
    "no time limit": (lambda run, folder: run["cluster"].pop("time"), "cluster.time", "limit"),
    "no checkpoints": (
        lambda run, folder: run["student"].pop("save_interval"),
        "--save-interval",
        "checkpoint",
    ),
    "float32": (lambda run, folder: run["student"].pop("bf16"), "--bf16", "float32"),
    "unknown device": (
        lambda run, folder: run["cluster"].pop("device_memory_gib"),
        "--device-memory",
        "not configured",
    ),
    "tensor ranks over nodes": (
        both(cluster("student", nodes=2, gpus_per_node=1), student(tensor_model_parallel_size=2)),
        "--tensor-model-parallel-size",
        "network",
    ),
    "connections": (student(sequence_parallel=True), "env.CUDA_DEVICE_MAX_CONNECTIONS", "overlap"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_may_be_meant_is_a_warning(folder, name):
    change, flag, word = WARNINGS[name]
    found = findings(folder, change)
    assert [f for f in found if f.level == "warn" and f.flag == flag and word in f.message], found
    assert not [f for f in found if f.level == "fail"]


def test_texts_that_cannot_be_compared_fail(folder, monkeypatch):
    """No pair of loadable tokenizers loses a fifth of its bytes, so one that spells something else stands
    in.
    """
    from megatron_simct.preflight import pair as module

    monkeypatch.setattr(module, "LOST_FAIL", -1.0)
    (found,) = [finding for finding in findings(folder) if finding.level == "fail"]
    assert found.flag == "--teacher-tokenizer-model" and "1:1" in found.message


def test_what_the_teacher_alone_reads_is_shown(folder, capsys):
    prompts({"prompt": "Hi", "teacher_suffix": " Ha"}, {"prompt": "Ho"})({}, folder)
    check_pair.main([str(write_run(folder)), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert "Hi Ha" in report["prompts"]["teacher"] and "Ha" not in report["prompts"]["student"]
    (said,) = [f["message"] for f in report["findings"] if f["check"] == "prompts"]
    assert "in 1 rows the teacher reads a prompt of its own" in said


def test_the_plan_counts_the_average_of_a_teachers_weights(folder):
    def teacher_weights(*changes: Change) -> int:
        report = check_run(read_run_file(str(write_run(folder, both(colocated, *changes)))))
        return report.plans["student"].held["teacher weights"]

    assert teacher_weights(student(teacher_ema=0.99)) == 3 * teacher_weights()  # 4 bytes beside 2


def test_the_plan_counts_the_student_at_its_start(folder):
    plain, kept = (
        check_run(read_run_file(str(write_run(folder, student(reference_kl_weight=w))))).plans["student"]
        for w in (0.0, 0.1)
    )
    assert kept.held["start's weights"] == kept.held["weights"] == plain.held["weights"]
    assert kept.phases["start"]["forward pass"] > 0 and "start" not in plain.phases
    # 16 sequences on 2 data-parallel ranks: 8 of 100 labels each, 64 numbers of bfloat16 a label.
    assert kept.phases["update"]["start's hidden states"] == 8 * 100 * 64 * 2
    assert kept.phases["update"]["loss"] > plain.phases["update"]["loss"]


def test_the_tool_prints_a_table_or_json_and_fails(folder, capsys):
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


def test_what_takes_long_at_the_start_is_said(folder):
    """With bounds for any tokenizer, a line for each tokenizer whose table is made."""
    lines: list[str] = []
    pair = open_pair(
        read_run_file(str(write_run(folder, student(simct_byte_bounds="any")))).config, say=lines.append
    )
    assert pair.student.continuations is not None and pair.teachers[0].tokenizer.continuations is not None
    assert len(lines) == 2 and all("finding what may follow each of" in line for line in lines)
    open_pair(read_run_file(str(write_run(folder))).config, say=lines.append)
    assert len(lines) == 2


# A teacher of 235 billion parameters


def test_golden_plan_of_a_235b_teacher(tmp_path):
    """TP8 x PP2, bfloat16: 47 layers each; the last stage needs most, with the head and the answers."""
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
            "logits": (2 + 8) * 4096 * 1024,
        }
    }
    assert plan.peak / GIB == pytest.approx(34.98, abs=0.02)
    # Experts over 8 data-parallel ranks too, on 128 GPUs.
    spread = ParallelConfig(
        tensor_model_parallel_size=8, pipeline_model_parallel_size=2, expert_model_parallel_size=8
    )
    sizes = Sizes(architecture=architecture, parallel=spread, vocab_size=152064, bf16=True)
    few = teacher_plan(sizes, tokens=16384, length=6144, on_gpu=True)
    assert few.held["weights"] == 2 * (last - 47 * 301_989_888 * 7 // 8)


def test_plan_of_a_student(tmp_path):
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
        10 * 4096 // 2 + 5 * 6144 + 5 * 20 * 128
    )
    assert plan.peak_phase == "update"


# The shipped examples


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name, tmp_path):
    write_json(tmp_path / "config.json", CONFIGS[name])
    architecture = read_architecture(str(tmp_path), flag="--hf-checkpoint")
    assert total_parameters(architecture, vocab_size=architecture.vocab_size) == PARAMETERS[name]


CLUSTER_EXAMPLES = [
    path
    for path in sorted((ROOT / "examples").glob("*/run.yaml"))
    if not (path.parent / "prepare.sh").exists()  # which makes the folders that such an example names
]


@pytest.mark.parametrize("path", CLUSTER_EXAMPLES, ids=lambda path: path.parent.name)
def test_shipped_examples_fit_on_paper(path, tmp_path):
    """With folders that have the published architectures in the place of downloaded ones, nothing fails."""
    run = stand_in(path, tmp_path)
    report = check_run(run)
    assert [f for f in report.findings if f.level == "fail"] == []
    assert {"student"} <= report.plans.keys()


def test_a_teacher_that_runs_elsewhere_takes_none_of_the_students_memory(folder):
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


def test_answers_from_disk_need_no_teacher_in_memory(folder):
    def from_disk(run: dict[str, Any], folder: Path) -> None:
        colocated(run, folder)
        run["student"]["load_debug_scored_data"] = str(folder / "answers")

    plan = check_run(read_run_file(str(write_run(folder, from_disk)))).plans["student"]
    assert "teacher weights" not in plan.held and "teacher" not in plan.phases


def test_likeliest_tokens_come_in_place_of_hidden_states(folder):
    """uld: no head of the teacher on the student's ranks, and --simct-uld-topk numbers a row over the
    wire.
    """
    reports = {
        topk: check_run(
            read_run_file(str(write_run(folder, student(simct_interface="uld", simct_uld_topk=topk))))
        )
        for topk in (1, 9, 0)
    }
    assert all("teacher head" not in report.plans["student"].held for report in reports.values())
    few, more, all_tokens = (report.traffic.answers for report in reports.values())
    assert (all_tokens - few) / (more - few) == (340 - 1) / (9 - 1), "the teacher has 340 tokens"


def test_values_of_the_pair_are_read(folder):
    run = read_run_file(str(write_run(folder)))
    assert run.config.rollout.rollout_batch_size == run_values(folder)["student"]["rollout_batch_size"]
