"""Flags, keys of a --config-file, their precedence and their errors; modules that the light
modules may import.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_simct.config.flags import build_parser, options, parse_config, to_yaml
from megatron_simct.config.interfaces import METHODS, VARIANTS, interface_help
from megatron_simct.config.megatron_flags import ALWAYS, MEGATRON_FLAGS
from megatron_simct.config.options import Config
from megatron_simct.losses.kinds.table import INTERFACES

OPTIONS = {option.key: option for option in options()}


def refused(capsys, *argv: str) -> str:
    """The error line of a wrong command line. Nothing else is printed."""
    with pytest.raises(SystemExit) as exit_:
        parse_config(list(argv))
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    assert err.startswith("python -m megatron_simct.train: error: ")
    return err


@pytest.fixture
def yaml_file(tmp_path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# Spelling


def test_every_field_is_a_flag_with_help() -> None:
    groups = typing.get_type_hints(Config)
    expected = {
        "_".join(filter(None, [group.metadata.get("prefix"), field.name]))
        for group in dataclasses.fields(Config)
        for field in dataclasses.fields(groups[group.name])
    }
    assert OPTIONS.keys() == expected
    assert {"hf_checkpoint", "teacher_hf_checkpoint", "simct_interface", "lr", "run_dir"} <= expected
    for option in OPTIONS.values():
        assert option.flag == "--" + option.key.replace("_", "-")
        assert len(option.help) > 10, f"{option.flag} has no help"
    assert len({option.flag for option in OPTIONS.values()}) == len(OPTIONS)


def test_help_shows_every_flag_and_its_default() -> None:
    text = " ".join(build_parser().format_help().split())
    for option in OPTIONS.values():
        assert option.flag in text
        assert " ".join(option.help.split()[:3]) in text
    assert "peak learning rate (default: 1e-06)" in text


def test_own_flags_are_not_among_those_that_are_not_implemented() -> None:
    flags = {option.flag for option in OPTIONS.values()} | {"--config-file", "--print-config"}
    assert not flags & (MEGATRON_FLAGS.keys() | ALWAYS.keys())


def test_every_flag_that_is_refused_says_what_to_do(capsys) -> None:
    known = {option.flag for option in OPTIONS.values()} | {"--config-file"}
    for flag, reason in MEGATRON_FLAGS.items():
        assert 10 < len(reason) < 140 and not reason.endswith("."), flag
        for word in re.findall(r"--[a-z][a-z0-9_-]+", reason):
            assert word in known, f"{flag}: {word} is no flag"
    assert refused(capsys, "--finetune").endswith("starts a new run from a checkpoint's weights\n")


def test_flags_that_ask_for_what_is_done_anyway_change_nothing(capsys, yaml_file) -> None:
    argv = ["--ckpt-format", "torch_dist", "--swiglu", "--use-flash-attn", "--transformer-impl", "local"]
    argv += ["--hidden-dropout", "0.0", "--moe-token-dispatcher-type=alltoall", "--lr", "1e-3"]
    assert parse_config(argv) == parse_config(["--lr", "1e-3"])
    path = yaml_file("swiglu: true\nhidden_dropout: 0\nlr: 1.0e-3\n")
    assert parse_config(["--config-file", path]) == parse_config(argv)
    assert "--ckpt-format zarr: only torch_dist: checkpoints are torch_dist" in refused(
        capsys, "--ckpt-format", "zarr"
    )
    assert "--hidden-dropout 0.1: only 0: there is no dropout" in refused(capsys, "--hidden-dropout", "0.1")
    message = refused(capsys, "--config-file", yaml_file("swiglu: false\n"))
    assert "run.yaml: --swiglu False: it cannot be switched off" in message


def test_no_flags_give_the_defaults() -> None:
    assert parse_config([]) == Config()


def test_prefixes_reach_their_own_group() -> None:
    resolved = parse_config(
        ["--hf-checkpoint", "a", "--teacher-hf-checkpoint", "b", "--teacher-stop-token-ids", "7", "9"]
        + ["--simct-divergence", "js", "--simct-js-beta", ".25"]
    )
    assert (resolved.model.hf_checkpoint, resolved.teacher.hf_checkpoint) == ("a", "b")
    assert (resolved.model.stop_token_ids, resolved.teacher.stop_token_ids) == ((), (7, 9))
    assert (resolved.interface.divergence, resolved.interface.js_beta) == ("js", 0.25)


def test_switches_have_a_negation() -> None:
    assert parse_config(["--no-rollout-shuffle"]).data.rollout_shuffle is False
    assert parse_config(["--bf16"]).training.bf16 is True


# Precedence and values


def test_defaults_then_file_then_command_line(yaml_file) -> None:
    path = yaml_file(
        "lr: 1e-5\nmin_lr: 3.0e-7\ntrain_iters: 7\nteacher_stop_token_ids: [3, 4]\nrollout_shuffle: false\n"
    )
    resolved = parse_config(["--train-iters", "9", "--config-file", path])
    assert resolved.training.train_iters == 9
    assert resolved.training.lr == 1e-5 and isinstance(resolved.training.lr, float)
    assert resolved.training.min_lr == 3e-7
    assert resolved.teacher.stop_token_ids == (3, 4)
    assert resolved.data.rollout_shuffle is False
    assert resolved.training.micro_batch_size == Config().training.micro_batch_size


def test_an_empty_file_and_null_for_an_optional_value(yaml_file) -> None:
    assert parse_config(["--config-file", yaml_file("")]) == Config()
    resolved = parse_config(["--config-file", yaml_file("save: null\n"), "--save", "there"])
    assert resolved.output.save == "there"


def test_printed_config_reads_back_as_itself(capsys, yaml_file) -> None:
    argv = ["--lr", "1e-20", "--prompt-data", "a: b #c", "--stop-token-ids", "5", "6", "--no-rollout-shuffle"]
    argv += [
        "--eval-interval",
        "3",
        "--input-key",
        "1e5",
        "--label-key",
        "null",
        "--simct-interface",
        "strict",
    ]
    with pytest.raises(SystemExit) as exit_:
        parse_config([*argv, "--print-config"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert parse_config(["--config-file", yaml_file(printed)]) == parse_config(argv) != Config()


@example(text="two\n lines: # \u2028\t'\"", number=1e-300)
@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), number=st.floats(allow_nan=False))
def test_any_value_survives_the_yaml_form(tmp_path_factory, text, number) -> None:
    config = Config()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, prompt_data=text),
        training=dataclasses.replace(config.training, lr=number),
    )
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert parse_config(["--config-file", str(path)]) == config


# Errors of the command line


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--micro-batchsize", "4"], ["unknown flag --micro-batchsize", "did you mean --micro-batch-size?"]),
        (["--teacher-hf-chekpoint=x"], ["unknown flag --teacher-hf-chekpoint;", "--teacher-hf-checkpoint?"]),
        (["--qqqqqqqq"], ["unknown flag --qqqqqqqq"]),
        (
            ["--num-layers", "4"],
            ["--num-layers is a flag of Megatron-LM", "does not implement: config.json"],
        ),
        (["--fp8-format", "hybrid"], ["--fp8-format is a flag of Megatron-LM"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["--train-iters", "many"], ["--train-iters", "int", "'many'"]),
        (["--train-iters", "1.5"], ["--train-iters", "int", "'1.5'"]),
        (["--lr", "fast"], ["--lr", "float", "'fast'"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["--simct-interface", "papers"], ["--simct-interface", "papers", "paper", "strict", "sft"]),
        (["--stop-token-ids", "1", "x"], ["--stop-token-ids", "'x'"]),
        (["--micro", "4"], ["unknown flag --micro"]),
        (["--config-file", "/nowhere/run.yaml"], ["--config-file /nowhere/run.yaml", "No such file"]),
    ],
)
def test_wrong_command_lines(capsys, argv, words) -> None:
    message = refused(capsys, *argv)
    for word in words:
        assert word in message


def test_an_unlike_flag_gets_no_guess(capsys) -> None:
    assert "did you mean" not in refused(capsys, "--qqqqqqqq")


@pytest.mark.parametrize(
    "text, words",
    [
        ("micro_batchsize: 4\n", ["unknown key 'micro_batchsize'", "did you mean micro_batch_size?"]),
        ("train-iters: 4\n", ["unknown key 'train-iters'", "did you mean train_iters?"]),
        ("5: 4\n", ["unknown key 5"]),
        (
            "num_layers: 4\n",
            ["'num_layers' is an option of Megatron-LM that this package does not implement"],
        ),
        ("- lr\n", ["`key: value`"]),
        ("lr: [1\nmin_lr: 2\n", ["line 2", "not YAML"]),
        ("seed: 2024-13-45\n", ["--config-file", "run.yaml: not YAML: month must be in 1..12"]),
        ("lr: fast\n", ["--lr (lr)", "'fast'", "float"]),
        ("lr: [1]\n", ["--lr (lr)", "[1]", "float"]),
        ("lr: true\n", ["--lr (lr)", "True", "float"]),
        ("lr: null\n", ["lr: needs a value of type float"]),
        ("train_iters: 1.5\n", ["--train-iters (train_iters)", "1.5", "int"]),
        ("train_iters: 1e3\n", ["--train-iters (train_iters)", "'1e3'", "int"]),
        ("bf16: 1\n", ["--bf16 (bf16)", "1", "bool"]),
        ("bf16: maybe\n", ["--bf16 (bf16)", "'maybe'", "bool"]),
        ("save: 3\n", ["--save (save)", "3", "str"]),
        ("save: {a: 1}\n", ["--save (save)", "{'a': 1}", "str"]),
        ("save: 2025-12-31\n", ["--save (save)", "str"]),
        ("chat_template_kwargs: [a]\n", ["--chat-template-kwargs (chat_template_kwargs)", "['a']", "str"]),
        ("chat_template_kwargs: {a: 2025-12-31}\n", ["cannot be written as JSON", "put it in quotes"]),
        ("chat_template_date: 2025\n", ["--chat-template-date (chat_template_date)", "2025", "str"]),
        ("optimizer: adams\n", ["--optimizer adams", "adam, sgd"]),
        ("stop_token_ids: 5\n", ["--stop-token-ids (stop_token_ids)", "not a list", "[5]"]),
        ("stop_token_ids: '12'\n", ["--stop-token-ids (stop_token_ids)", "not a list"]),
        ("stop_token_ids: [a]\n", ["--stop-token-ids (stop_token_ids)", "'a'", "int"]),
        ("stop_token_ids: [null]\n", ["stop_token_ids", "int"]),
        ("stop_token_ids: null\n", ["stop_token_ids", "int"]),
    ],
)
def test_wrong_files(capsys, yaml_file, text, words) -> None:
    message = refused(capsys, "--config-file", yaml_file(text))
    for word in words:
        assert word in message


def test_arguments_of_a_template_are_a_mapping_of_yaml_or_json(yaml_file) -> None:
    text = '{"enable_thinking": false, "a": ["ß", null]}'
    mapping = yaml_file(f"teacher_chat_template_kwargs: {text}\nchat_template_date: 2025-12-31\n")
    of_file = parse_config(["--config-file", mapping])
    of_flags = parse_config(["--teacher-chat-template-kwargs", text, "--chat-template-date", "2025-12-31"])
    assert of_file == of_flags
    assert of_file.teacher.chat_template_kwargs == text and of_file.data.chat_template_date == "2025-12-31"
    assert parse_config(["--config-file", yaml_file(to_yaml(of_file))]) == of_file


def test_a_file_that_is_not_utf8(capsys, tmp_path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"save: \xff\n")
    assert "run.yaml: not YAML" in refused(capsys, "--config-file", str(tmp_path / "run.yaml"))


# Config.check

COMPLETE = ["--hf-checkpoint", "s", "--tokenizer-model", "s.model", "--prompt-data", "p.jsonl"]
COMPLETE += ["--teacher-hf-checkpoint", "t", "--teacher-tokenizer-model", "t.model"]


def check(*argv: str, dp: int = 1, base: list[str] = COMPLETE) -> str:
    """The message of the error that check raises, or ''."""
    try:
        parse_config([*base, *argv]).check(data_parallel_size=dp)
    except ValueError as error:
        return str(error)
    return ""


def test_a_complete_configuration_passes() -> None:
    assert check() == ""
    assert (
        check("--rollout-batch-size", "6", "--n-samples-per-prompt", "4", "--micro-batch-size", "3", dp=4)
        == ""
    )
    assert (
        check("--rollout-batch-size", "6", "--n-samples-per-prompt", "4", "--global-batch-size", "24") == ""
    )


def test_global_batch_size_is_the_rollout_batch() -> None:
    message = check("--rollout-batch-size", "6", "--n-samples-per-prompt", "4", "--global-batch-size", "12")
    assert "--global-batch-size 12" in message
    assert "--rollout-batch-size (6) x --n-samples-per-prompt (4) = 24" in message


@pytest.mark.parametrize(
    "rollout, samples, micro, dp, product, advice",
    [
        (48, 1, 5, 4, 20, "40 or 60"),
        (3, 1, 2, 4, 8, "8"),
        (6, 4, 8, 2, 16, "4 or 8"),
        (7, 3, 2, 1, 2, "6 or 8"),
    ],
)
def test_batch_sizes_that_do_not_divide(rollout, samples, micro, dp, product, advice) -> None:
    def flags(rollout_batch_size) -> list[str]:
        return [
            *("--rollout-batch-size", str(rollout_batch_size), "--n-samples-per-prompt", str(samples)),
            *("--micro-batch-size", str(micro)),
        ]

    message = check(*flags(rollout), dp=dp)
    assert f"global batch size ({rollout * samples})" in message
    assert f"--micro-batch-size ({micro}) x data-parallel size ({dp}) = {product};" in message
    assert message.endswith(f"use a --rollout-batch-size of {advice}")
    for size in advice.split(" or "):
        assert check(*flags(size), dp=dp) == ""


def test_interleaved_stages_need_as_many_micro_batches() -> None:
    flags = ["--pipeline-model-parallel-size", "4", "--num-virtual-stages-per-pipeline-rank", "2"]
    flags += ["--micro-batch-size", "2", "--rollout-batch-size"]
    message = check(*flags, "24", dp=2)
    assert message.startswith("--num-virtual-stages-per-pipeline-rank 2: ")
    assert "(6 a step: global batch size (24)" in message and "--pipeline-model-parallel-size (4)" in message
    assert check(*flags, "32", dp=2) == ""
    assert (
        check("--pipeline-model-parallel-size", "4", "--micro-batch-size", "2", "--rollout-batch-size", "24")
        == ""
    )


def test_missing_files_are_all_named() -> None:
    message = check(base=["--prompt-data", "p"])
    for flag in (
        "--hf-checkpoint",
        "--tokenizer-model",
        "--teacher-hf-checkpoint",
        "--teacher-tokenizer-model",
    ):
        assert f"{flag}," in message or f"{flag}:" in message
    assert "--prompt-data" not in message and "--simct-interface paper" in message
    assert check("--simct-interface", "sft", base=COMPLETE[:6]) == ""
    assert "--teacher-hf-checkpoint" in check("--simct-interface", "strict", base=COMPLETE[:6])


def test_options_that_contradict_each_other() -> None:
    assert "--eval-prompt-data" in check("--exit-eval-accuracy", ".5")
    assert "--eval-prompt-data" in check("--eval-benchmark", "gsm8k")
    for flag, *value in (
        ["--exit-signal-handler"],
        ["--exit-duration-in-mins", "5"],
        ["--save-interval", "5"],
        ["--save-retain", "2"],
    ):
        assert check(flag, *value).startswith(f"{flag} needs --save")
        assert check(flag, *value, "--save", "there") == ""
    for flag, value in (
        ("--chat-template-kwargs", "{}"),
        ("--teacher-chat-template-kwargs", "{}"),
        ("--chat-template-date", "2025-12-31"),
    ):
        assert check(flag, value) == f"{flag} needs --apply-chat-template"
        assert check(flag, value, "--apply-chat-template") == ""
    assert "--wandb-project" in check("--wandb-save-dir", "there")


@pytest.mark.parametrize(
    "flag, value, bound",
    [
        ("--micro-batch-size", "0", "at least 1"),
        ("--micro-batch-size", "-2", "at least 1"),
        ("--rollout-batch-size", "0", "at least 1"),
        ("--n-samples-per-prompt", "0", "at least 1"),
        ("--train-iters", "0", "at least 1"),
        ("--save-retain", "0", "at least 1"),
        ("--exit-duration-in-mins", "-1", "at least 0"),
        ("--rollout-max-response-len", "0", "at least 1"),
        ("--rollout-engine-batch-size", "0", "at least 1"),
        ("--make-vocab-size-divisible-by", "0", "at least 1"),
        ("--teacher-make-vocab-size-divisible-by", "0", "at least 1"),
        ("--log-interval", "0", "at least 1"),
        ("--rollout-temperature", "-0.1", "at least 0"),
        ("--eval-samples", "-1", "at least 0"),
        ("--lr", "-1.0", "at least 0"),
        ("--lr", "nan", "at least 0"),
        ("--lr", "inf", "finite"),
        ("--weight-decay", "inf", "finite"),
        ("--rollout-temperature", "inf", "finite"),
        ("--eval-temperature", "inf", "finite"),
        ("--seed", "-1", "at least 0"),
        ("--seed", str(2**63), "below 2**63"),
        ("--adam-beta1", "1", "at least 0 and below 1"),
        ("--adam-beta2", "nan", "at least 0 and below 1"),
        ("--exit-eval-accuracy", "60", "at least 0 and at most 1"),
        ("--exit-eval-accuracy", "nan", "at least 0 and at most 1"),
        ("--rollout-top-p", "0", "above 0 and at most 1"),
        ("--rollout-top-p", "1.5", "above 0 and at most 1"),
        ("--rollout-top-k", "0", "at least 1, or -1 for all tokens"),
        ("--rollout-top-k", "-2", "at least 1, or -1 for all tokens"),
        ("--lr-warmup-fraction", "1", "below 1"),
    ],
)
def test_numbers_without_a_meaning(flag, value, bound) -> None:
    message = check(flag, value)
    assert message.startswith(f"{flag} ") and bound in message


def test_no_limit_is_a_limit() -> None:
    assert check("--clip-grad", "inf") == ""
    assert check("--exit-duration-in-mins", "inf", "--save", "there") == ""


# What may be imported

HEAVY = ["megatron", "transformers", "sentencepiece", "tiktoken", "apex", "transformer_engine"]


@pytest.mark.parametrize(
    "modules, more",
    [
        (["megatron_simct.config.options", "megatron_simct.config.flags"], ["torch", "numpy"]),
        (
            ["megatron_simct.records", "megatron_simct.alignment"],
            ["megatron_simct.parallel", "megatron_simct.losses"],
        ),
    ],
)
def test_light_modules_load_no_heavy_library(modules, more) -> None:
    code = f"import sys, {', '.join(modules)}; print([m for m in {HEAVY + more!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "flag",
    [
        "--make-vocab-size-divisible-by",
        "--distributed-timeout-minutes",
        "--rollout-batch-size",
        "--n-samples-per-prompt",
        "--rollout-max-prompt-len",
        "--rollout-max-response-len",
    ],
)
def test_a_number_that_no_machine_can_hold_is_refused(flag: str) -> None:
    config = parse_config([flag, str(2**40)])
    with pytest.raises(ValueError, match=rf"{flag} {2**40}: must be at least 1 and at most \d+"):
        config.check(data_parallel_size=1)


def test_the_help_has_a_line_for_each_interface_with_its_source_and_its_failure() -> None:
    lines = dict(line.split(": ", 1) for line in interface_help().splitlines() if ": " in line)
    for name, method in METHODS.items():
        assert method.text in lines[name] and method.source and f"({method.source})" in lines[name]
        assert method.failure in lines[name] and (method.failure or name in ("kd", "sft", "reward"))
    assert set(METHODS) == set(INTERFACES), "a method has a name, a line of help, and a file in losses/kinds"
    assert set(VARIANTS) <= set(lines)
