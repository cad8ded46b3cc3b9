"""One YAML file that describes both jobs. Values given as `section.key=value` go before those of the file.

    run_dir: runs/first
    student:                    # flags of megatron_simct.train in snake_case
      hf_checkpoint: /models/student
      prompt_data: /data/prompts.jsonl
    teacher:                    # flags of megatron_simct.serve_teacher; without, both models share the student's ranks
      teacher_hf_checkpoint: /models/teacher
      tensor_model_parallel_size: 4
    cluster:                    # the fields of Cluster below
      kind: slurm
      student: {nodes: 1, gpus_per_node: 8}
      teacher: {nodes: 2, gpus_per_node: 8}
      time: "04:00:00"
    env: {NCCL_DEBUG: WARN}     # for both jobs

What the launcher fills in where the file does not: the student's --run-dir, --save and --load under run_dir,
--exit-signal-handler and --exit-duration-in-mins, the teacher's --run-dir and the student's --teacher-endpoint.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_simct.arguments import assemble, check_keys, options
from megatron_simct.command_line import nearest
from megatron_simct.config import Config, TeacherConfig


@dataclass(frozen=True, kw_only=True)
class JobSize:
    """The nodes of one job and what runs on each."""

    nodes: int = 1
    gpus_per_node: int = 0
    """0: the job runs on CPUs."""
    processes_per_node: int | None = None
    """Default: one a GPU, or one."""
    cpus_per_node: int | None = None
    """What Slurm is asked for. Default: the whole node."""
    max_restarts: int = 0
    """How often torchrun starts all processes of the job again after one has failed."""

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes


@dataclass(frozen=True, kw_only=True)
class Container:
    """The image that both jobs run in."""

    runtime: Literal["pyxis", "apptainer"]
    image: str
    """pyxis: a squashfs file or a registry's image; apptainer: a SIF file."""
    mounts: tuple[str, ...] = ()
    """HOST:CONTAINER, or HOST:CONTAINER:ro."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the jobs run, and how they are asked for."""

    kind: Literal["local", "slurm"] = "local"
    student: JobSize = field(default_factory=JobSize)
    teacher: JobSize = field(default_factory=JobSize)
    job_name: str = "simct"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """As Slurm writes it: MINUTES, HH:MM:SS or D-HH:MM:SS."""
    grace_s: int = 300
    """Seconds before the end of `time` at which a run saves, exits and is queued again; also what stopping may take."""
    requeue: bool = True
    """Queue the job again when it was pre-empted or its time is over."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, such as --constraint=h100."""
    python: str | None = None
    """The interpreter on the nodes. Default: `python` of the image, or the one that runs the launcher."""
    container: Container | None = None
    device_memory_gib: float | None = None
    """Memory of one GPU (of one process on CPU), for the memory plan of the pre-flight."""


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """A whole run, as its file says it."""

    path: str
    run_dir: str
    """Absolute. Everything that the run leaves lies under it."""
    student: dict[str, Any]
    """Options of train by key, the launcher's own included."""
    teacher: dict[str, Any] | None
    """Options of serve_teacher by key; None: the teacher shares the student's ranks."""
    config: Config
    """`student`, resolved."""
    teacher_config: TeacherConfig | None
    """`teacher`, resolved."""
    cluster: Cluster
    env: dict[str, str]

    @property
    def duration_s(self) -> int | None:
        """Seconds that --time allows; None: no limit."""
        return None if self.cluster.time is None else seconds(self.cluster.time)


FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""What lets torchrun start processes again: else they read in its store where those before them were, and wait for the
dead (pytorch/pytorch#135712)."""

_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[A-Za-z0-9_./@+=:,-]+")
"""What may stand in an #SBATCH line, which no shell reads and sbatch reads by rules of its own."""


def read_run_file(path: str, overrides: Sequence[str] = ()) -> RunFile:
    """The run that a file describes. ValueError, naming the file and the key, for whatever it cannot mean."""
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    sections = ("run_dir", "student", "teacher", "cluster", "env")
    for key in values:
        if key not in sections:
            raise ValueError(f"{path}: unknown section {key!r}{nearest(str(key), sections)}; it has {_list(sections)}")
    if not isinstance(values.get("run_dir"), str) or not values["run_dir"]:
        raise ValueError(f"{path}: run_dir: needs a directory, under which everything of the run is written")
    cluster = _record(Cluster, values.get("cluster") or {}, where=f"{path}: cluster")
    run_dir = str(Path(values["run_dir"]).absolute())
    _check_cluster(cluster, run_dir, where=path)
    student = _section(values, "student", path)
    teacher = _section(values, "teacher", path) if values.get("teacher") is not None else None
    env = FRESH_STORE | _environment(values.get("env") or {}, where=f"{path}: env")
    check_keys(student, Config, where=f"{path}: student")
    if teacher is not None:
        check_keys(teacher, TeacherConfig, where=f"{path}: teacher")
        student, teacher = _joined(student, teacher, run_dir, where=path)
    student = _filled(student, cluster, run_dir)
    try:
        config = assemble(student, Config)
        teacher_config = None if teacher is None else assemble(teacher, TeacherConfig)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return RunFile(
        path=path,
        run_dir=run_dir,
        student=student,
        teacher=teacher,
        config=config,
        teacher_config=teacher_config,
        cluster=cluster,
        env=env,
    )


def seconds(time: str) -> int:
    """MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, or DAYS-HOURS and so on, as Slurm reads --time."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ValueError(f"cluster.time {time!r}: write MINUTES, HH:MM:SS or D-HH:MM:SS, in quotes")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        units: tuple[int, ...] = (3600, 60, 1)
    else:
        units = (60,) if len(numbers) == 1 else (60, 1) if len(numbers) == 2 else (3600, 60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def _joined(
    student: dict[str, Any], teacher: dict[str, Any], run_dir: str, *, where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both jobs' options, with those of the other that a job must know too, and where the two find each other."""
    of_student = {option.key for option in options(Config)}
    of_teacher = {option.key for option in options(TeacherConfig)}
    # The student reads the teacher's tokenizer and its config.json; the teacher is told the longest sequence.
    to_student = {key: value for key, value in teacher.items() if key.startswith("teacher_") and key in of_student}
    given = {"rollout_max_prompt_len", "rollout_max_response_len", "simct_alignment_map"} & of_teacher
    to_teacher = {key: student[key] for key in given & student.keys()}
    for theirs, ours in ((to_student, student), (to_teacher, teacher)):
        for key in theirs.keys() & ours.keys():
            if theirs[key] != ours[key]:
                raise ValueError(f"{where}: student.{key} and teacher.{key} differ; leave one of them out")
    teacher = {"run_dir": f"{run_dir}/teacher"} | to_teacher | teacher
    return to_student | {"teacher_endpoint": [teacher["run_dir"]]} | student, teacher


def _filled(student: dict[str, Any], cluster: Cluster, run_dir: str) -> dict[str, Any]:
    """The options that make a run stoppable and resumable, where the file does not say otherwise."""
    save = student.get("save", f"{run_dir}/checkpoint")
    filled: dict[str, Any] = {"run_dir": f"{run_dir}/student", "save": save, "load": save, "exit_signal_handler": True}
    if cluster.kind == "slurm" and cluster.time is not None:
        # The clock of the run starts later than the job's, so a signal follows for what this comes too late for.
        filled["exit_duration_in_mins"] = round(max(0, seconds(cluster.time) - 2 * cluster.grace_s) / 60, 2)
    return student | {key: value for key, value in filled.items() if key not in student}


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError, as is text that is not UTF-8
        raise ValueError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected the sections run_dir, student, teacher, cluster, env")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """`a.b.c=value` into nested dictionaries; the value is YAML."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"override {override!r}: write section.key=value")
    *sections, key = name.split(".")
    for section in sections:
        inner = values.get(section)
        inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise ValueError(f"override {override!r}: {section} is no section")
        values[section] = inner
        values = inner
    try:
        values[key] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise ValueError(f"override {override!r}: the value is not YAML; quote it") from None


def _section(values: dict[str, Any], name: str, path: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {name}: expected `key: value` lines")
    for key in section:
        if not isinstance(key, str):
            raise ValueError(f"{path}: {name}: the key {key!r} is no text")
    return {key: value for key, value in section.items() if value is not None}


def _record(kind: type, values: Any, *, where: str) -> Any:
    """A dataclass from a dictionary of YAML. ValueError, naming the key, where they do not fit."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected `key: value` lines, not {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), list(hints))}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")
    return kind(**{key: _value(hints[key], value, where=f"{where}.{key}") for key, value in values.items()})


def _value(annotation: Any, value: Any, *, where: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (annotation,) = (a for a in arguments if a is not type(None))
        return _value(annotation, value, where=where)
    if dataclasses.is_dataclass(annotation):
        return _record(typing.cast(type, annotation), value, where=where)
    if origin is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{where}: expected a list of texts, not {value!r}")
        return tuple(value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {value!r} is none of {_list(arguments)}")
        return value
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not annotation:
        hint = "; put it in quotes" if annotation is str else ""
        raise ValueError(f"{where}: {value!r} is not a value of type {annotation.__name__}{hint}")
    return value


def _environment(values: Any, *, where: str) -> dict[str, str]:
    """Names and values as text. A secret is refused: it would lie in the job script."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected `NAME: value` lines")
    for name, value in values.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{where}: {name!r} is no name of an environment variable")
        if _SECRET.search(name):
            raise ValueError(
                f"{where}: {name} looks like a secret, and this file and the job script are no place for one; export "
                "it in the shell that launches, from where both jobs inherit it"
            )
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{where}: {name}: {value!r} is no text; put it in quotes")
    return {name: str(value) for name, value in values.items()}


def _check_cluster(cluster: Cluster, run_dir: str, *, where: str) -> None:
    """ValueError for a number without meaning, or a text that an #SBATCH line cannot hold."""
    for name in ("student", "teacher"):
        size: JobSize = getattr(cluster, name)
        for key, lowest in (("nodes", 1), ("gpus_per_node", 0), ("max_restarts", 0)):
            if getattr(size, key) < lowest:
                raise ValueError(f"{where}: cluster.{name}.{key} {getattr(size, key)}: must be at least {lowest}")
        for key in ("processes_per_node", "cpus_per_node"):
            if getattr(size, key) is not None and getattr(size, key) < 1:
                raise ValueError(f"{where}: cluster.{name}.{key} {getattr(size, key)}: must be at least 1")
    memory = cluster.device_memory_gib
    if memory is not None and not memory > 0:
        raise ValueError(f"{where}: cluster.device_memory_gib {memory}: must be above 0")
    if cluster.grace_s < 1:
        raise ValueError(f"{where}: cluster.grace_s {cluster.grace_s}: must be at least 1")
    if cluster.time is not None:
        try:
            limit = seconds(cluster.time)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if limit <= 2 * cluster.grace_s:
            raise ValueError(
                f"{where}: cluster.time {cluster.time!r} is {limit} s; it must exceed twice cluster.grace_s "
                f"({cluster.grace_s} s), in which a run saves and exits"
            )
    texts = {
        "cluster.job_name": cluster.job_name,
        "cluster.partition": cluster.partition,
        "cluster.account": cluster.account,
        "cluster.qos": cluster.qos,
        **{f"cluster.sbatch[{i}]": text for i, text in enumerate(cluster.sbatch)},
    }
    if cluster.kind == "slurm":
        texts["run_dir"] = run_dir
    for name, text in texts.items():
        if text is not None and not _PLAIN.fullmatch(text):
            raise ValueError(
                f"{where}: {name} {text!r}: may have letters, digits and the characters _ . / @ + = : , - only, "
                "for Slurm reads it by rules of its own"
            )
    for text in cluster.sbatch:
        if not text.startswith("-"):
            raise ValueError(f"{where}: cluster.sbatch: {text!r} is no option; write --name=value")
    for mount in cluster.container.mounts if cluster.container else ():
        if "," in mount or not 1 <= mount.count(":") <= 2 or not all(mount.split(":")):
            raise ValueError(f"{where}: cluster.container.mounts: {mount!r}: write HOST:CONTAINER or HOST:CONTAINER:ro")


def _list(names: Sequence[Any]) -> str:
    return ", ".join(str(name) for name in names)
