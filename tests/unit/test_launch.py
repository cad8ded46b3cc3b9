"""Run files, the two command lines, what a dry run prints, what a shell makes of it, and both jobs on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_simct.arguments import SERVE_TEACHER, parse_config
from megatron_simct.launch import __main__ as command
from megatron_simct.launch import local, slurm
from megatron_simct.launch.address import address_towards
from megatron_simct.launch.commands import student_command, teacher_command
from megatron_simct.launch.run_file import RunFile, read_run_file, seconds
from tests.preflight import build_pair, write_run

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
    "pyxis": {"runtime": "pyxis", "image": "/images/simct.sqsh", "mounts": ["/models:/models:ro", "/runs:/runs"]},
    "apptainer": {
        "runtime": "apptainer",
        "image": "/images/simct.sif",
        "mounts": ["/models:/models:ro", "/runs:/runs"],
    },
}


def run_of(folder: Path, **changes) -> RunFile:
    """VALUES, with other values for some sections."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(VALUES | changes, sort_keys=False))
    return read_run_file(str(path))


def with_cluster(folder: Path, **changes) -> RunFile:
    return run_of(folder, cluster=VALUES["cluster"] | changes)


def planned(folder: Path, name: str) -> str:
    """What a dry run prints."""
    if name == "local":
        size = {"gpus_per_node": 8}
        return local.dry_run(
            with_cluster(folder, kind="local", student=size, teacher=size | {"processes_per_node": 8}, time=None)
        )
    if name == "slurm, one job":
        student = VALUES["student"] | {"teacher_hf_checkpoint": "/models/teacher", "exit_eval_accuracy": 0.9}
        return slurm.job_script(run_of(folder, student=student, teacher=None), directory="/code")
    return slurm.job_script(with_cluster(folder, container=CONTAINERS.get(name)), directory="/code")


NAMES = ("local", "slurm", "slurm, one job", "pyxis", "apptainer")


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_is_as_written_down(name, tmp_path, monkeypatch):
    """SIMCT_WRITE_GOLDEN=1 writes the files anew, for a person to read the difference."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    path = GOLDEN / f"{name.replace(', ', '_').replace(' ', '_')}.sh"
    text = planned(tmp_path, name)
    if os.environ.get("SIMCT_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_is_clean_bash(name, tmp_path):
    script = tmp_path / "job.sh"
    text = planned(tmp_path, name)
    script.write_text(text if text.startswith("#!") else "#!/usr/bin/env bash\n" + text)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: only bash -n was run")
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_both_commands_parse_as_what_the_file_says(tmp_path):
    run = run_of(tmp_path)
    assert parse_config(student_command(run)[2:]) == run.config
    assert parse_config(teacher_command(run)[2:], SERVE_TEACHER) == run.teacher_config
    assert run.config.teacher_job.endpoint == (run.teacher_config.serving.run_dir,) == ("/runs/first/teacher",)
    assert run.config.teacher.hf_checkpoint == run.teacher_config.teacher.hf_checkpoint == "/models/teacher"
    assert run.config.output.save == run.config.output.load == "/runs/first/checkpoint"
    assert run.config.output.exit_signal_handler and run.config.output.exit_duration_in_mins == 230
    assert run.teacher_config.serving.rollout_max_prompt_len == run.config.rollout.rollout_max_prompt_len == 512


EVIL = """'"; touch /tmp/simct-pwned; $(touch "$PWNED") `touch "$PWNED"` \\ & | > "$PWNED" * ~ \n touch "$PWNED" #"""


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


@pytest.mark.parametrize("container", [None, "pyxis", "apptainer"])
def test_no_value_reaches_a_shell(container, tmp_path):
    """The scripts run with every command of theirs replaced by one that writes down its arguments."""
    run = evil_run(tmp_path, container)
    pwned, calls, commands = tmp_path / "pwned", tmp_path / "calls", tmp_path / "bin"
    commands.mkdir()
    for name in ("srun", "scancel", "squeue", "sinfo", "scontrol"):
        (commands / name).write_text('#!/bin/bash\nprintf "%s\\0" "$@" >> "$CALLS"\necho x\n')
        (commands / name).chmod(0o755)
    script = slurm.job_script(run, directory=str(tmp_path)).replace("/runs/first", str(tmp_path / "run"))
    nodes = {f"SLURM_JOB_NODELIST_HET_GROUP_{i}": "n" for i in (0, 1)}
    env = {"PATH": f"{commands}:/usr/bin:/bin", "CALLS": str(calls), "PWNED": str(pwned), "SLURM_JOB_ID": "1"}
    env |= nodes | {"SLURM_JOB_ID_HET_GROUP_1": "2"}
    result = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    arguments = calls.read_text().split("\0")
    for flag in ("--hf-checkpoint", "--input-key", "--teacher-tokenizer-model"):
        assert f"{flag}={EVIL}" in arguments
    assert f"--prompt-data=-{EVIL}" in arguments and EVIL in arguments
    assert not pwned.exists() and not Path("/tmp/simct-pwned").exists()


def test_no_value_of_a_local_run_reaches_a_shell(tmp_path):
    run = evil_run(tmp_path, None)
    python, calls, pwned = tmp_path / "python", tmp_path / "calls", tmp_path / "pwned"
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$A" "$@" > "$CALLS.$$"\n')  # two at a time, a file each
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
        ({"cluster": {"student": {"gpu_per_node": 8}}}, ["cluster.student", "'gpu_per_node'", "gpus_per_node"]),
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
        ({"cluster": {"sbatch": ["gpu"]}}, ["cluster.sbatch", "no option"]),
        ({"cluster": {"container": {"runtime": "docker", "image": "x"}}}, ["container.runtime", "pyxis"]),
        ({"cluster": {"container": {"runtime": "pyxis"}}}, ["cluster.container", "image is missing"]),
        ({"cluster": {"container": {"runtime": "pyxis", "image": "x", "mounts": ["/a"]}}}, ["mounts", "'/a'"]),
        ({"cluster": {"container": {"runtime": "pyxis", "image": "x", "mounts": ["/a:/b,/c:/d"]}}}, ["mounts"]),
        ({"env": {"WANDB_API_KEY": "the-secret"}}, ["env", "WANDB_API_KEY", "secret"]),
        ({"env": {"HF_TOKEN": "the-secret"}}, ["env", "HF_TOKEN", "secret"]),
        ({"env": {"A B": "c"}}, ["env", "'A B'"]),
        ({"env": {"A": ["c"]}}, ["env", "A"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_wrong_run_file_is_one_line(change, words, tmp_path, capsys):
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


def test_files_that_are_none_and_overrides(tmp_path):
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
    run = read_run_file(path, ["student.lr=2e-5", "cluster.teacher.nodes=4", "env.A=b c", "teacher.run_dir=/x"])
    assert run.config.training.lr == 2e-5 and run.cluster.teacher.nodes == 4 and run.env["A"] == "b c"
    assert run.config.teacher_job.endpoint == ("/x",)
    for override, words in (
        ("lr", "section.key=value"),
        ("run_dir.x=1", "no section"),
        ("student.lr=[", "YAML"),
        ("env.A=2026-13-45", "quote it"),
    ):
        with pytest.raises(ValueError, match=words):
            read_run_file(path, [override])


def test_the_smallest_file_of_the_help_is_one(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("    run_dir: runs/first")
    (tmp_path / "run.yaml").write_text("\n".join(line.strip() for line in lines[begin : begin + 3]))
    run = read_run_file(str(tmp_path / "run.yaml"))
    assert end.value.code == 0 and run.teacher_config.teacher.hf_checkpoint == "TEACHER_DIR"
    with pytest.raises(SystemExit):
        command.main([])
    assert capsys.readouterr().err.endswith(": error: the following arguments are required: RUN.yaml\n")


def test_times_are_those_of_slurm():
    for text, value in (("90", 5400), ("1:30", 90), ("01:02:03", 3723), ("2-12", 216000), ("1-00:30", 88200)):
        assert seconds(text) == value


def test_what_fails_the_pre_flight_is_not_started(tmp_path, capsys, monkeypatch):
    build_pair(tmp_path)
    path = str(write_run(tmp_path))
    monkeypatch.setattr(slurm, "submit", lambda *_, **__: pytest.fail("submitted"))
    monkeypatch.setattr(local, "start", lambda *_: pytest.fail("started"))
    assert command.main([path, "student.micro_batch_size=5"]) == 1
    captured = capsys.readouterr()
    assert "--micro-batch-size" in captured.err and "nothing was started" in captured.err
    assert not (tmp_path / "run").exists()
    # A dry run shows the plan and what is wrong with it.
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


def test_submit_status_logs_cancel(tmp_path, capsys, monkeypatch):
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
    for file, mode in ((run, 0o700), (run / "logs", 0o700), (run / "job.sh", 0o700), (run / "job.json", 0o600)):
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
        "job 41+0: RUNNING for 0:10, node1",
        "job 41+1: RUNNING for 0:10, node2",
        "iteration 3 of 100, loss 0.500000",
    ]
    (run / "logs" / "student-0.log").write_text("one\ntwo")
    assert command.main(["logs", path]) == 0
    assert capsys.readouterr().out == "[student-0] one\n[student-0] two\n"
    assert command.main(["cancel", path]) == 0
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "41"
    assert command.main(["status", path, "cluster.kind=local", "cluster.teacher.nodes=1"]) == 1


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    values = run_of(tmp_path, run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="sbatch is not on this machine"):
        slurm.submit(values, directory="/")


def test_the_address_towards_a_host():
    assert address_towards("127.0.0.1") == "127.0.0.1"


def test_each_local_job_has_gpus_of_its_own(tmp_path, monkeypatch):
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
        with pytest.raises(ValueError, match=f"={visible} has {count} of 5 GPUs .*cluster.teacher.gpus_per_node 3"):
            local.devices(run)


# Both jobs on this machine: torchrun in the shape of a process that starts a worker and waits for it.

TORCHRUN = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-u", "-c", sys.argv[1]]).returncode)
"""
# Each tells by a file that it heeds signals.
TEACHER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("ready")
open("READY", "w").close()
time.sleep(60)
"""
STUDENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
print("step 1")
open("READY", "w").close()
time.sleep({seconds})
sys.exit({code})
"""


DEAF = "import time\ndef wait():\n    end = time.monotonic() + 60\n    while time.monotonic() < end: time.sleep(1)\n"
"""What a signal does not wake."""


def start_local(
    tmp_path,
    monkeypatch,
    *,
    student: str,
    teacher: str = TEACHER,
    interrupt: int = 0,
    when: Path | None = None,
    grace_s: int = 20,
) -> int:
    """Exit code of a run of two programs, interrupted so many times once both heed signals, or `when` is there."""
    ready = [tmp_path / name for name in ("student", "teacher")]
    student, teacher = (code.replace("READY", str(path)) for code, path in zip((student, teacher), ready, strict=True))
    run = run_of(
        tmp_path,
        run_dir=str(tmp_path / "run"),
        cluster={"kind": "local", "grace_s": grace_s},
    )
    # As torchrun does it: a worker that the parent waits for, stopped by SIGTERM to itself.
    jobs = {name: [sys.executable, "-c", TORCHRUN, code] for name, code in (("teacher", teacher), ("student", student))}
    monkeypatch.setattr(local, "commands", lambda _: jobs)
    monkeypatch.setattr(local, "_POLL_S", 0.02)

    def send() -> None:
        if not interrupt:
            return
        while not all(path.exists() for path in ([when] if when is not None else ready)):
            if over.wait(0.05):
                return
        for number in range(interrupt):
            time.sleep(1.5 * number)
            os.kill(os.getpid(), signal.SIGINT)

    over = threading.Event()
    sender = threading.Thread(target=send)
    sender.start()
    try:
        return local.start(run)
    finally:
        over.set()
        sender.join()


def test_the_exit_code_is_the_students_and_the_teacher_is_stopped(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert start_local(tmp_path, monkeypatch, student=STUDENT.format(seconds=1, code=7)) == 7
    out = capsys.readouterr().out
    assert "[teacher] ready\n" in out and "[student] step 1\n" in out
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert signal.getsignal(signal.SIGINT) is before


def test_one_interrupt_lets_the_student_save(tmp_path, monkeypatch, capsys):
    assert start_local(tmp_path, monkeypatch, student=STUDENT.format(seconds=60, code=1), interrupt=1) == 0
    captured = capsys.readouterr()
    assert "[student] saved\n" in captured.out and "stopping" in captured.err


def test_a_second_interrupt_ends_both(tmp_path, monkeypatch):
    deaf = STUDENT.format(seconds=60, code=1).replace("sys.exit(0)", "None").replace("time.sleep(60)", "wait()")
    assert start_local(tmp_path, monkeypatch, student=DEAF + deaf, interrupt=2) == 128 + signal.SIGKILL


@pytest.mark.parametrize("dies", ["teacher", "student"])
def test_an_interrupt_ends_the_wait_for_the_other_job(tmp_path, monkeypatch, dies):
    """One job has ended by itself, and the other does not heed that it was asked to stop."""
    monkeypatch.setattr(local, "_TEACHER_STOP_S", 600.0)
    listens, asked, ended = (tmp_path / name for name in ("listens", "asked", "ended"))
    deaf = (
        f"{DEAF}import signal\nfrom pathlib import Path\n"
        f"signal.signal(signal.SIGTERM, lambda *_: Path({str(asked)!r}).touch())\n"
        f"Path({str(listens)!r}).touch()\nwait()\nPath({str(ended)!r}).touch()"
    )
    dying = f"import os, time\nwhile not os.path.exists({str(listens)!r}): time.sleep(0.05)\nexit(3)"
    codes = {"teacher": deaf, "student": deaf} | {dies: dying}
    code = start_local(tmp_path, monkeypatch, **codes, interrupt=1, when=asked, grace_s=600)
    assert code == (1 if dies == "teacher" else 3)
    assert not ended.exists(), "it was killed, not waited for"


def test_a_teacher_that_dies_ends_the_run(tmp_path, monkeypatch, capsys):
    code = start_local(
        tmp_path,
        monkeypatch,
        student=STUDENT.format(seconds=60, code=0),
        teacher="import time; time.sleep(1.5); exit(3)",
    )
    assert code == 1
    captured = capsys.readouterr()
    assert "the teacher ended with exit code 3" in captured.err and "[student] saved" in captured.out
