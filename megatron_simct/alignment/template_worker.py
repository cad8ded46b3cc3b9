"""Renders chat templates in a process of its own, which `templates.py` starts.

It imports jinja2 and no other package of this repository or of its environment. It reads one request a line
from stdin and answers each with one line, both JSON. A template is an untrusted program: the system limits
its CPU time and memory, and ends the process if jinja2's sandbox does not help, as in `7 ** (10 ** 9)`. The
process ends itself when it is idle.
"""

from __future__ import annotations

import importlib.util
import sys

if __name__ == "__main__":
    # An isolated interpreter may not find the packages that the process which starts it has.
    for _file in sys.argv[2:]:
        _spec = importlib.util.spec_from_file_location(_file.split("/")[-2], _file)
        assert _spec is not None and _spec.loader is not None, _file
        sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_spec.name])

import functools
import json
import resource
import select
import signal
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2.utils import Namespace

LIMIT = "limit"
"""The key of an answer about a template that goes beyond what it may use."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks an answer for a trainer's loss mask; the text stays."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: what the body sets stays inside.
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body, lineno=line)

    def _same(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class _NamedValues(Namespace):
    """namespace(...), without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805  # a value may be called self
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """dict(...) and dict.fromkeys(...), without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(
            f"a namespace cannot hold {name!r}: the name begins with an underscore"
        )


def environment(date: str) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that transformers gives to a template, with the clock fixed at the start of
    `date`, YYYY-MM-DD.
    """
    day = datetime.fromisoformat(date)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: day.strftime(format),
        "dict": _Dict(),
        "namespace": _NamedValues,
    }
    return sandbox


@functools.lru_cache(maxsize=8)
def _compiled(source: str, date: str) -> jinja2.Template:
    return environment(date).from_string(source)


def _render(source: str, date: str, variables: dict[str, Any], max_characters: int) -> dict[str, Any]:
    pieces, size = [], 0
    for piece in _compiled(source, date).generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > max_characters:
            return {LIMIT: f"writes more than {max_characters:,} characters"}
    return {"text": "".join(pieces)}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The text of a template, or what it reads if `variables` is null; `refused` with the
    reason if it fails.
    """
    source, date, variables = request["source"], request["date"], request["variables"]
    try:
        if variables is not None:
            return _render(source, date, variables, request["max_characters"])
        _compiled(source, date)
        tree = environment(date).parse(source)
        texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
        texts += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        return {"reads": sorted(jinja2.meta.find_undeclared_variables(tree)), "texts": texts}
    except jinja2.TemplateSyntaxError as error:
        return {"refused": f"line {error.lineno} of it: {error.message}"}
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything
        return {"refused": " ".join(str(error).split()) or type(error).__name__}


def _limit_memory(mib: int) -> None:
    """Limit the address space of this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = mib << 20
    resource.setrlimit(
        resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard)
    )


def main(max_idle_s: float) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while select.select([sys.stdin], [], [], max_idle_s)[0] and (line := sys.stdin.readline()):
        request = json.loads(line)
        _limit_memory(request["max_memory_mib"])
        signal.setitimer(signal.ITIMER_PROF, request["max_cpu_s"])
        try:
            reply = json.dumps(answer(request))
        except MemoryError:
            reply = json.dumps({LIMIT: f"takes more than {request['max_memory_mib']:,} MiB of memory"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
