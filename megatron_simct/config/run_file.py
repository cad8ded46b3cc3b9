"""One YAML file that describes all jobs of a run. Values given as `section.key=value` replace those of the
file.

    run_dir: runs/first
    jobs:                       # exactly one student; `options` are flags of its command in snake_case
      - {name: student, kind: student, gpus_per_node: 8,
         options: {hf_checkpoint: /models/student, prompt_data: /data/prompts.jsonl}}
      - {name: teacher, kind: teacher, nodes: 2, gpus_per_node: 8,
         options: {teacher_hf_checkpoint: /models/teacher, tensor_model_parallel_size: 8}}
    cluster:                    # the fields of Cluster below
      kind: slurm
      time: "04:00:00"
    env: {NCCL_DEBUG: WARN}     # for all jobs

A job has the fields of Job below. An inference engine is a job too, with its own Python environment; a
teacher that names it (`engine: vllm`) loads only the LM head:

      - {name: vllm, kind: engine, gpus_per_node: 8, python: /opt/vllm/bin/python,
         command: [-m, vllm.entrypoints.openai.api_server, --model, /models/teacher, --port, "8000"]}
      - {name: teacher, kind: teacher, engine: vllm, options: {teacher_hf_checkpoint: /models/teacher}}

Two teachers are mixed (--second-teacher-endpoint). For teachers that each score the rows of --prompt-data
that name them, the student's `teachers` has their names; a teacher that has a job gets its folder and its
endpoint from the job of its name:

      - {name: student, kind: student, options: {teachers: {maths: {}, code: {}}, prompt_data: ...}}
      - {name: maths, kind: teacher, options: {teacher_hf_checkpoint: /models/maths}}
      - {name: code, kind: teacher, options: {teacher_hf_checkpoint: /models/code}}

The short form for a student and at most one teacher has sections instead of the list; without `teacher` both
models share the student's ranks:

    student: {hf_checkpoint: /models/student, prompt_data: /data/prompts.jsonl}
    teacher: {teacher_hf_checkpoint: /models/teacher}
    cluster: {student: {gpus_per_node: 8}, teacher: {nodes: 2, gpus_per_node: 8}}

The launcher sets these options if the file does not: the student's --run-dir, --save and --load under
run_dir, --exit-signal-handler and --exit-duration-in-mins, a teacher's --run-dir and the student's
--teacher-endpoint (--second-teacher-endpoint for the second teacher in the list), --engine-endpoint of a
teacher with an engine, and --rollout-engine and --rollout-engine-endpoint of a student with an engine."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_simct.config.command_line import nearest
from megatron_simct.config.flags import assemble, check_keys, options, read_yaml
from megatron_simct.config.options import Config, TeacherConfig


@dataclass(frozen=True, kw_only=True)
class JobSize:
    """The nodes of one job and what runs on each."""

    nodes: int = 1
    gpus_per_node: int = 0
    """0: the job runs on CPUs."""
    processes_per_node: int | None = None
    """Default: one for each GPU, or one."""
    cpus_per_node: int | None = None
    """CPUs that are requested from Slurm. Default: the whole node."""
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
    """A container image in which jobs run."""

    runtime: Literal["pyxis", "apptainer"]
    image: str
    """pyxis: a squashfs file or a registry's image; apptainer: a SIF file."""
    mounts: tuple[str, ...] = ()
    """HOST:CONTAINER, or HOST:CONTAINER:ro."""


@dataclass(frozen=True, kw_only=True)
class Job(JobSize):
    """One job of a run: its nodes, and what runs on them."""

    name: str
    """Letters, digits and underscores."""
    kind: Literal["student", "teacher", "engine"]
    options: dict[str, Any] = field(default_factory=dict)
    """Flags of a student or a teacher, by key; in a RunFile they include those that the launcher adds."""
    engine: str | None = None
    """The engine job that computes this teacher's hidden states, or samples this student's responses; None:
    the job's own ranks do."""
    command: tuple[str, ...] = ()
    """The arguments of the engine's Python interpreter, on each of its nodes."""
    python: str | None = None
    """The Python interpreter on the nodes. Default: that of `cluster`; an engine needs its own."""
    container: Container | None = None
    """The container image. Default: that of `cluster`; for an engine: no container."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables for this job only."""

    def flag_of_command(self, *names: str) -> str | None:
        """The value of an engine's flag, given as two words or with an equals sign."""
        for word, following in zip_longest(self.command, self.command[1:]):
            for name in names:
                if word == name:
                    return following
                if word.startswith(f"{name}="):
                    return word.partition("=")[2]
        return None

    @property
    def port(self) -> str:
        """The port of an engine."""
        return self.flag_of_command("--port") or "8000"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the jobs run, and how they are submitted."""

    kind: Literal["local", "slurm"] = "local"
    student: JobSize = field(default_factory=JobSize)
    """The job's size in the short form."""
    teacher: JobSize = field(default_factory=JobSize)
    """The job's size in the short form."""
    job_name: str = "simct"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """Time limit in Slurm's format: MINUTES, HH:MM:SS or D-HH:MM:SS."""
    grace_s: int = 300
    """Seconds before the end of `time` at which a run saves, exits and is requeued; also the time limit for
    stopping."""
    requeue: bool = True
    """Requeue the job if it was pre-empted or its time is over."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, such as --constraint=h100."""
    python: str | None = None
    """The Python interpreter on the nodes. Default: `python` of the image, or the interpreter of the
    launcher."""
    container: Container | None = None
    device_memory_gib: float | None = None
    """Memory of one GPU (of one process on CPU), for the memory plan of the pre-flight."""


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """A whole run, as described by its file."""

    path: str
    run_dir: str
    """Absolute path. All files of the run are in it."""
    jobs: tuple[Job, ...]
    """The student first, then in the order of the file."""
    config: Config
    """The student's options, resolved."""
    teacher_configs: dict[str, TeacherConfig]
    """The options of each teacher's job, resolved, by the job's name."""
    cluster: Cluster
    env: dict[str, str]
    is_short: bool
    """Whether the file has sections instead of a list of jobs."""

    @property
    def student(self) -> Job:
        return self.jobs[0]

    def of_kind(self, kind: str) -> list[Job]:
        """The jobs of a kind."""
        return [job for job in self.jobs if job.kind == kind]

    def engine_of(self, job: Job) -> Job | None:
        """The engine that a job uses, or None."""
        return next((other for other in self.jobs if other.name == job.engine), None)

    def where(self, job: Job) -> str:
        """The key in the file under which a job's fields are."""
        return f"cluster.{job.name}" if self.is_short else f"jobs.{job.name}"

    def container_of(self, job: Job) -> Container | None:
        """The container image in which a job runs."""
        return job.container or (None if job.kind == "engine" else self.cluster.container)

    def python_of(self, job: Job) -> str:
        """The Python interpreter on a job's nodes."""
        given = job.python or (None if job.kind == "engine" else self.cluster.python)
        return given or ("python" if self.container_of(job) else sys.executable)

    @property
    def duration_s(self) -> int | None:
        """Seconds that --time allows; None: no limit."""
        return None if self.cluster.time is None else seconds(self.cluster.time)


FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Needed for restarts by torchrun: without it, restarted processes read the addresses of their dead
predecessors in its store, and wait for them (pytorch/pytorch#135712).

Where nothing restarts it is left out. A fresh store listens on a port that torchrun found free some seconds
earlier, and another process may have taken it meanwhile; torchrun's own store holds its port from the start.
"""

_SECRET_NAME = re.compile(
    r"(^|_)(API_?KEYS?|KEYS?|API_?TOKENS?|TOKENS?|SECRETS?|PASS(WORDS?|WD|PHRASE)?|PWD|PAT|CREDENTIALS?|AUTH)(_|$)"
    r"|(^|_)(BEARER|JWT|PRIVATE|NETRC|DSN)(_|$)"
    r"|PASSWORD|PASSWD|SECRET|APIKEY|APITOKEN|^PGPASS"
    r"|(DATABASE|REDIS|MONGO(DB)?|POSTGRES(QL)?|MYSQL|AMQP|BROKER)_UR[IL]$",
    re.IGNORECASE,
)
_NOT_SECRET = ("PWD", "OLDPWD")
_SECRET_VALUE = re.compile(
    r"gh[pousr]_\w{20}|github_pat_\w{20}|glpat-[\w-]{16}|\bhf_[A-Za-z]{30}|\bsk-[\w-]{20}|\bAKIA[A-Z0-9]{16}\b"
    r"|\bxox[a-z]-[\w-]{10}|\bAIza[\w-]{30}|\beyJ[\w-]{10,}\.[\w-]{10,}\."
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]*:[^/\s@]+@|^[0-9a-f]{40}$"
)
"""How publishers' tokens begin, URLs with a password, private keys, and 40 hexadecimal digits (Weights &
Biases).
"""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[A-Za-z0-9_./@+=:,-]+")
"""Characters that are safe in an #SBATCH line, which sbatch parses without a shell."""


def read_run_file(path: str, overrides: Sequence[str] = ()) -> RunFile:
    """Reads a run file. Raises ValueError, naming the file and the key, if it is invalid."""
    values = read_yaml(
        path, where=path, expected="the sections run_dir, jobs (or student, teacher), cluster, env"
    )
    for override in overrides:
        _apply(values, override)
    sections = ("run_dir", "jobs", "student", "teacher", "cluster", "env")
    for key in values:
        if key not in sections:
            raise ValueError(
                f"{path}: unknown section {key!r}{nearest(str(key), sections)}; it has {_list(sections)}"
            )
    if not isinstance(values.get("run_dir"), str) or not values["run_dir"]:
        raise ValueError(f"{path}: run_dir: needs a directory, in which all files of the run are written")
    cluster = _record(Cluster, values.get("cluster") or {}, where=f"{path}: cluster")
    run_dir = str(Path(values["run_dir"]).absolute())
    is_short = values.get("jobs") is None
    jobs = _short_jobs(values, cluster, path) if is_short else _listed_jobs(values, path)
    _check_cluster(cluster, run_dir, jobs, is_short=is_short, where=path)
    env = _environment(values.get("env") or {}, where=f"{path}: env")
    for job in jobs:
        if job.kind != "engine":
            kind = Config if job.kind == "student" else TeacherConfig
            check_keys(job.options, kind, where=f"{path}: {job.name}")
    jobs = [_with_fresh_store(job) for job in _joined(jobs, cluster, run_dir, where=path)]
    try:
        config = assemble(jobs[0].options, Config)
        teachers = {job.name: assemble(job.options, TeacherConfig) for job in jobs if job.kind == "teacher"}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return RunFile(
        path=path,
        run_dir=run_dir,
        jobs=tuple(jobs),
        config=config,
        teacher_configs=teachers,
        cluster=cluster,
        env=env,
        is_short=is_short,
    )


def _short_jobs(values: dict[str, Any], cluster: Cluster, path: str) -> list[Job]:
    """The jobs of a file in the short form."""
    sizes: dict[Literal["student", "teacher"], JobSize] = {"student": cluster.student}
    if values.get("teacher") is not None:
        sizes["teacher"] = cluster.teacher
    return [
        Job(name=name, kind=name, options=_section(values, name, path), **dataclasses.asdict(size))
        for name, size in sizes.items()
    ]


def _listed_jobs(values: dict[str, Any], path: str) -> list[Job]:
    """The jobs of a file with a list, the student first. Raises ValueError if one is invalid."""
    entries = values["jobs"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: jobs: expected a list, each entry with name, kind and options")
    for section in ("student", "teacher"):
        if values.get(section) is not None or (values.get("cluster") or {}).get(section) is not None:
            raise ValueError(
                f"{path}: {section} is a section of the short form; with jobs it belongs into the list"
            )
    jobs: list[Job] = []
    for number, entry in enumerate(entries):
        name = entry.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (job.name for job in jobs):
            raise ValueError(
                f"{path}: jobs[{number}].name {name!r}: each job needs a different name, of letters, digits "
                "and _"
            )
        where = f"{path}: jobs.{name}"
        inner = {key: _section(entry, key, where) for key in ("options", "env")}
        inner["env"] = _environment(inner["env"], where=f"{where}: env")
        job = _record(Job, {key: value for key, value in entry.items() if key not in inner}, where=where)
        jobs.append(dataclasses.replace(job, **inner))
        if (name == "student") > (job.kind == "student"):
            raise ValueError(f"{where}: only the student's job may have the name student")
    if sum(job.kind == "student" for job in jobs) != 1:
        raise ValueError(f"{path}: jobs: exactly one must be of kind student")
    teachers = [job.name for job in jobs if job.kind == "teacher"]
    named = next(job.options.get("teachers") for job in jobs if job.kind == "student")
    if named is None and len(teachers) > 2:
        names = _list([f"{name}: {{}}" for name in teachers])
        raise ValueError(
            f"{path}: jobs: {_list(teachers)} are teachers, but a student has at most two that are mixed; "
            f"for one of them a row give the student teachers: {{{names}}}"
        )
    engines = [job.name for job in jobs if job.kind == "engine"]
    for job in jobs:
        where = f"{path}: jobs.{job.name}"
        if job.kind == "engine" and not job.command:
            raise ValueError(
                f"{where}: command is missing: the arguments of the engine's Python interpreter, as a list"
            )
        if not job.port.isascii() or not job.port.isdigit() or not 0 < int(job.port) < 1 << 16:
            raise ValueError(f"{where}: command: --port {job.port!r}: expected a number below 65536")
        if job.kind == "engine" and job.options:
            raise ValueError(
                f"{where}: options: an engine has a command instead; only students and teachers have options"
            )
        if job.kind != "engine" and job.command:
            raise ValueError(f"{where}: command: only an engine has a command; a {job.kind} has options")
        if job.engine is not None and (job.kind == "engine" or job.engine not in engines):
            raise ValueError(
                f"{where}: engine {job.engine!r}: engine must be the name of a job of kind engine: "
                f"{_list(engines) or 'there is none'}"
            )
    return sorted(jobs, key=lambda job: job.kind != "student")


def seconds(time: str) -> int:
    """MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, or DAYS-HOURS and so on, as Slurm reads --time."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ValueError(f"cluster.time {time!r}: write MINUTES, HH:MM:SS or D-HH:MM:SS, in quotes")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None or len(numbers) == 3:
        first_unit = 3600
    else:
        first_unit = 60  # MINUTES, or MINUTES:SECONDS
    in_days = int(days or 0) * 86400
    return in_days + sum(number * first_unit // 60**i for i, number in enumerate(numbers))


def _with_fresh_store(job: Job) -> Job:
    """The job with FRESH_STORE in its environment if torchrun may start it again."""
    if not job.max_restarts or job.kind == "engine":
        return job
    return dataclasses.replace(job, env=FRESH_STORE | dict(job.env))


def _joined(jobs: Sequence[Job], cluster: Cluster, run_dir: str, *, where: str) -> list[Job]:
    """Adds to each job's options those of other jobs that it needs, and the addresses of the other jobs."""
    of_student = {option.key for option in options(Config)}
    of_teacher = {option.key for option in options(TeacherConfig)}
    student = jobs[0].options
    prefixes = iter(("", "second_"))
    joined: list[Job] = []
    for job in jobs[1:]:
        teacher = job.options
        if job.kind == "teacher":
            # The student needs the teacher's tokenizer and config.json; the teacher needs the longest
            # sequence.
            to_student = {key: value for key, value in teacher.items() if key.startswith("teacher_")}
            to_student = {key: value for key, value in to_student.items() if key in of_student}
            named = student.get("teachers")
            if named is not None:
                named = _with_job(named, job, to_student, run_dir, where=where)
                student, to_student = student | {"teachers": named}, {}
            else:
                prefix = next(prefixes)
                to_student = {prefix + key: value for key, value in to_student.items()}
            given = {"rollout_max_prompt_len", "rollout_max_response_len", "simct_alignment_map"} & of_teacher
            to_teacher = {key: jobs[0].options[key] for key in given & jobs[0].options.keys()}
            for theirs, ours in ((to_student, student), (to_teacher, teacher)):
                for key in theirs.keys() & ours.keys():
                    if theirs[key] != ours[key]:
                        raise ValueError(
                            f"{where}: student.{key} and {job.name}.{key} differ; leave one of them out"
                        )
            teacher = {"run_dir": f"{run_dir}/{job.name}"} | to_teacher | teacher
            if named is None:
                student = to_student | {f"{prefix}teacher_endpoint": [teacher["run_dir"]]} | student
            teacher = _engine_options(job, jobs, cluster, "engine_endpoint") | teacher
        joined.append(dataclasses.replace(job, options=teacher))
    sampled = _engine_options(jobs[0], jobs, cluster, "rollout_engine_endpoint")
    student = ({"rollout_engine": "vllm"} if sampled else {}) | sampled | student
    return [dataclasses.replace(jobs[0], options=_filled(student, cluster, run_dir)), *joined]


def _with_job(named: Any, job: Job, options: dict[str, Any], run_dir: str, *, where: str) -> dict[str, Any]:
    """The student's `teachers` with the folder and the endpoint of a teacher's job. options: those of the job
    that the student reads too.
    """
    own = {key.removeprefix("teacher_"): value for key, value in options.items()}
    if not isinstance(named, dict):
        raise ValueError(f"{where}: student.teachers: expected teachers by name, {job.name}: {{}}")
    if job.name not in named:
        raise ValueError(
            f"{where}: student.teachers has no {job.name}, which is a job; it has {_list(list(named))}"
        )
    given = {} if named[job.name] is None else named[job.name]
    if not isinstance(given, dict):
        raise ValueError(f"{where}: student.teachers.{job.name}: expected its options by key")
    for key in own.keys() & given.keys():
        if own[key] != given[key]:
            raise ValueError(
                f"{where}: student.teachers.{job.name}.{key} and {job.name}.teacher_{key} differ; leave one "
                "of them out"
            )
    endpoint = {"endpoint": [job.options.get("run_dir", f"{run_dir}/{job.name}")]}
    if job.options.get("simct_alignment_map") is not None:
        own["simct_alignment_map"] = job.options["simct_alignment_map"]
    return named | {job.name: own | endpoint | given}


def _engine_options(job: Job, jobs: Sequence[Job], cluster: Cluster, key: str) -> dict[str, Any]:
    """The address of the engine that a job uses; empty if it uses none."""
    engine = next((other for other in jobs if other.name == job.engine), None)
    if engine is None:
        return {}
    host = (
        "127.0.0.1" if cluster.kind == "local" else engine.name
    )  # the Slurm job script replaces the name by a node
    return {key: [f"http://{host}:{engine.port}"]}


def _filled(student: dict[str, Any], cluster: Cluster, run_dir: str) -> dict[str, Any]:
    """Adds the options that make a run stoppable and resumable, if the file does not set them."""
    save = student.get("save", f"{run_dir}/checkpoint")
    filled: dict[str, Any] = {
        "run_dir": f"{run_dir}/student",
        "save": save,
        "load": save,
        "exit_signal_handler": True,
    }
    if cluster.kind == "slurm" and cluster.time is not None:
        # The run starts later than its job, so this limit may come too late; then Slurm's signal stops the
        # run.
        filled["exit_duration_in_mins"] = round(max(0, seconds(cluster.time) - 2 * cluster.grace_s) / 60, 2)
    return student | {key: value for key, value in filled.items() if key not in student}


def _apply(values: Any, override: str) -> None:
    """Sets `a.b.c=value` in nested dictionaries; the value is YAML."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"override {override!r}: write section.key=value")
    *sections, key = name.split(".")
    for section in sections:
        if isinstance(values, list):  # of jobs
            inner = next(
                (entry for entry in values if isinstance(entry, dict) and entry.get("name") == section), None
            )
            if inner is None:
                raise ValueError(f"override {override!r}: no job has the name {section}")
        else:
            inner = values.get(section)
            inner = {} if inner is None else inner
            if not isinstance(inner, dict | list):
                raise ValueError(f"override {override!r}: {section} is not a section")
            values[section] = inner
        values = inner
    if not isinstance(values, dict):
        raise ValueError(f"override {override!r}: write jobs.NAME.key=value")
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
            raise ValueError(f"{path}: {name}: the key {key!r} must be a string")
    return {key: value for key, value in section.items() if value is not None}


def _record(kind: type, values: Any, *, where: str) -> Any:
    """Builds a dataclass from a YAML dictionary. Raises ValueError, naming the key, if they do not match."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected `key: value` lines, not {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), list(hints))}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in values
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
            raise ValueError(f"{where}: expected a list of strings, not {value!r}")
        return tuple(value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {value!r} must be one of {_list(arguments)}")
        return value
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not annotation:
        hint = "; put it in quotes" if annotation is str else ""
        raise ValueError(f"{where}: {value!r} is not a value of type {annotation.__name__}{hint}")
    return value


def _environment(values: Any, *, where: str) -> dict[str, str]:
    """Environment variables as strings. A secret is refused: it would be written into the job script."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected `NAME: value` lines")
    for name, value in values.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{where}: {name!r} is not a valid environment variable name")
        secret_name = name not in _NOT_SECRET and _SECRET_NAME.search(name)
        if secret_name or (isinstance(value, str) and _SECRET_VALUE.search(value)):
            raise ValueError(
                f"{where}: {'' if secret_name else 'the value of '}{name} looks like a secret, which must "
                "not be stored in this file or the job script; export it in the shell that starts the "
                "launcher: all jobs inherit it"
            )
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{where}: {name}: {value!r} must be a string; put it in quotes")
    return {name: str(value) for name, value in values.items()}


def _check_cluster(
    cluster: Cluster, run_dir: str, jobs: Sequence[Job], *, is_short: bool, where: str
) -> None:
    """Raises ValueError for an invalid number, or text that is not safe in an #SBATCH line."""
    sizes: dict[str, JobSize] = {f"jobs.{job.name}": job for job in jobs}
    if is_short:
        sizes = {"cluster.student": cluster.student, "cluster.teacher": cluster.teacher}
    for name, size in sizes.items():
        for key, lowest in (("nodes", 1), ("gpus_per_node", 0), ("max_restarts", 0)):
            if getattr(size, key) < lowest:
                raise ValueError(f"{where}: {name}.{key} {getattr(size, key)}: must be at least {lowest}")
        for key in ("processes_per_node", "cpus_per_node"):
            if getattr(size, key) is not None and getattr(size, key) < 1:
                raise ValueError(f"{where}: {name}.{key} {getattr(size, key)}: must be at least 1")
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
                f"{where}: {name} {text!r}: may have only letters, digits and the characters _ . / @ + = : , "
                "- because Slurm would interpret others"
            )
    for text in cluster.sbatch:
        if not text.startswith("-"):
            raise ValueError(f"{where}: cluster.sbatch: {text!r} is not an option; write --name=value")
    containers = [cluster.container, *(job.container for job in jobs)]
    for mount in [mount for container in containers if container for mount in container.mounts]:
        if "," in mount or not 1 <= mount.count(":") <= 2 or not all(mount.split(":")):
            raise ValueError(
                f"{where}: container.mounts: {mount!r}: write HOST:CONTAINER or HOST:CONTAINER:ro"
            )


def _list(names: Sequence[Any]) -> str:
    return ", ".join(str(name) for name in names)
