"""Properties of a pair of models: prompts in both chat templates, stop tokens, coverage of the
text, and the interface.

Every function returns findings, and each of these says what to change. Mistakes that training itself refuses
are left to the code that trains: `options.py` and `model.py` call it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_simct.alignment.alignment_map import AlignmentMap
from megatron_simct.alignment.coverage import Coverage, measure_coverage
from megatron_simct.alignment.cut_rules import with_continuations
from megatron_simct.alignment.hf_folder import read_folder, turn_end
from megatron_simct.alignment.segments import align
from megatron_simct.alignment.templates import TemplateLimit
from megatron_simct.alignment.tokenizer import Tokenizer
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.data.prompts import Row
from megatron_simct.data.rendering import ChatTemplate, Messages
from megatron_simct.models.families import Architecture
from megatron_simct.models.head import Head
from megatron_simct.preflight.bias import Bias, has_bias, measure_bias, words_of
from megatron_simct.preflight.findings import Finding, failed, passed, warned

MAX_TEXTS, MAX_CHARACTERS = 400, 200_000
"""Limits of the prompt sample used for coverage and template checks."""

LOST_FAIL, LOST_WARN = 0.2, 0.005
"""Share of bytes in no unit from which a pair is refused, and from which a warning is given."""
SKIPPED_WARN = 0.05

_MARKERS = re.compile(r"<\|[a-z_]+\|>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>|\[/?INST\]|<<SYS>>")
"""Strings that chat templates write, and that are rare in other texts."""
_NUMBERS = ("7", "12", "365", "1234", "31415926")
_SAMPLE: Messages = [{"role": "user", "content": "What is six times seven?"}]
_SYSTEM: Messages = [{"role": "system", "content": "Be brief."}, *_SAMPLE]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model of the pair. `flag` is the prefix of its flags: empty, or for example teacher-."""

    name: str
    flag: str
    folder: str
    architecture: Architecture | Head
    tokenizer: Tokenizer
    chat: ChatTemplate | None


def check_stop_tokens(side: Side) -> list[Finding]:
    """Check that the token that ends a turn in the chat template is a stop token."""
    table = side.tokenizer.table
    stops = ", ".join(
        f"{i} ({side.tokenizer.stop_sources[i]})" if i in side.tokenizer.stop_sources else str(i)
        for i in table.stop_ids
    )
    if side.chat is not None and side.tokenizer.encode_chat is not None:
        marks = _MARKERS.findall(_text(side.chat, [*_SAMPLE, {"role": "assistant", "content": "42"}]) or "")
        end = turn_end(read_folder(Path(side.folder)), set(marks))
        ids = [] if end is None else list(side.tokenizer.encode_chat(end))
        if len(ids) == 1 and ids[0] not in table.stop_ids:
            return [
                failed(
                    side.name,
                    "stop tokens",
                    f"the chat template ends a turn with {end} ({ids[0]}), which is not among the stop ids "
                    f"({stops}): responses would run to the length limit; add this id",
                    flag=f"--{side.flag}stop-token-ids",
                )
            ]
    return [passed(side.name, "stop tokens", stops)]


def check_vocabulary(side: Side) -> list[Finding]:
    """Check that the embedding has a row for every id of the tokenizer."""
    ids, rows = side.tokenizer.table.num_ids, side.architecture.vocab_size
    if ids > rows:
        return [
            failed(
                side.name,
                "vocabulary",
                f"the tokenizer has {ids:,} ids, but config.json says vocab_size {rows:,}: they do not "
                "belong to one model",
                flag=f"--{side.flag}tokenizer-model",
            )
        ]
    return [passed(side.name, "vocabulary", f"{ids:,} ids, {rows:,} rows")]


def check_length(side: Side, *, prompt_len: int, response_len: int) -> list[Finding]:
    """Check that prompt and response fit into the model's positions.

    prompt_len and response_len are in the side's own tokens.
    """
    limit, wanted = side.architecture.max_position_embeddings, prompt_len + response_len
    if limit is None:  # an engine runs this model and reports its limit
        return []
    if wanted > limit:
        return [
            failed(
                side.name,
                "context",
                f"prompts of {prompt_len:,} and responses of {response_len:,} tokens add up to {wanted:,}, "
                f"but the model has max_position_embeddings {limit:,}; lower this or "
                "--rollout-max-prompt-len",
                flag="--rollout-max-response-len",
            )
        ]
    return [passed(side.name, "context", f"{wanted:,} of {limit:,} positions")]


def check_templates(student: Side, teacher: Side | None, rows: Sequence[Row], *, chat: bool) -> list[Finding]:
    """How the two sides read one conversation: markers in plain prompts, BOS, system role, thinking."""
    sides = [student] if teacher is None else [student, teacher]
    rows = rows[:MAX_TEXTS]
    if not chat:
        for row in rows:
            texts = [text for text in (row.prompt, row.read_by_teacher) if isinstance(text, str)]
            found = next(filter(None, map(_MARKERS.search, texts)), None)
            if found:
                return [
                    failed(
                        "pair",
                        "chat template",
                        f"{row.where}: the prompt contains {found[0]!r}, which both models read as ordinary "
                        "text without chat templates; set this flag, and give only the message or messages",
                        flag="--apply-chat-template",
                    )
                ]
        if any(_has_template(side) for side in sides):
            return [
                warned(
                    "pair",
                    "chat template",
                    "prompts are read as plain text although a model has a chat template; set it for "
                    "instruction-tuned models",
                    flag="--apply-chat-template",
                )
            ]
        return [passed("pair", "chat template", "prompts are plain texts")]
    findings = []
    for side in sides:
        assert side.chat is not None
        findings += _check_bos(side, rows)
    systems = {side.name: _text(side.chat, _SYSTEM) is not None for side in sides if side.chat}
    shown = ", ".join(f"{name}: {'supported' if has else 'refused'}" for name, has in systems.items())
    findings.append(passed("pair", "system role", f"{shown}"))
    thinking = {side.name: _thinks(side.chat) for side in sides if side.chat}
    if len(set(thinking.values())) > 1:
        side = next(side for side in sides if thinking[side.name])
        assert side.chat is not None
        switch = "enable_thinking" in side.chat.variables
        way_out = (
            'set {"enable_thinking": false} in'
            if switch
            else "replace chat_template.jinja by a template without it"
        )
        findings.append(
            warned(
                "pair",
                "thinking",
                f"only the {side.name}'s template has a thinking mode, and its text after <think> is "
                f"unlikely under the other model; {way_out}",
                flag=f"--{side.flag}{'chat-template-kwargs' if switch else 'hf-checkpoint'}",
            )
        )
    else:
        findings.append(
            passed("pair", "thinking", f"{'both' if any(thinking.values()) else 'neither'} side thinks")
        )
    return findings


def _has_template(side: Side) -> bool:
    try:
        ChatTemplate.load(side.folder, flag="")
    except ValueError:
        return False
    return True


def _check_bos(side: Side, rows: Sequence[Row]) -> list[Finding]:
    """Check for a second BOS: a template may write one before a message that begins with one."""
    bos = side.tokenizer.bos_id
    for row in rows:
        prompt = read_by(side, row)
        assert side.chat is not None and not isinstance(prompt, str)
        ids = side.chat.render(prompt, side.tokenizer)
        found = any(_MARKERS.search(message["content"]) for message in prompt)
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            return [
                failed(
                    side.name,
                    "BOS",
                    f"{row.where}: the rendered prompt begins with two beginning-of-sequence tokens; remove "
                    "one from the text or the template",
                    flag="--prompt-data" if found else f"--{side.flag}hf-checkpoint",
                )
            ]
        if found:
            return [
                failed(
                    side.name,
                    "chat template",
                    f"{row.where}: a message contains markers of a chat template, so it would be rendered "
                    "twice; give only its text in",
                    flag="--prompt-data",
                )
            ]
    return [passed(side.name, "chat template", "all prompts of the sample were rendered")]


def _text(chat: ChatTemplate, messages: Messages) -> str | None:
    """The rendered text; None if the template refuses the messages."""
    try:
        return chat.text(messages)
    except TemplateLimit as error:
        raise ValueError(f"{chat.name} {error}") from None
    except ValueError:
        return None


def _thinks(chat: ChatTemplate) -> bool:
    """Whether a thinking block is open after the prompt: the template opens one, or a model with this
    template opens one unless enable_thinking is false.
    """
    if chat.arguments.get("enable_thinking") is False:
        return False
    rendered = _text(chat, _SAMPLE) or ""
    opened = rendered.count("<think>") > rendered.count("</think>")
    return opened or ("enable_thinking" in chat.variables and "</think>" not in rendered)


def read_by(side: Side, row: Row) -> Messages | str:
    """The row's prompt for this side: the teacher's own prompt, if the row has one."""
    return row.read_by_teacher if side.flag else row.prompt


def side_by_side(student: Side, teacher: Side | None, row: Row) -> dict[str, str]:
    """One prompt as each side reads it."""
    texts = {}
    for side in [student] if teacher is None else [student, teacher]:
        prompt = read_by(side, row)
        if isinstance(prompt, str):
            texts[side.name] = prompt
        elif side.chat is not None:
            texts[side.name] = _text(side.chat, prompt) or ""
    return texts


def texts_of(rows: Sequence[Row]) -> list[str]:
    """The texts of the prompts, including the teacher's own, and of the given responses or labels."""
    texts, size = [], 0
    step = max(1, len(rows) // MAX_TEXTS)
    for row in rows[::step]:
        prompts = [row.prompt] if row.teacher_prompt is None else [row.prompt, row.teacher_prompt]
        read = [
            prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
            for prompt in prompts
        ]
        texts.append("\n".join([*read, row.response or row.label or ""]).strip("\n"))
        size += len(texts[-1])
        if size > MAX_CHARACTERS:
            break
    return texts


def coverage_of(
    rows: Sequence[Row], *, student: Side, teacher: Side, alignment_map: AlignmentMap
) -> Coverage:
    """Coverage of the user's own prompts."""
    return measure_coverage(
        texts_of(rows), student=student.tokenizer, teacher=teacher.tokenizer, alignment_map=alignment_map
    )


def check_coverage(coverage: Coverage) -> list[Finding]:
    """Check how much of the text an interface can compare."""
    lost = sum(coverage.bytes_dropped.values()) / max(coverage.bytes, 1)
    shares = coverage.student_token_shares
    said = (
        f"student tokens of the prompts: 1:1 {shares['1_1']:.1%}, 1:n {shares['1_n']:.1%}, n:1 "
        f"{shares['n_1']:.1%}, n:m {shares['n_m']:.1%}; bytes lost {lost:.2%}"
    )
    reasons = ", ".join(f"{reason} {count}" for reason, count in coverage.bytes_dropped.items())
    if lost > LOST_FAIL:
        message = f"{said} ({reasons}): the two tokenizers do not represent the same text; choose others"
        return [failed("pair", "coverage", message, flag="--teacher-tokenizer-model")]
    if lost > LOST_WARN:
        return [warned("pair", "coverage", f"{said} ({reasons})", flag="--teacher-tokenizer-model")]
    return [passed("pair", "coverage", said)]


def check_interface(interface: str, coverage: Coverage, *, student: Side, teacher: Side) -> list[Finding]:
    """Check the interface against the pair. If digits are grouped differently, only `bytes`
    learned in our study.

    Interfaces of units lower the probability of the student's right first token if the student writes in
    several tokens a text that is one token for the teacher. The share of such tokens (1:n) is at risk.
    """
    differ = any(not _cut_alike(number.encode(), student=student, teacher=teacher) for number in _NUMBERS)
    at_stake = coverage.student_token_shares["1_n"] + coverage.student_token_shares["n_m"]
    if interface in ("bytes", "sft", "reward"):
        return [passed("pair", "interface", f"{interface}")]
    if differ:
        return [
            warned(
                "pair",
                "interface",
                f"the two tokenizers split digits differently; then {interface} changes even a perfect "
                "student (docs/perfect_student.md), and it lost accuracy on numbers in our study "
                "(docs/interfaces.md); use bytes",
                flag="--simct-interface",
            )
        ]
    if at_stake > 0.15:
        return [
            warned(
                "pair",
                "interface",
                f"{at_stake:.0%} of the student's tokens are in units of several student tokens; {interface} "
                "compares only their first token, or none; consider bytes",
                flag="--simct-interface",
            )
        ]
    return [passed("pair", "interface", f"{interface}; both tokenizers split digits in the same way")]


def bias_of(rows: Sequence[Row], interface: InterfaceConfig, *, student: Side, teacher: Side) -> Bias | None:
    """The bias on the words of the user's own prompts. None if the interface has no such figure, or the
    prompts have no words.
    """
    language = words_of(texts_of(rows))
    if not has_bias(interface) or len(language) < 2:
        return None
    sides = [student.tokenizer, teacher.tokenizer]
    if interface.interface == "bytes" and interface.byte_bounds == "any":
        sides = [with_continuations(tokenizer) for tokenizer in sides]
    return measure_bias(language, [interface], student=sides[0], teacher=sides[1])[0]


def check_bias(bias: Bias, interface: InterfaceConfig) -> list[Finding]:
    """Check whether the interface has a loss for a student that is already right."""
    said = (
        f"on {bias.words:,} words of the prompts, a student that is already right has a loss of "
        f"{bias.perfect:.4f} nats a word under {interface.interface}; a less sure student, at a true "
        f"distance of {bias.true:.3f}, has {bias.flattened:.3f}"
    )
    if not bias.is_large:
        return [passed("pair", "bias", said)]
    if interface.interface == "bytes":
        return [
            warned(
                "pair",
                "bias",
                f"{said}; with the value any this loss is 0 for every tokenizer",
                flag="--simct-byte-bounds",
            )
        ]
    way_out = "bytes with --simct-byte-bounds any has no such loss"
    return [warned("pair", "bias", f"{said}; {way_out}", flag="--simct-interface")]


def _cut_alike(text: bytes, *, student: Side, teacher: Side) -> bool:
    """Whether both tokenizers cut the text at the same places."""
    teacher_ids, student_ids = teacher.tokenizer.encode(text), student.tokenizer.encode(text)
    segments = align(teacher.tokenizer.table, teacher_ids, student.tokenizer.table, student_ids).segments
    return len(segments) == len(teacher_ids) == len(student_ids)
