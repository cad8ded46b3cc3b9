"""Run files, the two command lines, the output of a dry run, its execution by a shell, and both
jobs on this machine.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_simct.config.flags import SERVE_TEACHER, parse_config
from megatron_simct.config.run_file import Job, RunFile, read_run_file, seconds
from megatron_simct.launch import __main__ as command
from megatron_simct.launch import local, slurm
from megatron_simct.launch.address import address_towards
from megatron_simct.launch.commands import command_of
from tests.preflight import build_pair, write_run

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden_launch")
VALUES = {
    "run_dir": "/runs/first",
    "student": {
        "hf_checkpoint": "/models/student",
        "prompt_data": "/data/prompts.jsonl",
        "rollout_max_prompt_len": 512,
        "stop_token_ids": [1, 106],
        "rollout_shuffle": False,
        "bf16": True,
        "train_iters": 300,
        "lr": "1e-6",
        "save_interval": 20,
    },
    "teacher": {
        "teacher_hf_checkpoint": "/models/teacher",
        "tensor_model_parallel_size": 8,
        "pipeline_model_parallel_size": 2,
        "bf16": True,
    },
    "cluster": {
        "kind": "slurm",
        "student": {"nodes": 1, "gpus_per_node": 8, "max_restarts": 2},
        "teacher": {"nodes": 2, "gpus_per_node": 8, "cpus_per_node": 64},
        "partition": "gpu",
        "account": "team",
        "time": "04:00:00",
        "sbatch": ["--constraint=h100"],
        "python": "/opt/env/bin/python",
    },
    "env": {"CUDA_DEVICE_MAX_CONNECTIONS": 1, "NCCL_DEBUG": "WARN"},
}
CONTAINERS = {
    "pyxis": {
        "runtime": "pyxis",
        "image": "/images/simct.sqsh",
        "mounts": ["/models:/models:ro", "/runs:/runs"],
    },
    "apptainer": {
        "runtime": "apptainer",
        "image": "/images/simct.sif",
        "mounts": ["/models:/models:ro", "/runs:/runs"],
    },
}


JOBS: list[dict[str, Any]] = [
    {
        "name": "vllm",
        "kind": "engine",
        "nodes": 2,
        "gpus_per_node": 8,
        "max_restarts": 3,
        "python": "/opt/vllm/bin/python",
        "command": [
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            "/models/teacher",
            "--port",
            "8100",
        ],
        "env": {"VLLM_LOGGING_LEVEL": "WARNING"},
    },
    {
        "name": "student",
        "kind": "student",
        "gpus_per_node": 8,
        "max_restarts": 2,
        "options": VALUES["student"],
    },
    {
        "name": "front",
        "kind": "teacher",
        "engine": "vllm",
        "options": {"teacher_hf_checkpoint": "/models/teacher"},
    },
    {
        "name": "small",
        "kind": "teacher",
        "nodes": 2,
        "gpus_per_node": 8,
        "options": VALUES["teacher"] | {"teacher_hf_checkpoint": "/models/small"},
    },
]
"""An engine with a front, and a second teacher."""


def listed(folder: Path, **changes) -> RunFile:
    """A run file with a list of jobs."""
    cluster = {key: value for key, value in VALUES["cluster"].items() if key not in ("student", "teacher")}
    sampler = {
        "name": "sampler",
        "kind": "engine",
        "python": "/opt/vllm/bin/python",
        "command": ["-m", "x", "--port=81"],
    }
    jobs = [dict(job) for job in JOBS]
    jobs[1] |= {"engine": "sampler", "options": jobs[1]["options"] | {"simct_interface": "bytes"}}
    jobs.append(sampler)
    values = {"run_dir": "/runs/first", "jobs": jobs, "cluster": cluster | changes, "env": VALUES["env"]}
    path = folder / "listed.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return read_run_file(str(path))


def run_of(folder: Path, **changes) -> RunFile:
    """VALUES, with other values for some sections."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(VALUES | changes, sort_keys=False))
    return read_run_file(str(path))


def with_cluster(folder: Path, **changes) -> RunFile:
    return run_of(folder, cluster=VALUES["cluster"] | changes)


def planned(folder: Path, name: str) -> str:
    """The output of a dry run."""
    if name == "local":
        size = {"gpus_per_node": 8}
        return local.dry_run(
            with_cluster(
                folder, kind="local", student=size, teacher=size | {"processes_per_node": 8}, time=None
            )
        )
    if name == "jobs":
        return slurm.job_script(listed(folder), directory="/code")
    if name == "jobs, local":
        return local.dry_run(listed(folder, kind="local", time=None))
    if name == "slurm, one job":
        student = VALUES["student"] | {"teacher_hf_checkpoint": "/models/teacher", "exit_eval_accuracy": 0.9}
        return slurm.job_script(run_of(folder, student=student, teacher=None), directory="/code")
    return slurm.job_script(with_cluster(folder, container=CONTAINERS.get(name)), directory="/code")


NAMES = ("local", "slurm", "slurm, one job", "pyxis", "apptainer", "jobs", "jobs, local")


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_is_as_written_down(name, tmp_path, monkeypatch) -> None:
    """SIMCT_WRITE_GOLDEN=1 writes the files again, so that a person can read the difference."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    path = GOLDEN / f"{name.replace(', ', '_').replace(' ', '_')}.sh"
    text = planned(tmp_path, name)
    if os.environ.get("SIMCT_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_is_clean_bash(name, tmp_path) -> None:
    script = tmp_path / "job.sh"
    text = planned(tmp_path, name)
    script.write_text(text if text.startswith("#!") else "#!/usr/bin/env bash\n" + text)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: only bash -n was run")
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_both_commands_parse_as_what_the_file_says(tmp_path) -> None:
    run = run_of(tmp_path)
    assert parse_config(command_of(run.student)[2:]) == run.config
    assert parse_config(command_of(run.jobs[1])[2:], SERVE_TEACHER) == run.teacher_configs["teacher"]
    assert (
        run.config.teacher_job.endpoint
        == (run.teacher_configs["teacher"].serving.run_dir,)
        == ("/runs/first/teacher",)
    )
    assert (
        run.config.teacher.hf_checkpoint
        == run.teacher_configs["teacher"].teacher.hf_checkpoint
        == "/models/teacher"
    )
    assert run.config.output.save == run.config.output.load == "/runs/first/checkpoint"
    assert run.config.output.exit_signal_handler and run.config.output.exit_duration_in_mins == 230
    assert (
        run.teacher_configs["teacher"].serving.rollout_max_prompt_len
        == run.config.rollout.rollout_max_prompt_len
        == 512
    )


def test_arguments_of_templates_reach_both_commands(tmp_path) -> None:
    student = VALUES["student"] | {
        "apply_chat_template": True,
        "chat_template_date": datetime.date(2025, 12, 31),
    }
    student["chat_template_kwargs"] = {"enable_thinking": False, "name": "a 'b' ß"}
    run = run_of(
        tmp_path, student=student, teacher=VALUES["teacher"] | {"teacher_chat_template_kwargs": '{"a": 1}'}
    )
    assert parse_config(command_of(run.student)[2:]) == run.config
    assert parse_config(command_of(run.jobs[1])[2:], SERVE_TEACHER) == run.teacher_configs["teacher"]
    assert json.loads(run.config.model.chat_template_kwargs) == student["chat_template_kwargs"]
    assert run.config.teacher.chat_template_kwargs == '{"a": 1}'
    assert run.config.data.chat_template_date == "2025-12-31"


EVIL = """'"; touch /tmp/simct-pwned; $(touch "$PWNED") `touch "$PWNED"` \\ & | > "$PWNED" * ~ """
EVIL += """\n touch "$PWNED" #"""


def evil_run(folder: Path, container: str | None) -> RunFile:
    values = json.loads(json.dumps(VALUES))
    values["student"] |= {key: EVIL for key in ("hf_checkpoint", "input_key", "wandb_project", "save")}
    values["student"]["prompt_data"] = "-" + EVIL
    values["teacher"]["teacher_tokenizer_model"] = EVIL
    values["cluster"]["python"] = EVIL
    values["env"] = {"A": EVIL}
    if container:
        values["cluster"]["container"] = CONTAINERS[container] | {
            "image": EVIL,
            "mounts": [f"/a{EVIL.replace(':', '')}:/b"],
        }
    (folder / "evil.yaml").write_text(yaml.safe_dump(values))
    return read_run_file(str(folder / "evil.yaml"))


def evil_jobs(folder: Path) -> RunFile:
    """An engine with a front. Every text value of the engine is EVIL."""
    values = json.loads(json.dumps(VALUES))
    student = values["student"] | {
        key: EVIL for key in ("hf_checkpoint", "input_key", "wandb_project", "save")
    }
    student["prompt_data"] = "-" + EVIL
    engine = {
        "name": "vllm",
        "kind": "engine",
        "python": EVIL,
        "command": [EVIL, "--port", "81"],
        "env": {"A": EVIL},
    }
    front = {
        "name": "teacher",
        "kind": "teacher",
        "engine": "vllm",
        "container": CONTAINERS["pyxis"] | {"image": EVIL},
    }
    front["options"] = {"teacher_hf_checkpoint": "/models/teacher", "teacher_tokenizer_model": EVIL}
    values["jobs"] = [{"name": "student", "kind": "student", "options": student}, engine, front]
    values["cluster"] = {"kind": "slurm"}
    del values["student"], values["teacher"]
    (folder / "evil.yaml").write_text(yaml.safe_dump(values))
    return read_run_file(str(folder / "evil.yaml"))


@pytest.mark.parametrize("container", [None, "pyxis", "apptainer", "jobs"])
def test_no_value_reaches_a_shell(container, tmp_path) -> None:
    """The scripts run with each of their commands replaced by one that writes down its arguments."""
    run = evil_jobs(tmp_path) if container == "jobs" else evil_run(tmp_path, container)
    pwned, calls, commands = tmp_path / "pwned", tmp_path / "calls", tmp_path / "bin"
    commands.mkdir()
    for name in ("srun", "scancel", "squeue", "sinfo", "scontrol"):
        (commands / name).write_text('#!/bin/bash\nprintf "%s\\0" "$@" >> "$CALLS"\necho x\n')
        (commands / name).chmod(0o755)
    script = slurm.job_script(run, directory=str(tmp_path)).replace("/runs/first", str(tmp_path / "run"))
    nodes = {f"SLURM_JOB_NODELIST_HET_GROUP_{i}": "n" for i in (0, 1, 2)}
    env = {"PATH": f"{commands}:/usr/bin:/bin", "CALLS": str(calls), "PWNED": str(pwned), "SLURM_JOB_ID": "1"}
    env |= nodes | {f"SLURM_JOB_ID_HET_GROUP_{i}": "2" for i in (1, 2)}
    result = subprocess.run(
        ["bash", "-c", script], env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    arguments = calls.read_text().split("\0")
    for flag in ("--hf-checkpoint", "--input-key", "--teacher-tokenizer-model"):
        assert f"{flag}={EVIL}" in arguments
    assert f"--prompt-data=-{EVIL}" in arguments and EVIL in arguments
    if container == "jobs":
        assert f"A={EVIL}" in arguments and "http://x:81" in arguments
    assert not pwned.exists() and not Path("/tmp/simct-pwned").exists()


def test_no_value_of_a_local_run_reaches_a_shell(tmp_path) -> None:
    run = evil_run(tmp_path, None)
    python, calls, pwned = tmp_path / "python", tmp_path / "calls", tmp_path / "pwned"
    # two at a time, a file for each
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$A" "$@" > "$CALLS.$$"\n')
    python.chmod(0o755)
    run = replace(run, run_dir=str(tmp_path / "run"), cluster=replace(run.cluster, python=str(python)))
    env = {"PATH": "/usr/bin:/bin", "CALLS": str(calls), "PWNED": str(pwned)}
    script = local.dry_run(run) + "wait\n"
    subprocess.run(["bash", "-c", script], env=env, check=True, timeout=60, cwd=tmp_path)
    arguments = [word for file in tmp_path.glob("calls.*") for word in file.read_text().split("\0")]
    assert f"--prompt-data=-{EVIL}" in arguments and f"--teacher-tokenizer-model={EVIL}" in arguments
    assert arguments.count(EVIL) == 2, "the environment of both jobs"
    assert not pwned.exists() and not Path("/tmp/simct-pwned").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"studnet": {}}, ["'studnet'", "did you mean student?"]),
        ({"run_dir": None}, ["run_dir"]),
        ({"run_dir": "/a b"}, ["run_dir", "'/a b'"]),
        ({"run_dir": "/a$(id)"}, ["run_dir"]),
        ({"student": {"micro_batch_sise": 2}}, ["student", "'micro_batch_sise'", "micro_batch_size"]),
        ({"student": {"num_layers": 2}}, ["num_layers", "Megatron-LM"]),
        ({"student": {"train_iters": "many"}}, ["--train-iters", "'many'"]),
        ({"teacher": {"max_tokens": 3}}, ["teacher", "'max_tokens'", "max_tokens_per_batch"]),
        ({"teacher": {"bf16": "yes"}}, ["--bf16", "'yes'"]),
        ({"student": {"teacher_hf_checkpoint": "/other"}}, ["student.teacher_hf_checkpoint", "differ"]),
        ({"cluster": ["slurm"]}, ["cluster", "`key: value`"]),
        ({"cluster": {"kind": "k8s"}}, ["cluster.kind", "'k8s'", "slurm"]),
        ({"cluster": {"student": {"nodes": 0}}}, ["cluster.student.nodes 0"]),
        ({"cluster": {"student": {"nodes": "two"}}}, ["cluster.student.nodes", "int"]),
        (
            {"cluster": {"student": {"gpu_per_node": 8}}},
            ["cluster.student", "'gpu_per_node'", "gpus_per_node"],
        ),
        ({"cluster": {"teacher": {"processes_per_node": 0}}}, ["cluster.teacher.processes_per_node 0"]),
        ({"cluster": {"time": 240}}, ["cluster.time", "quotes"]),
        ({"cluster": {"time": "4 hours"}}, ["cluster.time", "HH:MM:SS"]),
        ({"cluster": {"time": "10", "kind": "slurm"}}, ["cluster.time", "grace_s"]),
        ({"cluster": {"grace_s": 0}}, ["cluster.grace_s 0"]),
        ({"cluster": {"device_memory_gib": 0}}, ["cluster.device_memory_gib 0"]),
        ({"cluster": {"device_memory_gib": float("nan")}}, ["cluster.device_memory_gib nan"]),
        ({"cluster": {"partition": "a\n#SBATCH --wrap=x"}}, ["cluster.partition"]),
        ({"cluster": {"job_name": "x; id"}}, ["cluster.job_name"]),
        ({"cluster": {"sbatch": ["--comment=$(id)"]}}, ["cluster.sbatch[0]"]),
        ({"cluster": {"sbatch": ["gpu"]}}, ["cluster.sbatch", "not an option"]),
        ({"cluster": {"container": {"runtime": "docker", "image": "x"}}}, ["container.runtime", "pyxis"]),
        ({"cluster": {"container": {"runtime": "pyxis"}}}, ["cluster.container", "image is missing"]),
        (
            {"cluster": {"container": {"runtime": "pyxis", "image": "x", "mounts": ["/a"]}}},
            ["mounts", "'/a'"],
        ),
        (
            {"cluster": {"container": {"runtime": "pyxis", "image": "x", "mounts": ["/a:/b,/c:/d"]}}},
            ["mounts"],
        ),
        ({"env": {"WANDB_API_KEY": "the-secret"}}, ["env", "WANDB_API_KEY", "secret"]),
        ({"env": {"HF_TOKEN": "the-secret"}}, ["env", "HF_TOKEN", "secret"]),
        (
            {"env": {"ENDPOINT": "postgres://me:the-secret@host/x"}},
            ["env", "the value of ENDPOINT", "secret"],
        ),
        ({"env": {"A B": "c"}}, ["env", "'A B'"]),
        ({"env": {"A": ["c"]}}, ["env", "A"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_wrong_run_file_is_one_line(change, words, tmp_path, capsys) -> None:
    values = json.loads(json.dumps(VALUES))
    for section, value in change.items():
        values[section] = values.get(section, {}) | value if isinstance(value, dict) else value
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert command.main([str(path), "--dry-run"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"megatron_simct.launch: error: {path}: ")
    for word in words:
        assert word in captured.err, captured.err
    assert "the-secret" not in captured.err


SECRET_NAMES = (
    *(
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "GITHUB_PAT",
        "HUGGINGFACEHUB_APITOKEN",
        "OPENAI_APIKEY",
    ),
    *(
        "MYSQL_PWD",
        "PGPASS",
        "PGPASSFILE",
        "NETRC",
        "DATABASE_URL",
        "AWS_SESSION_TOKEN",
        "SSH_PRIVATE_KEY",
        "PASSPHRASE",
    ),
    *("BEARER", "AUTH", "REDIS_URL", "MY_PASSWORD_FILE", "mypassword", "SENTRY_DSN", "API_KEYS"),
)
SECRET_VALUES = (
    *(
        "ghp_" + "a1B2" * 9,
        "hf_" + "abCD" * 8,
        "sk-" + "proj-a1B2" * 4,
        "AKIA" + "ABCD1234" * 2,
        "glpat-" + "a1B2" * 5,
    ),
    *(
        "http://user:word@proxy:3128",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln",
        "0123456789abcdef" * 2 + "01234567",
    ),
    "-----BEGIN OPENSSH PRIVATE KEY-----",
)
NO_SECRETS = {
    **{"NCCL_DEBUG": "WARN", "PATH": "/usr/bin:/bin", "PWD": "/home/x", "TOKENIZERS_PARALLELISM": "false"},
    **{
        "HTTP_PROXY": "http://proxy:3128",
        "MONKEY": "1",
        "KEYBOARD": "de",
        "MASTER_ADDR": "10.0.0.1",
        "COMPASS": "n",
    },
    **{
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HOME": "/data/hf_cache",
        "WANDB_ENTITY": "team",
        "OMP_NUM_THREADS": 4,
    },
    **{
        "TASK_NAME": "sk-learn",
        "NUM_PASSES": 2,
        "PATTERN": "x",
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
    },
}


@pytest.mark.parametrize(
    "name, value", [(n, "x") for n in SECRET_NAMES] + [("PLAIN", v) for v in SECRET_VALUES]
)
def test_what_looks_like_a_secret_is_refused(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="looks like a secret") as raised:
        run_of(tmp_path, env={name: value})
    assert name in str(raised.value) and (value == "x" or value not in str(raised.value))


def test_what_does_not_look_like_a_secret_is_taken(tmp_path: Path) -> None:
    assert NO_SECRETS.keys() <= run_of(tmp_path, env=NO_SECRETS).env.keys()


@pytest.mark.parametrize("number", ["--user=root", "1 2", "-u", "", "٣", 41, None, ["1"]])
def test_a_number_of_a_job_that_is_not_one_reaches_no_command(
    number: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, run_dir=str(tmp_path / "run"))
    Path(run.run_dir).mkdir(parents=True, exist_ok=True)
    (Path(run.run_dir) / "job.json").write_text(json.dumps({"job_id": number}))
    monkeypatch.setattr(slurm, "_call", lambda *_: pytest.fail("a command was called"))
    for action in (slurm.cancel, slurm.status, lambda run: slurm.submit(run, directory="/")):
        with pytest.raises(ValueError, match=r"job\.json is damaged"):
            action(run)


LISTED = [
    ([{"name": "a b"}], "each job needs a different name"),
    (
        [{"name": "student", "kind": "student"}, {"name": "student", "kind": "teacher"}],
        "each job needs a different name",
    ),
    ([{"name": "student", "kind": "teacher"}], "only the student's job may have the name student"),
    ([{"name": "t", "kind": "teacher"}], "exactly one must be of kind student"),
    (
        [{"name": "s", "kind": "student"}, *({"name": n, "kind": "teacher"} for n in "abc")],
        "a student has at most two",
    ),
    ([{"name": "s", "kind": "trainer"}], "jobs.s.kind: 'trainer' must be one of student, teacher, engine"),
    ([{"name": "s", "kind": "student", "node": 2}], "jobs.s: unknown key 'node'; did you mean nodes?"),
    ([{"name": "s", "kind": "student", "nodes": 0}], "jobs.s.nodes 0: must be at least 1"),
    ([{"name": "s", "kind": "student", "options": {"lrr": 1}}], "s: unknown key 'lrr'"),
    (
        [{"name": "s", "kind": "student", "env": {"HF_TOKEN": "x"}}],
        "jobs.s: env: HF_TOKEN looks like a secret",
    ),
    ([{"name": "s", "kind": "student"}, {"name": "e", "kind": "engine"}], "jobs.e: command is missing"),
    ([{"name": "s", "kind": "student", "command": ["x"]}], "jobs.s: command: only an engine has a command"),
    (
        [{"name": "s", "kind": "student"}, {"name": "t", "kind": "teacher", "engine": "x"}],
        "jobs.t: engine 'x'",
    ),
    (
        [{"name": "s", "kind": "student"}, {"name": "e", "kind": "engine", "command": ["--port=x"]}],
        "--port 'x'",
    ),
    ("student", "jobs: expected a list"),
]


@pytest.mark.parametrize("jobs, words", LISTED, ids=[words[:30] for _, words in LISTED])
def test_a_wrong_list_of_jobs(jobs, words, tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "r"), "jobs": jobs}))
    with pytest.raises(ValueError) as error:
        read_run_file(str(path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_list_of_jobs_is_what_its_sections_are(tmp_path) -> None:
    """The same run in both forms has the same commands. Overrides name a job. A second
    teacher is connected.
    """
    short = run_of(tmp_path)
    jobs = [
        {"name": kind, "kind": kind, "options": VALUES[kind]} | VALUES["cluster"][kind]
        for kind in ("teacher", "student")
    ]
    cluster = {key: value for key, value in VALUES["cluster"].items() if key not in ("student", "teacher")}
    path = tmp_path / "listed.yaml"
    path.write_text(
        yaml.safe_dump(VALUES | {"jobs": jobs, "student": None, "teacher": None, "cluster": cluster})
    )
    long = read_run_file(str(path))
    assert [command_of(job) for job in long.jobs] == [command_of(job) for job in short.jobs]
    assert slurm.job_script(long, directory="/c") == slurm.job_script(short, directory="/c")
    changed = read_run_file(str(path), ["jobs.teacher.nodes=5", "jobs.student.options.lr=3e-6"])
    assert changed.jobs[1].nodes == 5 and changed.config.training.lr == 3e-6
    with pytest.raises(ValueError, match="no job has the name teachr"):
        read_run_file(str(path), ["jobs.teachr.nodes=5"])
    with pytest.raises(ValueError, match="teacher is a section of the short form"):
        read_run_file(str(path), ["teacher.bf16=true"])

    run = listed(tmp_path)
    assert run.config.second_teacher.hf_checkpoint == "/models/small"
    assert run.config.mixture.endpoint == ("/runs/first/small",)
    assert run.teacher_configs["front"].engine.endpoint == ("http://vllm:8100",)
    assert run.config.rollout.rollout_engine == "vllm"
    assert run.config.rollout.rollout_engine_endpoint == ("http://sampler:81",)
    assert listed(tmp_path, kind="local", time=None).teacher_configs["front"].engine.endpoint == (
        "http://127.0.0.1:8100",
    )


def test_files_that_are_none_and_overrides(tmp_path) -> None:
    for text, words in (
        ("a: [", "line 1"),
        ("- a", "expected the sections"),
        ("\xff", "not YAML"),
        ("a: 2026-13-45", "bad.yaml: not YAML: month"),
    ):
        (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=words):
            read_run_file(str(tmp_path / "bad.yaml"))
    with pytest.raises(ValueError, match="No such file"):
        read_run_file(str(tmp_path / "nowhere.yaml"))
    path = str(tmp_path / "run.yaml")
    run_of(tmp_path)
    run = read_run_file(
        path, ["student.lr=2e-5", "cluster.teacher.nodes=4", "env.A=b c", "teacher.run_dir=/x"]
    )
    assert run.config.training.lr == 2e-5 and run.cluster.teacher.nodes == 4 and run.env["A"] == "b c"
    assert run.config.teacher_job.endpoint == ("/x",)
    for override, words in (
        ("lr", "section.key=value"),
        ("run_dir.x=1", "not a section"),
        ("student.lr=[", "YAML"),
        ("env.A=2026-13-45", "quote it"),
    ):
        with pytest.raises(ValueError, match=words):
            read_run_file(path, [override])


def test_the_smallest_file_of_the_help_is_one(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("    run_dir: runs/first")
    (tmp_path / "run.yaml").write_text("\n".join(line.strip() for line in lines[begin : begin + 3]))
    run = read_run_file(str(tmp_path / "run.yaml"))
    assert end.value.code == 0 and run.teacher_configs["teacher"].teacher.hf_checkpoint == "TEACHER_DIR"
    with pytest.raises(SystemExit):
        command.main([])
    assert capsys.readouterr().err.endswith(": error: the following arguments are required: RUN.yaml\n")


def test_times_are_those_of_slurm() -> None:
    for text, value in (("90", 5400), ("1:30", 90), ("01:02:03", 3723), ("2-12", 216000), ("1-00:30", 88200)):
        assert seconds(text) == value


def test_what_fails_the_pre_flight_is_not_started(tmp_path, capsys, monkeypatch) -> None:
    build_pair(tmp_path)
    path = str(write_run(tmp_path))
    monkeypatch.setattr(slurm, "submit", lambda *_, **__: pytest.fail("submitted"))
    monkeypatch.setattr(local, "start", lambda *_: pytest.fail("started"))
    assert command.main([path, "student.micro_batch_size=5"]) == 1
    captured = capsys.readouterr()
    assert "--micro-batch-size" in captured.err and "nothing was started" in captured.err
    assert not (tmp_path / "run").exists()
    # A dry run shows the plan and its errors.
    assert command.main([path, "student.micro_batch_size=5", "--dry-run"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("#!/usr/bin/env bash") and "--micro-batch-size" in captured.err
    assert not (tmp_path / "run").exists()


FAKE_SBATCH = """#!/bin/bash
[ "$(umask)" = 0077 ] || exit 9
echo "$@" >> "$CALLS"
case "${0##*/}" in
    sbatch) echo "41;cluster" ;;
    squeue) printf '41+0|RUNNING|0:10|node1\\n41+1|RUNNING|0:10|node2\\n' ;;
    scancel) ;;
esac
"""


def test_submit_status_logs_cancel(tmp_path, capsys, monkeypatch) -> None:
    build_pair(tmp_path)
    path = str(write_run(tmp_path))
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        (commands / name).write_text(FAKE_SBATCH)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    assert command.main(["cancel", path]) == 1
    assert "no job was submitted" in capsys.readouterr().err
    assert command.main([path]) == 0
    run = tmp_path / "run"
    assert f"job 41 of {run}/job.sh" in capsys.readouterr().out
    assert (run / "job.sh").read_text() == slurm.job_script(read_run_file(path), directory=os.getcwd())
    for file, mode in (
        (run, 0o700),
        (run / "logs", 0o700),
        (run / "job.sh", 0o700),
        (run / "job.json", 0o600),
    ):
        assert stat.S_IMODE(file.stat().st_mode) == mode
    assert command.main([path]) == 1, "it is still running"
    assert "still RUNNING" in capsys.readouterr().err
    (run / "student").mkdir()
    rows = [{"kind": "step", "iteration": 3, "loss": 0.5}, {"kind": "evaluation", "iteration": 3}]
    (run / "student" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "step", "iter'
    )
    assert command.main(["status", path]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "job 41+0 (student): RUNNING for 0:10, node1",
        "job 41+1 (teacher): RUNNING for 0:10, node2",
        "iteration 3 of 100, loss 0.500000",
    ]
    (run / "logs" / "student-0.log").write_text("one\ntwo")
    assert command.main(["logs", path]) == 0
    assert capsys.readouterr().out == "[student-0] one\n[student-0] two\n"
    assert command.main(["cancel", path]) == 0
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "41"
    assert command.main(["status", path, "cluster.kind=local", "cluster.teacher.nodes=1"]) == 1


def test_without_slurm_it_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    values = run_of(tmp_path, run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="sbatch is not on this machine"):
        slurm.submit(values, directory="/")


def test_the_address_towards_a_host() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"


def test_each_local_job_has_gpus_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cluster = {"kind": "local", "student": {"gpus_per_node": 2}, "teacher": {"gpus_per_node": 3}}
    run = run_of(tmp_path, cluster=cluster)
    given = {job: variables["CUDA_VISIBLE_DEVICES"] for job, variables in local.devices(run).items()}
    assert given == {"student": "0,1", "teacher": "2,3,4"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1,0")
    assert local.devices(run)["teacher"] == {"CUDA_VISIBLE_DEVICES": "3,1,0"}
    on_cpus = local.devices(run_of(tmp_path, cluster={"kind": "local"}))
    assert on_cpus == dict.fromkeys(("student", "teacher"), {"CUDA_VISIBLE_DEVICES": ""})
    for visible, count in (("7,5,3", 3), ("", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(
            ValueError, match=f"={visible} has {count} of 5 GPUs .*cluster.teacher.gpus_per_node 3"
        ):
            local.devices(run)


# Both jobs on this machine. A process that starts a worker and waits for it stands in for torchrun.

TORCHRUN = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-u", "-c", sys.argv[1]]).returncode)
"""
# Each writes a file when it handles signals, and the student another one when it was asked to stop.
TEACHER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("ready")
Path("TEACHER").touch()
time.sleep(600)
"""
STUDENT = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
print("step 1")
Path("STUDENT").touch()
time.sleep(600)
"""
DEAF = """
import signal, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: Path("ASKED").touch())
Path("STUDENT").touch()
end = time.monotonic() + 600
while time.monotonic() < end: time.sleep(1)  # what a signal does not wake
Path("ENDED").touch()
"""
DYING = """
import time
from pathlib import Path
while not Path("STUDENT").exists() or not Path("TEACHER").exists(): time.sleep(0.05)
exit(3)
"""
FILES = ("STUDENT", "TEACHER", "ASKED", "ENDED", "DIED")
BOTH_HEED = ("STUDENT", "TEACHER")


def start_local(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    student: str,
    teacher: str = TEACHER,
    engine: str | None = None,
    interrupts: Sequence[Sequence[str]] = (),
    number: signal.Signals = signal.SIGINT,
) -> int:
    """Exit code of a run of two programs. interrupts: for each Ctrl-C, or other signal, the one of FILES
    for which it waits.
    """
    programs = {"teacher": teacher, "student": student} | ({"vllm": engine} if engine else {})
    for name in FILES:
        programs = {
            job: code.replace(f'"{name}"', repr(str(tmp_path / name))) for job, code in programs.items()
        }
    run = run_of(tmp_path, run_dir=str(tmp_path / "run"), cluster={"kind": "local", "grace_s": 600})
    if engine:
        run = replace(run, jobs=(*run.jobs, Job(name="vllm", kind="engine", command=("x",), max_restarts=1)))
    # As torchrun does it: the parent waits for a worker, which SIGTERM to itself stops.
    jobs = {name: [sys.executable, "-c", TORCHRUN, code] for name, code in programs.items()}
    jobs |= {"vllm": [sys.executable, "-u", "-c", programs["vllm"]]} if engine else {}
    monkeypatch.setattr(local, "commands", lambda _: jobs)
    monkeypatch.setattr(local, "_POLL_S", 0.02)

    def send() -> None:
        for names in interrupts:
            while not all((tmp_path / name).exists() for name in names):
                if over.wait(0.05):
                    return
            os.kill(os.getpid(), number)

    over = threading.Event()
    sender = threading.Thread(target=send)
    sender.start()
    try:
        return local.start(run)
    finally:
        over.set()
        sender.join()


def test_the_exit_code_is_the_students_and_the_teacher_is_stopped(tmp_path, monkeypatch, capsys) -> None:
    before = signal.getsignal(signal.SIGINT)
    ends = DYING.replace('not Path("STUDENT").exists() or ', "").replace(
        "exit(3)", 'print("step 1")\nexit(7)'
    )
    assert start_local(tmp_path, monkeypatch, student=ends) == 7
    out = capsys.readouterr().out
    assert "[teacher] ready\n" in out and "[student] step 1\n" in out
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert signal.getsignal(signal.SIGINT) is before


def test_one_interrupt_lets_the_student_save(tmp_path, monkeypatch, capsys) -> None:
    assert start_local(tmp_path, monkeypatch, student=STUDENT, interrupts=[BOTH_HEED]) == 0
    captured = capsys.readouterr()
    assert "[student] saved\n" in captured.out and "stopping" in captured.err


def test_a_second_interrupt_ends_both(tmp_path, monkeypatch) -> None:
    assert (
        start_local(tmp_path, monkeypatch, student=DEAF, interrupts=[BOTH_HEED, ["ASKED"]])
        == 128 + signal.SIGKILL
    )
    assert not (tmp_path / "ENDED").exists(), "it was killed, not waited for"


@pytest.mark.parametrize("dies", ["teacher", "student"])
def test_an_interrupt_ends_the_wait_for_the_other_job(tmp_path, monkeypatch, dies) -> None:
    """One job has ended by itself, and the other ignores the request to stop."""
    monkeypatch.setattr(local, "_OTHERS_STOP_S", 600.0)
    dying = DYING.replace(f'not Path("{dies.upper()}").exists()', "False")
    deaf = DEAF.replace("STUDENT", "TEACHER" if dies == "student" else "STUDENT")
    code = start_local(
        tmp_path, monkeypatch, **{"teacher": deaf, "student": deaf} | {dies: dying}, interrupts=[["ASKED"]]
    )
    assert code == (1 if dies == "teacher" else 3)
    assert not (tmp_path / "ENDED").exists(), "it was killed, not waited for"


def test_a_teacher_that_dies_ends_the_run(tmp_path, monkeypatch, capsys) -> None:
    dying = DYING.replace('not Path("TEACHER").exists()', "False")
    assert start_local(tmp_path, monkeypatch, student=STUDENT, teacher=dying) == 1
    captured = capsys.readouterr()
    assert "the job teacher ended with exit code 3" in captured.err and "[student] saved" in captured.out


KILLED = """
import os, sys
from tests.unit import test_launch
test_launch.start_and_kill(sys.argv[1])
"""


def start_and_kill(folder: str) -> None:
    """Jobs of processes that start processes, and a launcher that is killed when all of them run."""
    begin = (
        f"import os\nfor pid in os.getpid(), os.getppid(): open({folder + '/pid-'!r} + str(pid), "
        "'w').close()\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        jobs = {"student": begin + STUDENT, "teacher": begin + TEACHER}
        start_local(Path(folder), patch, **jobs, interrupts=[BOTH_HEED], number=signal.SIGKILL)


def test_a_launcher_that_is_killed_leaves_no_job(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert len(pids) == 4
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "a job has outlived its launcher"
        time.sleep(0.05)


ENGINE = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (print("stopped"), sys.exit(0)))
if not Path("DIED").exists():
    while not Path("STUDENT").exists(): time.sleep(0.05)
    Path("DIED").touch()
    exit(9)
print("again")
Path("ENDED").touch()
time.sleep(600)
"""


def test_an_engine_that_dies_starts_again_and_is_stopped_at_the_end(tmp_path, monkeypatch, capsys) -> None:
    student = STUDENT.replace(
        "time.sleep(600)", 'while not Path("ENDED").exists(): time.sleep(0.05)\nexit(7)'
    )
    assert start_local(tmp_path, monkeypatch, student=student, engine=ENGINE) == 7
    captured = capsys.readouterr()
    assert "the job vllm ended with exit code 9; starting it again" in captured.err
    assert "[vllm] again\n[vllm] stopped\n" in captured.out
