"""Grades of responses in a training job: rewards, and the evaluation on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from megatron_simct.alignment import Tokenizer
from megatron_simct.config.options import Config
from megatron_simct.data.prompts import Divide, PromptSource
from megatron_simct.data.rendering import ChatTemplate
from megatron_simct.evaluation.benchmarks import CODE, Problem
from megatron_simct.evaluation.grading import Graders
from megatron_simct.evaluation.rewards import Rewards
from megatron_simct.evaluation.sandbox import Limits, check_sandbox
from megatron_simct.job_parts.prompts import report_skipped
from megatron_simct.loading import open_chat_template, open_held_out, open_thinking
from megatron_simct.parallel.disk import raise_together
from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rewarding import Rewarding
from megatron_simct.rollout.engine import RolloutEngine
from megatron_simct.rollout.held_out import Evaluator, equals_label, response_text, special_marks

EVAL_WORKERS = 4
"""Number of benchmark responses that one rank of each model replica grades at the same time."""


def build_rewarding(config: Config, groups: Groups, student: Tokenizer) -> Rewarding | None:
    """The part that asks for rewards; None without --reward. Raises ValueError if a rank cannot ask."""
    options = config.reward
    if options.reward is None:
        return None
    chat = open_chat_template(config, config.model, student, prefix="")
    thinking = open_thinking(chat)
    rewards, problem = None, None
    if groups.writes_samples:
        try:
            if options.reward == "code":
                check_sandbox(flag="--reward")
            rewards = Rewards(options, chat=config.data.apply_chat_template, thinking=thinking)
        except ValueError as error:
            problem = str(error)
    raise_together(problem)
    return Rewarding(
        rewards=rewards,
        student=student,
        marks=special_marks(student, (thinking.start, thinking.end)),
        batch_size=config.global_batch_size - config.given_rows,
        group_size=config.rollout.n_samples_per_prompt,
        weight=options.reward_weight,
        first_place=(
            groups.dp_rank * (config.sampled_prompts // groups.dp_size) * config.rollout.n_samples_per_prompt
            if config.rollout.rollout_oversample
            else None
        ),
    )


def build_evaluator(
    config: Config, groups: Groups, engine: RolloutEngine, student: Tokenizer, *, divide: Divide
) -> Evaluator | None:
    """The evaluation: held-out prompts, how to sample responses, and how to grade them. divide: who renders
    which prompts."""
    if config.data.eval_prompt_data is None:
        return None
    rows, problems = open_held_out(config)
    chat = open_chat_template(config, config.model, student, prefix="")
    prompts = PromptSource(
        rows,
        student=student,
        batch_size=None,
        samples_per_prompt=max(1, config.evaluation.eval_samples),
        max_prompt_len=config.rollout.rollout_max_prompt_len,
        shuffle=False,
        seed=config.training.seed,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        flag="--eval-prompt-data",
        student_chat=chat,
        divide=divide,
    )
    report_skipped(config, groups, prompts, "held-out prompts", of=len(rows))
    return Evaluator(
        engine,
        prompts,
        judge(config, problems, student, chat),
        groups,
        max_response_len=config.rollout.rollout_max_response_len,
        temperature=config.evaluation.eval_temperature,
        samples=config.evaluation.eval_samples,
        seed=config.training.seed + 1,
    )


def judge(
    config: Config, problems: Sequence[Problem], student: Tokenizer, chat: ChatTemplate | None
) -> Callable[[Sequence[Prompt], Sequence[Rollout]], Sequence[bool]]:
    """The grader of --eval-benchmark. Raises ValueError for a benchmark of programs if they
    cannot be sandboxed."""
    benchmark = config.evaluation.eval_benchmark
    if benchmark == "exact_match":
        return partial(equals_label, tokenizer=student)
    if benchmark in CODE:
        check_sandbox(flag="--eval-benchmark")
    thinking = open_thinking(chat)
    marks = special_marks(student, (thinking.start, thinking.end))
    graders = Graders(
        benchmark,
        chat=config.data.apply_chat_template,
        workers=EVAL_WORKERS,
        limits=Limits(),
        thinking=thinking,
    )

    def right(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[bool]:
        graded = graders.grade(
            (problems[int(str(prompt.label))], response_text(rollout, student, marks))
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        )
        return [next(iter(metrics.values())) for metrics in graded]

    return right
