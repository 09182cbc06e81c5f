"""`glasstune chat`: questions in, streamed answers out, with and without the adapter."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from glasstune.core.choices import Choices
from glasstune.core.errors import InputError
from glasstune.core.files import dump_json, write_text_atomic
from glasstune.core.protocols import Progress
from glasstune.workflows.generate import encode
from glasstune.workflows.open_model import OpenModel, open_model, say_warnings

TUNED, BASE = "tuned", "base"

HELP = """\
/adapter on|off   answer with or without the adapter
/system TEXT      set the system prompt; without TEXT: remove it
/reset            forget the conversation, keep the system prompt
/save FILE        write the conversation as a JSON line
/help             this list
/quit             leave (also Ctrl-D)
A line that ends with \\ goes on in the next one; \"\"\" opens and closes a block of lines.
Ctrl-C stops an answer."""

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?$", re.DOTALL)


class View(Protocol):
    """Where a chat shows itself."""

    def say(self, text: str) -> None:
        """Shows a word of the program."""

    def begin(self, sides: list[str]) -> None:
        """Opens the answers of one turn; more than one side stand beside each other."""

    def piece(self, side: str, text: str) -> None:
        """Adds text to a side's answer."""

    def end(self) -> None:
        """Closes the answers."""


Read = Callable[[], str | None]
"""Gives the next thing that the user enters; None at the end of the input."""


@dataclass
class ChatSession:
    """A chat with an open model.

    Args:
        opened: The model.
        view: Where it shows itself.
        compare: Whether base and tuned model both answer, each in its own conversation.
        options: Of `stream_answer`: limits and sampling.
    """

    opened: OpenModel
    view: View
    compare: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    adapter_on: bool = True
    answered: int = 0

    def __post_init__(self) -> None:
        from glasstune.generation import stop_ids
        from glasstune.generation.chat import Conversation, trains_biases

        opened = self.opened
        self.has_adapter = hasattr(opened.model, "disable_adapter")
        if self.compare and not self.has_adapter:
            raise InputError(
                "nothing_to_compare",
                "there is no adapter, so there are no two models to compare",
                where="--compare",
                fix="name a run or an adapter, without --no-adapter",
            )
        if self.compare and trains_biases(opened.model):
            raise InputError(
                "adapter_biases",
                "this adapter trains biases of the base, so it cannot be switched off in memory",
                where="--compare",
                fix="chat without --compare, and with --no-adapter for the base",
            )
        self.stops = sorted({*stop_ids(opened.tokenizer, opened.model), *opened.template.stop_ids})
        template = opened.template.kind != "none"
        sides = [TUNED, BASE] if self.compare else [TUNED if self.has_adapter else BASE]
        self.sides = {
            side: Conversation(
                lambda messages: encode(opened, messages, None, ""),
                opened.facts.max_positions,
                int(self.options.get("max_new_tokens", 512)),
                keeps_history=template,
            )
            for side in sides
        }
        if not template:
            self.view.say("the model has no chat template: each text is continued by itself")

    def set_system(self, text: str | None) -> None:
        """Sets or removes the system prompt.

        Raises:
            InputError: The template has no place for one.
        """
        if text is not None:
            encode(
                self.opened,
                [{"role": "system", "content": text}, {"role": "user", "content": "a"}],
                None,
                "system prompt",
            )
        for conversation in self.sides.values():
            conversation.system = text

    def ask(self, text: str) -> None:
        """Answers one question on every side.

        Raises:
            InputError: The template refuses it, or it is too long.
        """
        prompts = {}
        for side, conversation in self.sides.items():
            prompts[side], dropped = conversation.prompt(text)
            if dropped:
                turns = "turn was" if dropped == 1 else f"{dropped} turns were"
                self.view.say(
                    f"the conversation no longer fits into {conversation.max_positions:,} tokens: "
                    f"its oldest {turns} dropped"
                )
        self.view.begin(list(self.sides))
        endings: list[str] = []
        try:
            with interrupts() as stopped:
                for side, ids in prompts.items():
                    if not stopped():
                        endings += self._answer(side, text, ids, stopped)
        finally:
            self.view.end()
        for ending in dict.fromkeys(endings):
            self.view.say(ending)
        self.answered += 1

    def _answer(
        self, side: str, text: str, ids: list[int], stopped: Callable[[], bool]
    ) -> list[str]:
        from glasstune.generation.chat import adapter_off, stream_answer

        opened = self.opened
        off = self.has_adapter and (side == BASE or not self.adapter_on)
        options = dict(self.options)
        options["seed"] = int(options.get("seed", 0)) * 1_000_003 + self.answered
        with adapter_off(opened.model, off):
            answer = stream_answer(
                opened.model, opened.tokenizer, ids, stops=self.stops, stopped=stopped,
                write=lambda piece: self.view.piece(side, piece), precision=opened.precision,
                max_positions=opened.facts.max_positions, **options,
            )  # fmt: skip
        if answer.text:
            self.sides[side].add(text, answer.text)
        who = f"{side}: " if self.compare else ""
        if answer.ended == "stopped":
            return ["(stopped)"]
        if answer.ended == "length":
            return [f"({who}cut at {answer.tokens:,} tokens; --max-new-tokens allows more)"]
        return [] if answer.text else [f"({who}an empty answer)"]

    def command(self, name: str, rest: str) -> bool:
        """Runs a command; returns whether the chat goes on.

        Raises:
            InputError: It does not exist, or cannot do that.
        """
        if name in ("quit", "exit"):
            return False
        commands: dict[str, Callable[[str], str]] = {
            "help": lambda rest: HELP,
            "adapter": self._adapter,
            "system": self._system,
            "reset": self._reset,
            "save": self._save,
        }
        if name not in commands:
            raise InputError(
                "unknown_command",
                f"there is no command /{name}",
                fix="/help lists them; put a space before it to send it as text",
            )
        self.view.say(commands[name](rest.strip()))
        return True

    def _adapter(self, rest: str) -> str:
        from glasstune.generation.chat import trains_biases

        if rest not in ("on", "off"):
            state = "on" if self.adapter_on and self.has_adapter else "off"
            return f"the adapter is {state}; /adapter on or /adapter off"
        if not self.has_adapter:
            raise InputError("no_adapter", "there is no adapter here", fix="name a run, an adapter")
        if self.compare:
            raise InputError("both_answer", "with --compare both answer each question")
        if rest == "off" and trains_biases(self.opened.model):
            raise InputError(
                "adapter_biases",
                "this adapter trains biases of the base, so it cannot be switched off in memory",
                fix="open the base alone with --no-adapter",
            )
        self.adapter_on = rest == "on"
        return f"adapter {rest}; the conversation goes on (/reset starts a new one)"

    def _system(self, rest: str) -> str:
        self.set_system(rest or None)
        return "system prompt set" if rest else "system prompt removed"

    def _reset(self, rest: str) -> str:
        for conversation in self.sides.values():
            conversation.turns.clear()
        return "new conversation"

    def _save(self, rest: str) -> str:
        if not rest:
            raise InputError("no_file", "/save needs a file's name", fix="/save talk.jsonl")
        path = Path(rest).expanduser()
        if path.exists():
            raise InputError("file_exists", "it exists already", where=rest, fix="use a new name")
        if not path.parent.is_dir():
            raise InputError("no_folder", "its folder does not exist", where=rest, fix="make it")
        rows = [
            {"messages": messages} | ({"side": side} if self.compare else {})
            for side, messages in self.conversations().items()
        ]
        if not any(conversation.turns for conversation in self.sides.values()):
            raise InputError("nothing_to_save", "nothing has been said yet")
        try:
            write_text_atomic(path, "".join(dump_json(row) + "\n" for row in rows))
        except OSError as error:
            raise InputError(
                "not_writable", f"it cannot be written: {error.strerror}", where=rest, fix=""
            ) from error
        return f"saved in {path}"

    def conversations(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the messages of each side."""
        return {side: conversation.messages() for side, conversation in self.sides.items()}


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside asks for an end; a second one, before that came, interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def chat(
    run_or_model: str,
    read: Read,
    view: View,
    *,
    compare: bool = False,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    checkpoint: str | None = None,
    no_adapter: bool = False,
    bits: int | None = None,
    interactive: bool = True,
    progress: Progress | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Chats until the input ends.

    Args:
        run_or_model: Run folder, adapter folder, model folder, GGUF file or hub id.
        read: Gives what the user enters.
        view: Where the chat shows itself.
        compare: Base and tuned model answer side by side.
        system: System prompt.
        max_new_tokens: Longest answer in tokens.
        temperature: 0 takes the most likely token; else the softness of the draw.
        top_p: Draws among the most likely tokens that reach this probability together.
        seed: Of the draws.
        checkpoint: `best`, `last` or `step-N` of a run.
        no_adapter: The base alone.
        bits: Precision of the base; None = the run's, or 16.
        interactive: Whether a person types: then a mistake is said and the chat goes on, else
            it ends the program.
        progress: Log of the load.
        **overrides: `dtype`, `device`, `trust_remote_code`.

    Returns:
        `{"turns", "conversations"}`: questions answered, and the messages of each side.

    Raises:
        InputError: Model or options are wrong; without `interactive` also any input.
    """
    opened = open_model(
        run_or_model, checkpoint=checkpoint, no_adapter=no_adapter, packs=False, choices=Choices(),
        bits=bits, **overrides,
    )  # fmt: skip
    say_warnings(opened, progress)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    session = ChatSession(opened, view, compare, options | {"seed": seed})
    if system is not None:
        session.set_system(system)
    while True:
        try:
            text = read()
            if text is None:
                break
            if not text.strip():
                continue
            match = _COMMAND.match(text.rstrip())
            if match is None:
                session.ask(text)
            elif not session.command(match.group(1), match.group(2) or ""):
                break
        except InputError as error:
            if not interactive:
                raise
            view.say(f"error: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            view.say("(/quit or Ctrl-D leaves)")
    return {"turns": session.answered, "conversations": session.conversations()}
