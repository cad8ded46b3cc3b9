"""Renders chat templates as transformers' apply_chat_template does, within limits, in a subprocess.

The process starts when a template is read or rendered, and ends with this one or when it has been idle for
long.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from megatron_simct.alignment import template_worker

MAX_SOURCE = 1 << 20
"""Characters of a template; published ones have some 20,000."""
MAX_CHARACTERS = 1 << 24
"""Characters of one rendered text."""
MAX_CPU_S = 5.0
"""Limit of CPU time for one text."""
MAX_MEMORY_MIB = 1024
"""Address space of the process that renders."""
MAX_IDLE_S = 60.0
"""After this time without a request the process ends; the next request starts another one."""
_WAIT_S = 600.0
"""Longest wait for an answer; only a stopped or starved process exceeds it."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a message may hold its reasoning, the one that templates read first."""


class TemplateLimit(ValueError):
    """A template exceeds the limits of time, memory or text."""


def variables_of(source: str, *, date: str) -> frozenset[str]:
    """The names that a template reads and does not set.

    Raises ValueError with the reason if it is invalid.
    """
    return frozenset(_ask(source, date, None)["reads"])


def texts_of(source: str) -> list[str]:
    """The texts that a template holds: between its tags, and as strings in them.

    Raises ValueError if it is invalid.
    """
    return list(_ask(source, "2025-01-01", None)["texts"])


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    variables: Mapping[str, Any],
    date: str,
    add_generation_prompt: bool,
) -> str:
    """The text that a template writes for messages.

    date: YYYY-MM-DD, for strftime_now. variables: special tokens and the template's own switches.
    Raises ValueError with the reason if the template refuses the messages, TemplateLimit if it exceeds a
    limit.
    """
    given = {
        "messages": [_as_templates_read(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    text: str = _ask(source, date, {**variables, **given})["text"]
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it writes half a surrogate pair, which has no bytes") from None
    return text


def close() -> None:
    """End the process that renders. The next template starts another one."""
    with _lock:
        _end()


def _as_templates_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without keys that are null, its reasoning under the names that templates use."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


# The process

_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None
_owner = 0
"""The process that started the subprocess; a forked process must start its own."""


def _ask(source: str, date: str, variables: dict[str, Any] | None) -> dict[str, Any]:
    """One request and its answer."""
    if len(source) > MAX_SOURCE:
        raise TemplateLimit(f"has {len(source):,} characters; a template may have {MAX_SOURCE:,}")
    request = {
        "source": source,
        "date": date,
        "variables": variables,
        "max_characters": MAX_CHARACTERS,
        "max_cpu_s": MAX_CPU_S,
        "max_memory_mib": MAX_MEMORY_MIB,
    }
    with _lock:
        answer = _exchange(json.dumps(request) + "\n") or _exchange(json.dumps(request) + "\n")
        assert answer is not None, "a process that has just started is not idle"
        if template_worker.LIMIT in answer:
            _end()
            raise TemplateLimit(answer[template_worker.LIMIT])
    if "refused" in answer:
        raise ValueError(answer["refused"])
    return answer


def _exchange(request: str) -> dict[str, Any] | None:
    """The answer of the process; None if it has ended because it was idle."""
    process = _started()
    assert process.stdin is not None and process.stdout is not None, "they are pipes"
    line = ""
    try:
        process.stdin.write(request)
        process.stdin.flush()
        if select.select([process.stdout], [], [], _WAIT_S)[0]:
            line = process.stdout.readline()
    except BrokenPipeError:
        pass
    except BaseException:  # a Ctrl-C: the answer would be taken for that to the next request
        _end()
        raise
    if line.endswith("\n"):
        return json.loads(line)
    code = _end()
    return {template_worker.LIMIT: _why_it_ended(code)} if code else None


def _why_it_ended(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"takes more than {MAX_CPU_S:g} s of CPU time"
    if code < 0:
        return f"ends the interpreter that renders it ({signal.strsignal(-code)})"
    return f"cannot be rendered: the interpreter ended with exit code {code}"


def _started() -> subprocess.Popen[str]:
    global _process, _owner
    if _process is not None and _owner == os.getpid() and _process.poll() is not None:
        _end()  # it ended between two requests, which is not the template's fault
    if _process is None or _owner != os.getpid():
        packages = (markupsafe.__file__, jinja2.__file__)  # jinja2 imports markupsafe
        _process = subprocess.Popen(
            [sys.executable, "-I", "-B", template_worker.__file__, str(MAX_IDLE_S), *packages],
            env={"PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,  # a Ctrl-C is for us
        )
        _owner = os.getpid()
    return _process


def _end() -> int:
    """The exit code of the process, which ends now unless it has."""
    global _process
    process, _process = _process, None
    if process is None or _owner != os.getpid():
        return 0
    process.kill()  # one that has ended by itself keeps its exit code
    code = process.wait(timeout=60)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None, "they are pipes"
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    return code


atexit.register(close)
