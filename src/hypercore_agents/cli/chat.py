"""`chat`: one prompt, or a conversation with history; streams answers, shows tool calls, asks for approvals.

Ctrl-C interrupts the turn, not the program: the signal handler sends an interrupt request to the manager, and the
stream ends with the result of the turn. A second Ctrl-C during the same turn ends the program. At the prompt, Ctrl-C
clears the line and Ctrl-D ends the conversation.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.fleet import json_object
from hypercore_agents.cli.remote import (
    INTERRUPTED,
    AsJson,
    Url,
    User,
    default_user,
    explained,
    manager,
    printable,
    show_json,
)

if TYPE_CHECKING:
    from hypercore_agents.api.chat import ChatResponse
    from hypercore_agents.client import Client, Event, Stream

_SHOWN = 200
_HELP = "/new starts a new session, /session shows its id, /exit or Ctrl-D ends; Ctrl-C interrupts a turn"


def chat(
    prompt: Annotated[str | None, typer.Argument(help="Without it, a conversation; - reads standard input.")] = None,
    user: User = None,
    session: Annotated[str | None, typer.Option(metavar="ID", help="Continue this session.")] = None,
    agent: Annotated[str | None, typer.Option(metavar="ID", help="Use this agent; default: the pool.")] = None,
    model: Annotated[str | None, typer.Option(help="Claude model, for a new session.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="For a new session.")] = None,
    options: Annotated[
        str | None, typer.Option(metavar="JSON", help="More fields of the chat body, as a JSON object.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Send one prompt to an agent, or start a conversation."""
    given = {"model": model, "system_prompt": system_prompt}
    body = {**json_object(options, "--options"), **{k: v for k, v in given.items() if v is not None}}
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise CommandError(
            'the prompt is empty: pass it as an argument or on standard input, or run "chat" alone for a conversation'
        )
    with manager(url) as client:
        conversation = Conversation(client, user or default_user(), session, agent, body)
        if prompt is None:
            if as_json:
                raise CommandError("--json needs a PROMPT")
            conversation.converse()
        elif as_json:
            show_json(conversation.ask_quietly(prompt))
        else:
            result = conversation.ask(prompt)
            _note(f"session {result.session_id}: continue with --session {result.session_id}")
            if result.status == "interrupted":
                raise SystemExit(INTERRUPTED)


class Conversation:
    """Turns of one session on a terminal."""

    def __init__(
        self, client: "Client", user_id: str, session_id: str | None, agent_id: str | None, options: dict[str, Any]
    ) -> None:
        self._client = client
        self._user_id = user_id
        self._session_id = session_id
        self._agent_id = agent_id
        self._options = options
        self._has_run_turn = False

    def ask_quietly(self, prompt: str) -> "ChatResponse":
        """Run one turn and return its result without any output."""
        options: Any = self._options
        return self._client.chat(
            prompt, user_id=self._user_id, session_id=self._session_id, agent_id=self._agent_id, **options
        )

    def ask(self, prompt: str) -> "ChatResponse":
        """Run one turn; print the text of the answer to standard output and everything else to standard error."""
        # Session options are sent with the first turn only.
        options: Any = self._options if self._session_id is None or not self._has_run_turn else {}
        stream = self._client.stream(
            prompt, user_id=self._user_id, session_id=self._session_id, agent_id=self._agent_id, **options
        )
        with stream, self._interrupting(stream):
            for event in stream:
                self._show(event, stream)
            result = stream.result
        self._session_id, self._has_run_turn = result.session_id, True
        sys.stdout.write("\n")
        sys.stdout.flush()
        for notice in result.notices if result.turn == 1 else ():
            _note(notice)
        ended = "" if result.status == "completed" else f"{result.status} · "
        usage = result.usage
        _note(f"{ended}{usage.total_tokens} tokens · ${usage.cost_usd:.6f} · {result.duration_ms / 1000:.1f} s")
        return result

    def converse(self) -> None:
        """Read prompts until the end of input. A failed turn does not end the conversation."""
        from hypercore_agents.client import ClientError, ServerError

        _note(_HELP)
        with _history():
            while True:
                try:
                    prompt = input("\n> ").strip()
                except KeyboardInterrupt:
                    continue
                except EOFError:
                    sys.stdout.write("\n")
                    return
                if prompt in ("/exit", "/quit"):
                    return
                if prompt == "/new":
                    self._session_id, self._has_run_turn = None, False
                elif prompt == "/session":
                    _note(self._session_id or "no session yet")
                elif prompt == "/help":
                    _note(_HELP)
                elif prompt:
                    try:
                        self.ask(prompt)
                    except ServerError as error:
                        _note(explained(error))
                    except ClientError as error:
                        _note(str(error))

    def _show(self, event: "Event", stream: "Stream") -> None:
        data: Any = event.data
        if event.text:
            # Control characters are removed for a terminal only.
            sys.stdout.write(printable(event.text) if sys.stdout.isatty() else event.text)
            sys.stdout.flush()
        elif event.name == "tool_use":
            _note(f"\n⚙ {data.name} {_short(json.dumps(data.input, ensure_ascii=False))}")
        elif event.name == "tool_result":
            _note(f"{'✗' if data.is_error else '✓'} {_short(data.content)}")
        elif event.name == "reset":
            _note("\n(the stream of the model was interrupted; this part of the answer starts again)")
        elif event.name == "notice":
            _note(f"\n({data.text})")
        elif event.name == "approval_request":
            self._decide(data, stream)

    def _decide(self, request: Any, stream: "Stream") -> None:
        from hypercore_agents.client import ServerError

        _note(f"\n? {request.name} {_short(json.dumps(request.input, ensure_ascii=False))}")
        if not sys.stdin.isatty():
            _note("  the call waits for a decision, but standard input is not a terminal; it will expire")
            return
        try:
            allow = input("  allow this call? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            allow = False
            _note("no")
        try:
            self._client.resolve_approval(stream.session_id or "", request.approval_id, allow=allow)
        except ServerError as error:  # it has expired, or the turn was interrupted: the stream reports the outcome
            _note(explained(error))

    @contextlib.contextmanager
    def _interrupting(self, stream: "Stream") -> Iterator[None]:
        requested = threading.Event()

        def interrupt(*_: object) -> None:
            if requested.is_set() or stream.session_id is None:
                raise KeyboardInterrupt
            requested.set()
            _note("\ninterrupting …")
            threading.Thread(target=self._interrupt, args=(stream.session_id,), daemon=True).start()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, session_id: str) -> None:
        from hypercore_agents.client import ClientError

        try:
            self._client.interrupt(session_id)
        except ClientError as error:
            _note(f"not interrupted: {error}")


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Store the prompt history between conversations, readable by this user only."""
    try:
        import readline
    except ImportError:  # optional: without it, line editing is not available
        yield
        return
    try:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "hypercore-agents"
    except RuntimeError:  # without a home directory there is no history
        yield
        return
    history = folder / "chat-history"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        history.touch(mode=0o600)
        readline.read_history_file(history)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(history)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} …"


def _note(text: str) -> None:
    styled = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    dim, plain = ("\033[2m", "\033[0m") if styled else ("", "")
    sys.stderr.write(f"{dim}{printable(text)}{plain}\n")
    sys.stderr.flush()
