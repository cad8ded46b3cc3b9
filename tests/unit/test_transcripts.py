"""Given transcripts in four chat templates: what is compared is the same text of the assistant on both sides.

transformers renders the same messages, says which tokens are the assistant's ({% generation %}), and where
each token lies in the text.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_simct.alignment import Tokenizer, load_tokenizer
from megatron_simct.alignment.plan import plan_pair
from megatron_simct.alignment.turns import MASK_REASONS, plan_turns
from megatron_simct.data.prompts import PromptSource, Row, _rendered, read_prompts
from megatron_simct.data.rendered import RenderedRows, flat
from megatron_simct.data.rendering import ChatTemplate
from megatron_simct.data.transcripts import Side, read_transcript
from megatron_simct.records import AlignedPair, Prompt, Rollout, TeacherNeeds, Transcript, Turns
from megatron_simct.rollout.engine import GivenResponses, Sampling
from tests.huggingface import save_byte_fallback, save_byte_level

transformers = pytest.importorskip("transformers")

Messages = list[dict[str, Any]]

THINKS = (  # in the manner of Qwen3: thinking of the last answer only, results of tools in the user's turn
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- elif m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- else %}{%- set content = m.content %}{%- set reasoning = m.reasoning_content or '' %}"
    "{%- if '</think>' in content and not reasoning %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{%- if loop.index0 > ns.last and reasoning %}"
    "{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
    "{{ content.lstrip('\n') if reasoning else content }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{%- endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
STRIPS = (  # in the manner of Llama-3: every text is stripped, a call stands in place of the content
    "{{ 'system: Today is a day.<|endoftext|>' }}{%- for m in messages %}"
    "{{ '<|im_start|>' + m.role + '|>\n\n' }}{%- if m.role == 'assistant' %}{% generation %}"
    "{%- if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{%- else %}{{ m.content | trim }}"
    "{%- endif %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{%- else %}{{ m.content | trim + '<|im_end|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant|>\n\n' }}{%- endif %}"
)
INST = (  # in the manner of Llama-2: the system's text in the first message, blanks around an answer
    "{{ '<s>' }}{%- if messages[0].role == 'system' %}{{ '<<SYS>>' + messages[0].content + '<</SYS>>' }}"
    "{%- endif %}{%- for m in messages %}{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{%- elif m.role == 'tool' %}{{ '[RESULT] ' + m.content + ' [/RESULT]' }}"
    "{%- elif m.role == 'assistant' %}{{ ' ' }}{% generation %}{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}{{ '[CALL]' + (call.function.arguments | tojson) }}{%- endfor %}"
    "{% endgeneration %}{{ ' </s>' }}{%- endif %}{%- endfor %}"
)
KEEPS = (  # plain words for marks, and all thinking stays
    "{%- for m in messages %}{{ '\n### ' + m.role + '\n' }}{%- if m.role == 'assistant' %}{% generation %}"
    "{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif %}"
    "{{ m.content }}{{ '</s>' }}{% endgeneration %}{%- else %}{{ m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '\n### assistant\n' }}{%- endif %}"
)
TEMPLATES = {"thinks": THINKS, "strips": STRIPS, "inst": INST, "keeps": KEEPS}
FALLBACK = ("inst", "keeps")


@dataclass(frozen=True)
class Model:
    """One side, and transformers' tokenizer of the same folder."""

    name: str
    tokenizer: Tokenizer
    chat: ChatTemplate
    reference: Any

    def spelled(self, ids: Sequence[int]) -> list[bytes]:
        """What each id stands for in the text, a special token as it is written."""
        table = self.tokenizer.table
        return [
            self.reference.convert_ids_to_tokens(i).encode() if table.special[i] else table.bytes_of(i)
            for i in map(int, ids)
        ]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    found = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp(name)
        save_byte_fallback(folder) if name in FALLBACK else save_byte_level(folder)
        (folder / "chat_template.jinja").write_text(template)
        reference = transformers.AutoTokenizer.from_pretrained(str(folder))
        reference.chat_template = template
        chat = ChatTemplate.load(str(folder), flag="--hf-checkpoint")
        found[name] = Model(name, load_tokenizer(str(folder)), chat, reference)
    return found


QUESTIONS = [
    "How many apples?",
    "the cat",
    " Привет, мир ",
    "你好 世界 😀",
    "</think> 12 <|im_end|>",
    "assistant",
]
ANSWERS = [
    "Tom has 12 apples.",
    "yes",
    "  two blanks, then a line\n",
    "\n\nПривет 世界 😀\n",
    "",
    " \n ",
    "<think>\n12 and 7\n</think>\n\n19",
    "no start</think>\nthe mat",
    "1234",
    "assistant",
    "a <|im_end|> in the text",
]
THOUGHTS = [None, None, "he gets 7 more", "\nmat, cat\n"]


def transcript(seed: int) -> Messages:
    rng = random.Random(seed)
    messages: Messages = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(["Be brief.", " sat on "])})
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": rng.choice(QUESTIONS)})
        if rng.random() < 0.3:
            arguments = {"a": rng.randint(1, 99), "b": "é"}
            call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
            messages.append({"role": "assistant", "content": rng.choice(ANSWERS), "tool_calls": [call]})
            messages.append({"role": "tool", "content": rng.choice(["19", "yes", " 1234\n"])})
        answer = {"role": "assistant", "content": rng.choice(ANSWERS)}
        thought = rng.choice(THOUGHTS)
        messages.append(answer | ({"reasoning_content": thought} if thought else {}))
    return messages


def bytes_of_assistant(messages: Messages) -> int:
    total = 0
    for message in messages:
        if message["role"] == "assistant":
            total += len(message["content"].encode()) + len(message.get("reasoning_content", "").encode())
            if message.get("tool_calls"):
                total += len(json.dumps(message["tool_calls"], ensure_ascii=False).encode())
    return total


def read(student: Model, teacher: Model, messages: Messages, *, max_len: int = 10_000) -> Any:
    sides = [Side(tokenizer=m.tokenizer, chat=m.chat, messages=messages) for m in (student, teacher)]
    return read_transcript(sides[0], sides[1:], max_len=max_len)


def texts_of(model: Model, messages: Messages, prompt: np.ndarray, turns: Turns) -> tuple[list[str], int]:
    """The text of each response, found by transformers' tokens; how many have just transformers' ids."""
    whole = model.reference.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    text = model.reference.apply_chat_template(messages, tokenize=False)
    encoded = model.reference(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded.input_ids == whole["input_ids"]
    pieces = model.spelled(encoded.input_ids)
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - [len(piece) for piece in pieces]
    ours = model.spelled([*prompt, *turns.ids])
    assert b"".join(pieces).startswith(b"".join(ours))
    found, same = [], 0
    for start, end in turns.spans.tolist():
        ids = turns.ids[start:end]
        content = ids[:-1] if int(ids[-1]) in model.tokenizer.table.stop_ids else ids
        begin = len(b"".join(ours[: len(prompt) + start]))
        data = model.tokenizer.decode(content)
        touched = ((ends > begin) & (starts < begin + len(data))).nonzero()[0]
        first, last = int(touched[0]), int(touched[-1])
        assert all(whole["assistant_masks"][first : last + 1])
        there = text[encoded.offset_mapping[first][0] : encoded.offset_mapping[last][1]]
        assert data.decode() in there
        inside = encoded.input_ids[first : last + 1]
        if (
            starts[first] == begin
            and ends[last] == begin + len(data)
            and not any(model.tokenizer.table.special[i] for i in inside)
        ):
            assert there == data.decode() and inside == content.tolist()
            same += 1
        found.append(data.decode())
    return found, same


PAIRS = list(itertools.permutations(TEMPLATES, 2))


@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=map("-".join, PAIRS))
def test_every_compared_byte_is_the_same_text_of_the_assistant(models, student, teacher) -> None:
    sides = [models[student], models[teacher]]
    counts: Counter[str] = Counter()
    for seed in range(100):
        messages = transcript(seed)
        prompts, given = read(*sides, messages)
        if given is None:
            counts["nothing"] += 1
            continue
        both = (given.student, *given.teachers)
        (of_student, same), (of_teacher, more) = (
            texts_of(model, messages, prompt, turns)
            for model, prompt, turns in zip(sides, prompts, both, strict=True)
        )
        assert of_student == of_teacher and len(of_student) == given.counts["turns"]
        counts["same"] += same + more
        pair = aligned(*sides, prompts, given)
        for ts, te, ss, se in pair.segments.tolist():
            ours = sides[0].tokenizer.decode(given.student.ids[given.student.labels[ss:se]])
            assert ours == sides[1].tokenizer.decode(given.teachers[0].ids[ts:te])
        dropped = sum(count for name, count in pair.counts.items() if name.startswith("bytes_dropped_"))
        assert pair.counts["bytes"] == sum(len(text.encode()) for text in of_student)
        assert dropped + pair.counts["bytes_one_to_one"] + pair.counts["bytes_unit"] == pair.counts["bytes"]
        masked = sum(pair.counts[f"bytes_masked_{reason}"] for reason in MASK_REASONS)
        assert pair.counts["bytes"] + masked == given.counts["bytes_of_turns"]
        assert given.counts["bytes_of_turns"] == bytes_of_assistant(messages)
        if student not in FALLBACK:  # whose ids spell more blanks than the text has
            first, last = (of_student_ids(sides[0], prompts[0], given, at) for at in (0, -1))
            assert given.counts["bytes_between"] == last - first - pair.counts["bytes"]
        counts.update(pair.counts)
    assert counts["nothing"] < 20 and counts["turns"] > 100 and counts["bytes"] > 2000
    assert counts["same"] > 50
    assert counts["bytes_masked_marks"] > 0 and counts["bytes_masked_tool_calls"] > 0
    assert (counts["bytes_masked_blank"] > 0) == bool({student, teacher} & {"thinks", "strips"})
    assert (counts["bytes_masked_student_template"] > 0) == (student != "keeps")  # it writes everything
    assert counts["bytes_masked_teacher_template"] > 0 or student != "keeps"
    assert counts["bytes_masked_too_long"] == counts["bytes_masked_other_text"] == 0


def of_student_ids(model: Model, prompt: np.ndarray, given: Transcript, at: int) -> int:
    """The byte at which the first response begins (0), or at which the last one ends (-1)."""
    start, end = given.student.spans[at].tolist()
    stops = int(given.student.ids[end - 1]) in model.tokenizer.table.stop_ids
    return len(b"".join(model.spelled(given.student.ids[: start if at == 0 else end - stops])))


def aligned(student: Model, teacher: Model, prompts: Sequence[np.ndarray], given: Transcript) -> AlignedPair:
    plan = partial(
        plan_pair,
        student=student.tokenizer,
        teacher=teacher.tokenizer,
        alignment_map=None,
        needs=TeacherNeeds(hidden_rows="all"),
    )
    prompt = Prompt(sample_id=3, student_ids=prompts[0], teacher_ids=prompts[1], transcript=given)
    rollout = Rollout(
        sample_id=3,
        weight_version=-1,
        student_ids=given.student.ids,
        logprobs=np.zeros(len(given.student.labels), np.float32),
        finish="length",
        transcript=given,
    )
    return plan_turns(plan, student.tokenizer.table, prompt, rollout)


def asked(*answers: dict[str, Any] | str) -> Messages:
    messages: Messages = []
    for answer in answers:
        message = {"content": answer} if isinstance(answer, str) else answer
        messages += [{"role": "user", "content": "12 7?"}, {"role": "assistant"} | message]
    return messages


def compared(models: dict[str, Model], student: str, teacher: str, messages: Messages, **more: int) -> Any:
    """The compared texts, and all counts that are not 0."""
    sides = [models[student], models[teacher]]
    _, given = read(*sides, messages, **more)
    if given is None:
        return [], {}
    texts = [
        sides[0].tokenizer.decode(given.student.ids[a:b]).decode() for a, b in given.student.spans.tolist()
    ]
    return texts, {name.removeprefix("bytes_"): count for name, count in given.counts.items() if count}


def test_thinking_is_compared_where_both_write_it_and_masked_where_one_drops_it(models) -> None:
    thinks = {"content": "19", "reasoning_content": "he gets 7"}
    messages = asked(thinks, thinks)
    texts, counts = compared(models, "keeps", "thinks", messages)
    assert texts == ["19", "he gets 7", "19"]  # the teacher's template drops the first thinking
    assert counts["masked_teacher_template"] == 9 and counts["of_turns"] == 22
    texts, counts = compared(models, "thinks", "keeps", messages)
    assert texts == ["19", "he gets 7", "19"] and counts["masked_student_template"] == 9
    texts, counts = compared(models, "keeps", "thinks", asked("<think>\na\n</think>\n\n19"))
    assert texts == ["a", "19"] and counts["masked_marks"] == 15 and counts["masked_blank"] == 4
    assert compared(models, "keeps", "strips", messages)[0] == ["19", "19"]


def test_blanks_that_one_template_strips_are_masked(models) -> None:
    texts, counts = compared(models, "thinks", "strips", asked(" a\n", "b"))
    assert texts == ["a", "b"] and counts["masked_blank"] == 2 and counts["of_turns"] == 4
    assert compared(models, "thinks", "keeps", asked(" a\n", "b"))[0] == [" a\n", "b"]
    assert compared(models, "thinks", "strips", asked(" \n", "b"))[0] == ["b"]


def test_many_blanks_at_both_ends_of_an_answer_are_stripped_one_by_one(models) -> None:
    answer = " " * 5_000 + "a" + "\n" * 5_000  # 25 million ways to strip them, of which one is right
    sides = [models["thinks"], models["strips"]]
    assert compared(models, "thinks", "strips", asked("b", answer), max_len=50_000)[0] == ["b", "a"]
    _, given = read(models["thinks"], models["keeps"], asked("b", answer), max_len=50_000)
    start, end = given.student.spans[1].tolist()
    stops = int(given.student.ids[end - 1]) in sides[0].tokenizer.table.stop_ids
    assert sides[0].tokenizer.decode(given.student.ids[start : end - stops]).decode() == answer


def test_a_teacher_reads_what_the_tokens_of_a_student_with_a_normal_form_spell(models) -> None:
    decomposed, composed = "cafe\u0301", "caf\u00e9"
    student, teacher = models["thinks"], models["keeps"]  # of which only the first writes NFC
    prompts, given = read(student, teacher, asked(decomposed, f"{decomposed} {decomposed}."))
    pair = aligned(student, teacher, prompts, given)
    for model, turns in ((student, given.student), (teacher, given.teachers[0])):
        stop = [int(turns.ids[end - 1]) in model.tokenizer.table.stop_ids for _, end in turns.spans]
        said = [
            model.tokenizer.decode(turns.ids[start : end - stops]).decode()
            for (start, end), stops in zip(turns.spans.tolist(), stop, strict=True)
        ]
        assert said == [composed, f"{composed} {composed}."]
    assert pair.counts["bytes"] == sum(len(text.encode()) for text in said)
    assert pair.counts["bytes_one_to_one"] + pair.counts["bytes_unit"] == pair.counts["bytes"]


def test_a_stop_token_belongs_to_a_response_if_both_have_one_behind_it(models) -> None:
    for student, teacher, stops in (
        ("thinks", "keeps", True),
        ("inst", "keeps", False),
        ("keeps", "inst", False),
    ):
        _, given = read(models[student], models[teacher], asked("yes", "no"))
        for model, turns in ((models[student], given.student), (models[teacher], given.teachers[0])):
            last = [int(turns.ids[end - 1]) in model.tokenizer.table.stop_ids for _, end in turns.spans]
            assert last == [stops, stops]


def test_answers_that_are_too_long_for_one_model_are_masked_whole(models) -> None:
    messages = asked("yes", "no", "the cat")
    _, given = read(models["thinks"], models["keeps"], messages)
    assert given.counts["turns"] == 3
    ends = [max(side.spans[k, 1] for side in (given.student, *given.teachers)) for k in range(3)]
    for kept, limit in ((3, ends[2]), (2, ends[2] - 1), (1, ends[1] - 1)):
        texts, counts = compared(models, "thinks", "keeps", messages, max_len=int(limit))
        assert len(texts) == kept and counts.get("masked_too_long", 0) == len(
            "nothe cat"[2 * (kept - 1) :]
        ) * (kept < 3)
    assert compared(models, "thinks", "keeps", messages, max_len=int(ends[0]) - 1) == ([], {})


def test_the_teacher_may_read_other_messages_with_as_many_answers(models) -> None:
    student, teacher = models["thinks"], models["keeps"]

    def given(messages: Messages) -> Transcript:
        of_student = Side(tokenizer=student.tokenizer, chat=student.chat, messages=asked("yes", "no"))
        of_teacher = Side(tokenizer=teacher.tokenizer, chat=teacher.chat, messages=messages)
        _, found = read_transcript(of_student, [of_teacher], max_len=1000)
        assert found is not None
        return found

    found = given([{"role": "system", "content": "A hint."}, *asked("yes", "maybe")])
    assert found.counts["turns"] == 1 and found.counts["bytes_masked_other_text"] == 2
    with pytest.raises(ValueError, match="do not have as many answers"):
        given(asked("yes"))


@pytest.mark.parametrize(
    ("looks", "kept"),
    [
        ("{% if m.content == 'yes' %}YES{% else %}{{ m.content }}{% endif %}", ["no", "the cat", "apples"]),
        ("{{ m.content }}{% if m.content | length == 2 %}!{% endif %}", ["yes", "the cat", "apples"]),
        ("{{ m.content }}{% if m.content == 'apples' %}</end>{% endif %}", ["yes", "no", "the cat"]),
        ("{{ m.content }}{{ m.content }}", []),
    ],
    ids=["another text", "its length", "more behind the last", "twice"],
)
def test_a_template_that_looks_into_a_text_is_asked_about_each_alone(
    models: dict[str, Model], tmp_path: Path, looks: str, kept: list[str]
) -> None:
    save_byte_level(tmp_path)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + looks + "{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    chat = ChatTemplate.load(str(tmp_path), flag="--hf-checkpoint")
    odd = Model("odd", load_tokenizer(str(tmp_path)), chat, None)
    answers = ["yes", "no", "the cat", "apples"]
    texts, counts = compared({**models, "odd": odd}, "odd", "keeps", asked(*answers))
    assert texts == kept
    masked = sum(len(answer) for answer in answers if answer not in kept)
    assert not kept or counts["masked_student_template"] == masked > 0


ROW = {"flag": "--prompt-data", "input_key": "prompt", "response_key": "response", "label_key": "label"}


def source(models: dict[str, Model], rows: Sequence[Row]) -> PromptSource:
    student, teacher = models["thinks"], models["inst"]
    return PromptSource(
        rows,
        student=student.tokenizer,
        batch_size=None,
        samples_per_prompt=1,
        max_prompt_len=200,
        shuffle=False,
        seed=0,
        dp_rank=0,
        dp_size=1,
        flag="--prompt-data",
        student_chat=student.chat,
        teachers=[(teacher.tokenizer, teacher.chat)],
        max_response_len=100,
    )


def rows_of(path: Path, *rows: dict[str, Any]) -> list[Row]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(str(path), **ROW, need_response=False, need_label=False, chat=True, transcripts=True)


def test_rows_become_rollouts(models, tmp_path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    calls = asked({"content": None, "tool_calls": [call]})  # nothing to compare
    path = tmp_path / "rows.jsonl"
    rows = rows_of(
        path,
        {"messages": asked("yes", "no")},
        {"prompt": "How many?", "response": "12"},
        {"messages": calls},
        {"messages": asked("yes", "no"), "teacher_system": "A hint."},
    )
    prompts = source(models, rows)
    assert len(prompts) == 3 and prompts.num_masked == 1 and prompts.num_skipped == 0
    batch = prompts.batch(0)
    assert [one.transcript.counts["turns"] for one in batch] == [2, 1, 2]
    assert len(batch[2].teacher_ids) > len(batch[0].teacher_ids)
    assert batch[2].student_ids.tolist() == batch[0].student_ids.tolist()
    tokenizer = models["thinks"].tokenizer
    sampling = Sampling(temperature=1.0, max_response_len=100, seed=0)
    for prompt, text in zip(batch, ("yesno", "12", "yesno"), strict=True):
        (rollout,) = GivenResponses(tokenizer).generate([prompt], sampling)
        assert tokenizer.decode(rollout.label_ids) == text.encode()
        assert len(rollout.logprobs) == len(rollout.label_ids) <= len(rollout.student_ids)
    with pytest.raises(ValueError, match="^--prompt-data: no answer in any of 1 rows stands in every"):
        source(models, rows_of(path, {"messages": calls}))
    with pytest.raises(ValueError, match="line 1: no response"):
        rows_of(path, {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(ValueError, match="line 1: the teacher.s own messages do not have as many"):
        source(models, rows_of(path, {"messages": asked("a", "b"), "teacher_prompt": "c"}))


@pytest.mark.parametrize("where", ["in the answer", "in the prompt"])
def test_a_row_that_is_too_deep_to_be_written_is_named(models, where: str) -> None:
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]
    message = {"role": "assistant", "content": "yes", "tool_calls": deep}
    question = {"role": "user", "content": "12 7?"}
    answered = where == "in the answer"
    row = Row(
        prompt=[question] if answered else [question, message, question],
        response=None,
        label=None,
        answer=message if answered else None,
        where="--prompt-data rows.jsonl, line 7",
    )
    with pytest.raises(ValueError, match="^--prompt-data rows.jsonl, line 7: .*recursion"):
        source(models, [row])


def test_rows_rendered_in_parts_are_the_same(models, tmp_path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    rows = rows_of(
        tmp_path / "rows.jsonl",
        {"messages": asked("yes", "no")},
        {"prompt": "How many?", "response": "12"},
        {"messages": asked({"content": None, "tool_calls": [call]})},
        {"messages": asked("yes", "no"), "teacher_system": "A hint."},
    )
    readers = [(models[name].tokenizer, models[name].chat) for name in ("thinks", "inst")]
    expected = [_rendered(row, readers[0], readers[1:], 100) for row in rows]
    cuts = [range(0, 1), range(1, 1), range(1, 3), range(3, 4)]
    found = RenderedRows([flat(expected[i] for i in some) for some in cuts])
    assert len(found) == 4 and found.compared.tolist() == [True, True, False, True]
    for i, (ids, transcript) in enumerate(expected):
        own, same = found[i]
        assert found.longest[i] == max(map(len, ids))
        assert [one.tolist() for one in own] == [one.tolist() for one in ids]
        assert {one.dtype for one in own} == {np.dtype(np.int32)}
        if transcript is None:
            assert same is None
            continue
        assert same.counts == transcript.counts and len(same.teachers) == 1
        pairs = zip((same.student, *same.teachers), (transcript.student, *transcript.teachers), strict=True)
        for one, other in pairs:
            assert one.ids.tolist() == other.ids.tolist() and one.ids.dtype == np.int32
            assert one.spans.tolist() == other.spans.tolist() and one.spans.dtype == np.int32
