"""The source of a training job's responses: engines, and responses that are stored or given."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_simct.alignment import Tokenizer
from megatron_simct.config.options import ENVIRONMENT_WORKERS, Config
from megatron_simct.data.prompts import Reader
from megatron_simct.engine_client import EngineClient
from megatron_simct.evaluation.environment import Environment
from megatron_simct.loading import Pair, open_chat_template
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, whole_sequences
from megatron_simct.models.families import read_architecture
from megatron_simct.models.hf_export import save_hf_weights
from megatron_simct.parallel.disk import on_first_rank, raise_together
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.pipeline import from_writer
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.engine import GivenResponses, ReplayEngine, RolloutEngine
from megatron_simct.rollout.turns import TurnsEngine
from megatron_simct.rollout.vllm_engine import VllmEngine
from megatron_simct.teacher.forward import TeacherForward, own_tokens


def build_environment(config: Config, groups: Groups) -> Environment | None:
    """The environment, on one rank of each model replica. Raises ValueError if a rank cannot import it."""
    rollout = config.rollout
    if rollout.environment is None:
        return None
    environment, problem = None, None
    if groups.writes_samples:
        try:
            environment = Environment(
                rollout.environment,
                timeout_s=rollout.environment_timeout_seconds,
                workers=ENVIRONMENT_WORKERS,
                say=partial(print, flush=True),
            )
        except ValueError as error:
            problem = str(error)
    raise_together(problem)
    return environment


def with_turns(
    config: Config,
    groups: Groups,
    pair: Pair,
    engine: RolloutEngine,
    environment: Environment | None,
    *,
    scored: bool,
) -> RolloutEngine:
    """The engine, with the environment between its responses if there is one. scored: whether teachers read
    the responses."""
    if config.rollout.environment is None:
        return engine
    readers = [
        (
            one.of.name,
            (one.tokenizer, open_chat_template(config, one.of.model, one.tokenizer, prefix=one.of.prefix)),
        )
        for one in pair.teachers
        if scored
    ]

    def teachers(prompt: Prompt) -> list[Reader]:
        names = [name for name, _ in prompt.mixture] or [prompt.teacher]
        return [reader for wanted in names for name, reader in readers if name == wanted]

    return TurnsEngine(
        engine,
        replies=None if environment is None else environment.replies,
        in_replica=partial(from_writer, groups=groups),
        student=(pair.student, open_chat_template(config, config.model, pair.student, prefix="")),
        teachers=teachers,
    )


def build_engine(config: Config, groups: Groups, sampler: RolloutEngine, student: Tokenizer) -> RolloutEngine:
    """The source of the training responses."""
    engine: RolloutEngine = sampler if config.samples else GivenResponses(student)
    save_dir, load_dir = config.rollout.save_debug_rollout_data, config.rollout.load_debug_rollout_data
    if (save_dir or load_dir) and not config.rollout.rollout_oversample:  # it records by itself
        engine = ReplayEngine(
            engine,
            save_dir=save_dir,
            load_dir=load_dir,
            dp_rank=groups.dp_rank,
            writes=groups.writes_samples,
            readers_of=sampler.readers_of if isinstance(sampler, TurnsEngine) else None,
        )
    return engine


def build_vllm_engine(
    config: Config,
    groups: Groups,
    model: HiddenStateModel | InterleavedModel,
    student: Tokenizer,
    *,
    before_reading_weights: Callable[[], None],
) -> VllmEngine:
    """An engine that samples with vLLM servers, which receive the weights in a folder.

    before_reading_weights: see MegatronEngine.
    """
    rollout, flag = config.rollout, "--rollout-engine-weights"
    architecture = read_architecture(config.model.folder, flag="--hf-checkpoint")
    root = Path(rollout.rollout_engine_weights or f"{config.output.run_dir}/engine_weights").absolute()
    forward = TeacherForward(model, groups, vocab_size=student.table.num_ids, frozen=False)

    def write_weights(version: int) -> str:
        before_reading_weights()
        folder = root / f"version-{version}"

        def make_room() -> None:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for old in root.glob("version-*"):
                shutil.rmtree(old)

        on_first_rank(make_room, str(root), flag=flag)
        dtype = torch.bfloat16 if config.training.bf16 else torch.float32
        save_hf_weights(
            model, architecture, groups, template=config.model.folder, save=str(folder), dtype=dtype
        )
        return str(folder)

    def log_probs(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        before_reading_weights()
        was_training = model.training
        model.eval()
        try:
            with whole_sequences(model):
                requests = [
                    own_tokens(prompt, rollout) for prompt, rollout in zip(prompts, rollouts, strict=True)
                ]
                return [(s.own_logit - s.lse).float().cpu().numpy() for s in forward.run([requests])]
        finally:
            model.train(was_training)

    timeout_s = 60 * rollout.rollout_engine_timeout_minutes
    return VllmEngine(
        [EngineClient(url, timeout_s=timeout_s) for url in rollout.rollout_engine_endpoint],
        groups,
        vocab_size=student.table.num_ids,
        stop_ids=student.table.stop_ids,
        write_weights=write_weights,
        log_probs=log_probs,
        bound_nats=rollout.rollout_logprob_bound,
        timeout_s=timeout_s,
    )
