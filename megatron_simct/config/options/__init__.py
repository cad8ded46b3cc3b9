"""Every option, its default, its unit and its help. `../flags.py` spells these fields as command-line flags.

A field `train_iters` is the flag `--train-iters` and the key `train_iters` of a --config-file. Flags that
Megatron-LM or slime have keep their name and meaning; ours carry the prefix `simct`. There is a file for each
kind of option; `student_job.py` and `teacher_job.py` put them together.
"""

from megatron_simct.config.options.data import DataConfig
from megatron_simct.config.options.declare import Range, check_ranges, flag_of, key_of, option
from megatron_simct.config.options.evaluation import Benchmark, EvaluationConfig
from megatron_simct.config.options.loss import Divergence, InterfaceConfig, TermsConfig
from megatron_simct.config.options.model import AttentionBackend, ModelConfig
from megatron_simct.config.options.output import OutputConfig
from megatron_simct.config.options.parallel import ParallelConfig
from megatron_simct.config.options.rollout import (
    ENVIRONMENT_WORKERS,
    GRADED_REWARDS,
    RewardConfig,
    RolloutConfig,
)
from megatron_simct.config.options.student_job import Config
from megatron_simct.config.options.teacher import (
    MixtureConfig,
    RoutingConfig,
    TeacherJobConfig,
    TeacherOptions,
)
from megatron_simct.config.options.teacher_job import EngineTeacherConfig, ServingConfig, TeacherConfig
from megatron_simct.config.options.update import LoraConfig, RecomputeModule, TrainingConfig, UpdateConfig

__all__ = [
    "AttentionBackend",
    "Benchmark",
    "Config",
    "DataConfig",
    "Divergence",
    "ENVIRONMENT_WORKERS",
    "EngineTeacherConfig",
    "EvaluationConfig",
    "GRADED_REWARDS",
    "InterfaceConfig",
    "LoraConfig",
    "MixtureConfig",
    "ModelConfig",
    "OutputConfig",
    "ParallelConfig",
    "Range",
    "RecomputeModule",
    "RewardConfig",
    "RolloutConfig",
    "RoutingConfig",
    "ServingConfig",
    "TeacherConfig",
    "TeacherJobConfig",
    "TeacherOptions",
    "TermsConfig",
    "TrainingConfig",
    "UpdateConfig",
    "check_ranges",
    "flag_of",
    "key_of",
    "option",
]
