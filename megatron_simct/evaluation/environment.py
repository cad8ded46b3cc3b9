"""The environment that a student talks to: --environment, a user's function.

    def environment(messages) -> reply or None

messages: the conversation so far, [{"role": ..., "content": ...}], the student's newest response the last of
them. reply: a text, which is a message of the user, or a message with its own role; None ends the
conversation. The function runs in separate processes. A call that raises, takes too long or returns anything
else ends its conversation too.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_simct.evaluation.called import Function, NoAnswer

FLAG = "--environment"
MAX_SAID = 5
"""Log lines about calls without a reply, in a run."""

Message = dict[str, Any]


class Environment:
    """Replies to many conversations, as many at a time as it has processes. To be closed."""

    def __init__(
        self, place: str, *, timeout_s: float, workers: int, say: Callable[[str], object] = print
    ) -> None:
        """place: MODULE:FUNCTION. Raises ValueError if the function cannot be imported."""
        self._functions = [Function(place, flag=FLAG, timeout_s=timeout_s) for _ in range(workers)]
        self._functions[0].start()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="environment")
        self._idle: queue.SimpleQueue[Function] = queue.SimpleQueue()
        for function in self._functions:
            self._idle.put(function)
        self._say, self._said = say, 0

    def replies(self, conversations: Mapping[int, Sequence[Message]]) -> dict[int, Message | None]:
        """The reply to each conversation, by the same number. None ends a conversation."""
        found = {}
        for number, asked in [(i, self._pool.submit(self._one, c)) for i, c in conversations.items()]:
            try:
                found[number] = asked.result()
            except NoAnswer as why:
                found[number] = None
                self._said += 1
                if self._said <= MAX_SAID:
                    last = "; further failures are not logged" if self._said == MAX_SAID else ""
                    self._say(f" {FLAG}: sample {number} ends without a reply: {why}{last}")
        return found

    def _one(self, conversation: Sequence[Message]) -> Message | None:
        function = self._idle.get()
        try:
            return as_message(function.ask(conversation))
        finally:
            self._idle.put(function)

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown(cancel_futures=True)
        for function in self._functions:
            function.close()


def as_message(reply: Any) -> Message | None:
    """The reply as a message. Raises NoAnswer if it is neither a text nor a message."""
    if reply is None:
        return None
    if isinstance(reply, str):
        reply = {"role": "user", "content": reply}
    if not isinstance(reply, dict) or not all(isinstance(reply.get(key), str) for key in ("role", "content")):
        raise NoAnswer("the reply is neither a text, nor a message with role and content, nor None")
    try:
        reply["content"].encode()
    except UnicodeEncodeError:
        raise NoAnswer("the reply has half a surrogate pair, which has no bytes") from None
    return reply
