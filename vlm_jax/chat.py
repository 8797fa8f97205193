"""A conversation in a terminal: `python -m vlm_jax.chat --checkpoint=runs/vlm_shapes_stage2 --image=a.png`.

Each line is a question; the answer appears as it is written. What the model reads and how is `answering`'s business.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vlm_jax import platforms
from vlm_jax.main import EXIT_CONFIG, split_overrides

_HELP = "/image PATH shows an image with the next question, /reset begins anew, /quit ends"


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """(flags, overrides); `--config.a.b=value` becomes {"a.b": "value"}."""
    overrides, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m vlm_jax.chat",
        description="Answers questions about images, with the template, tiles and tokenizer of the checkpoint.",
        epilog=f"Each line of standard input is a question: {_HELP}. Keys of the checkpoint's config: "
        "--config.KEY=VALUE. Exit codes: 0 done, 2 what was asked can't be answered, 1 any other error.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="workdir, step directory or imported checkpoint")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="shown first; several are allowed")
    parser.add_argument("--prompt", help="one question; its answer is printed, and nothing is read from the terminal")
    parser.add_argument("--json", action="store_true", help="with --prompt: a line of JSON in place of the text")
    parser.add_argument("--system", default="", help="system message, in the place of the template's")
    parser.add_argument("--template", default="", help="template of a model that has none, such as a language model")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens of an answer at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0: the likeliest tokens (default)")
    parser.add_argument("--top_k", type=int, default=0, help="sample among so many of the likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample among those whose chances add up to this")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    return parser.parse_args(rest), overrides


class Chat:
    """The conversation so far, and what becomes of a line.

    Args:
        answerer: the model (`vlm_jax.answering.Answerer`).
        config: how answers are written (`vlm_jax.models.generation.GenerationConfig`).
        seed: of sampling; None takes the likeliest tokens.
        system: system message; empty: that of the template.
    """

    def __init__(self, answerer: Any, config: Any, seed: int | None, system: str):
        self._answerer, self._config, self._seed, self._system = answerer, config, seed, system
        self._images: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forgets all that was said and shown."""
        self._conversation = self._answerer.begun(self._system)
        self._images.clear()

    def show(self, path: str) -> None:
        """An image that goes with the next question; raises `AnswerError`."""
        from vlm_jax.answering import read_image

        self._images.append(read_image(os.path.expanduser(path)))

    def ask(self, text: str) -> Iterator[str]:
        """The answer in pieces. Of a question that can't be answered, or is answered by nothing, nothing is kept.

        Raises:
            AnswerError: why it can't.
        """
        images, self._images = self._images, []
        asked = self._answerer.asked(self._conversation, text, images)
        pieces: list[str] = []
        for piece in self._answerer.stream(asked, self._config, self._seed):
            pieces.append(piece)
            yield piece
        if pieces:
            self._conversation = asked.answered("".join(pieces))
            self._seed = None if self._seed is None else self._seed + 1


def converse(chat: Chat, lines: Iterable[str]) -> None:
    """Answers line after line on standard output; what can't be is told on standard error."""
    from vlm_jax.answering import AnswerError

    for line in lines:
        text = line.strip()
        command, _, rest = text.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                chat.reset()
            elif command == "/image":
                chat.show(rest.strip())
            elif command.startswith("/"):
                print(f"there is no command {command}: {_HELP}", file=sys.stderr)
            elif text:
                for piece in chat.ask(text):
                    print(piece, end="", flush=True)
                print(flush=True)
        except AnswerError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print(flush=True)


def _typed_lines() -> Iterator[str]:
    """Lines of standard input; a terminal is shown where to write."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    print(_HELP, file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return


def run(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Loads and answers; returns the exit code."""
    from vlm_jax.answering import Answerer, AnswerError
    from vlm_jax.models.generation import GenerationConfig

    if flags.json and flags.prompt is None:
        raise AnswerError("--json needs --prompt: it prints one answer; give a question")
    sampled = flags.temperature != 0
    if not sampled and (flags.top_k or flags.top_p != 1):
        raise AnswerError("--top_k and --top_p have no effect without sampling; give --temperature, such as 0.7")
    config = GenerationConfig(
        flags.max_new_tokens,
        temperature=flags.temperature if sampled else 1.0,
        top_k=flags.top_k,
        top_p=flags.top_p,
    )
    for key, sentence in config.problems():
        raise AnswerError(f"--{key} {sentence}")
    answerer = Answerer(flags.checkpoint, flags.template, overrides)
    chat = Chat(answerer, config, flags.seed if sampled else None, flags.system)
    for path in flags.image:
        chat.show(path)
    if flags.prompt is None:
        converse(chat, _typed_lines())
    elif flags.json:
        answer = "".join(chat.ask(flags.prompt))
        print(json.dumps({"prompt": flags.prompt, "images": flags.image, "answer": answer}, ensure_ascii=False))
    else:
        for piece in chat.ask(flags.prompt):
            print(piece, end="", flush=True)
        print()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; errors that a user can mend are one sentence, without a traceback."""
    flags, overrides = parse(list(sys.argv[1:] if arguments is None else arguments))
    platforms.pass_over_missing_tpu()
    from vlm_jax.answering import AnswerError
    from vlm_jax.checkpoint_format import CheckpointError
    from vlm_jax.schema import ConfigError

    for stream in (sys.stdin, sys.stdout, sys.stderr):  # what is no character on either side becomes another, no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return run(flags, overrides)
    except (AnswerError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
