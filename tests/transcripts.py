"""Two small models with tokenizers and chat templates, and conversations of up to three answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_simct.config.flags import parse_config
from megatron_simct.config.options import Config
from megatron_simct.job import Job
from megatron_simct.records import MicroBatch, Prompt, Rollout
from tests.huggingface import save_byte_fallback, save_byte_level, save_model
from tests.steps import scores_of

TEACHER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
ANSWERS = ["Tom has 12 apples", "the cat", "How many more 1234", "apples and the mat", "yes", "gets 7"]


def build_files(root: Path) -> None:
    """Folders of both models with tokenizers and templates, and conversations of up to three answers."""
    save_model(root / "student", "llama", vocab_size=320, scale=0.2)
    save_byte_level(root / "student")
    ends = json.dumps({"eos_token_id": 318})  # the end of a turn alone
    (root / "student" / "generation_config.json").write_text(ends)
    save_model(root / "teacher", "llama", vocab_size=340, hidden_size=48, scale=0.2)
    save_byte_fallback(root / "teacher")
    (root / "teacher" / "chat_template.jinja").write_text(TEACHER_TEMPLATE)
    rows = []
    for number in range(8):
        messages = [{"role": "system", "content": "on the mat"}] if number % 3 == 0 else []
        for turn in range(1 + number % 3):
            messages.append({"role": "user", "content": f"How many {'apples ' * turn}{number}?"})
            messages.append({"role": "assistant", "content": ANSWERS[(number + turn) % len(ANSWERS)]})
            if number == 5:
                messages.append({"role": "tool", "content": "19"})
                messages.append({"role": "assistant", "content": "gets 19"})
        rows.append({"messages": messages})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command_line(files: Path, *flags: str) -> list[str]:
    return [
        *("--hf-checkpoint", str(files / "student"), "--teacher-hf-checkpoint", str(files / "teacher")),
        *("--prompt-data", str(files / "rows.jsonl"), "--apply-chat-template", "--simct-on", "given"),
        *("--rollout-batch-size", "8", "--micro-batch-size", "2", "--train-iters", "2"),
        *("--make-vocab-size-divisible-by", "8", "--teacher-make-vocab-size-divisible-by", "4"),
        *("--rollout-max-response-len", "200", "--optimizer", "sgd", "--lr", "1", "--clip-grad", "0"),
        *("--lr-decay-style", "constant", "--lr-warmup-fraction", "0", "--no-rollout-shuffle", *flags),
    ]


def config(files: Path, *flags: str) -> Config:
    return parse_config(command_line(files, *flags))


def given_samples(job: Job) -> tuple[list[Prompt], list[Rollout]]:
    prompts = job.prompts.batch(0)
    return prompts, job.engine.generate(prompts, job.sampling)


def micro_batches(job: Job, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[MicroBatch]:
    pairs = [job.align(prompt, rollout) for prompt, rollout in zip(prompts, rollouts, strict=True)]
    return job.pack(prompts, rollouts, pairs, scores_of(job.teacher, pairs))


def apart(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> tuple[list[Prompt], list[Rollout]]:
    """Each response as a sample of its own, behind all that comes before it."""
    asked, answered = [], []
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        given = rollout.transcript
        assert given is not None
        of_teacher = given.teachers[0] if given.teachers else given.student
        for (ss, se), (ts, _) in zip(given.student.spans, of_teacher.spans, strict=True):
            number, ids = len(asked), given.student.ids
            before = [(prompt.student_ids, ids[:ss]), (prompt.teacher_ids, of_teacher.ids[:ts])]
            one = Prompt(
                sample_id=number,
                student_ids=np.concatenate(before[0]),
                teacher_ids=np.concatenate(before[1]),
            )
            asked.append(one)
            answered.append(
                Rollout(
                    sample_id=number,
                    weight_version=-1,
                    student_ids=ids[ss:se],
                    logprobs=np.zeros(se - ss, np.float32),
                    finish="stop" if ids[se - 1] == 318 else "length",
                )
            )
    return asked, answered
