"""The command line: six verbs. Tuning lives in the recipe; flags only steer the run."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from compress.errors import CompressError
from compress.terminal import lenient

LONGEST, LONGEST_NUMBER = 2000, 12  # characters of a message, and of a number


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"compress: {shown(message)}   (see {self.prog} --help)\n")


def file_name(text: str) -> Path:
    """A path given as an argument. What it names is written into reports and recipes, which are UTF-8."""
    try:
        text.encode("utf-8")
        os.fsencode(text)
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!a} is no name in UTF-8; rename the file") from None
    return Path(text)


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on, for argparse."""

    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > LONGEST_NUMBER or int(text) < least:
            raise argparse.ArgumentTypeError(f"needs a whole number from {least} on, not '{text}'")
        return int(text)

    return number


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="compress", description="Turn a trained model into the best checkpoint that fits.")
    top.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in (
        ("plan", "say what a recipe will do and cost, or what each width of a model would; changes nothing"),
        ("run", "run a recipe; resumes"),
    ):
        p = verbs.add_parser(name, help=text, description=text)
        p.add_argument("recipe", type=file_name, metavar="RECIPE|MODEL" if name == "plan" else None)
        p.add_argument("--out", type=file_name, help="the run folder, instead of the recipe's")
        p.add_argument(
            "--set", action="append", default=[], metavar="NAME.OPTION=VALUE", help="override an option", dest="overrides"
        )
        p.add_argument("--device", default="cpu", help="where the block in hand lies: cpu, cuda:0, ...")
        if name == "plan":
            p.add_argument("--no-measure", action="store_true", help="do not measure damage for an allocation; guess instead")
        else:
            p.add_argument("--until", metavar="STEP", help="stop after this step (its number or pass)")
    text = "measure a run, an artifact, or any model folder"
    p = verbs.add_parser("eval", help=text, description=text)
    p.add_argument("what", type=file_name, metavar="RUN|ARTIFACT|MODEL")
    p.add_argument("--text", type=file_name, help="a text file to measure on; default: the run's evaluation text")
    p.add_argument("--sequences", type=at_least(1), default=32, help="windows of --text; default: 32")
    p.add_argument("--length", type=at_least(2), default=512, help="tokens in a window of --text; default: 512")
    p.add_argument("--against", type=file_name, metavar="MODEL", help="the original, for KL and agreement; default: the run's")
    p.add_argument("--device", default="cpu")
    p.add_argument("--json", action="store_true", help="for machines")
    p.add_argument("--tasks", help="hand over to lm-eval: a comma-separated list of its tasks")
    text = "time a run's artifact against its original: tokens per second, bytes per token; or, with --table, single matrices"
    p = verbs.add_parser("bench", help=text, description=text)
    p.add_argument("what", type=file_name, metavar="RUN|ARTIFACT|MODEL|RECIPE")
    p.add_argument("--against", type=file_name, metavar="MODEL", help="the original; default: the run's")
    p.add_argument("--prompt", type=at_least(1), default=128, help="tokens of the prompt; default: 128")
    p.add_argument("--new", type=at_least(1), default=32, help="tokens to decode; default: 32")
    p.add_argument("--repeats", type=at_least(1), default=5, help="turns of each; default: 5")
    p.add_argument(
        "--table", type=file_name, metavar="FILE", help="of a recipe: time each shape and format that its allocate could choose"
        " on this CPU, and write that to a file, which allocate takes as 'latency' to limit the time of a token"
    )  # fmt: skip
    p.add_argument("--batch", type=at_least(1), help="with --table: tokens of a decode step; default: 1")
    p.add_argument("--device", default="cpu")
    p.add_argument("--json", action="store_true", help="for machines")
    text = "show what is inside a run, an artifact, or a model"
    p = verbs.add_parser("inspect", help=text, description=text)
    p.add_argument("what", type=file_name, metavar="RUN|ARTIFACT|MODEL")
    p.add_argument("site", nargs="?", help="one site, or a pattern")
    p.add_argument("--errors", action="store_true", help="of a run: the error table that an allocation was made from")
    p.add_argument("--json", action="store_true", help="for machines")
    text = "list the passes, or the options of one"
    p = verbs.add_parser("passes", help=text, description=text)
    p.add_argument("name", nargs="?")
    p.add_argument("--schema", action="store_true", help="print the JSON schema of a recipe")
    for p in verbs.choices.values():  # `compress run -v` is what people type
        p.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 2 on a mistake of the user or the machine's disk, 130 when interrupted."""
    with lenient() as out:
        code = answer(parser().parse_args(argv))
        out.flush()
    if out.failure is not None and code == 0:
        return complain(f"standard output: {out.failure.strerror}", False)
    return code


def answer(options: argparse.Namespace) -> int:
    """Run one command, its mistakes told in one line."""
    try:
        from compress import commands  # seconds: torch and transformers

        verb: Any = getattr(commands, f"{options.verb}_command")
        verb(options)
    except CompressError as e:
        return complain(str(e), options.verbose)
    except KeyboardInterrupt:
        on = "; the same command goes on from the last finished block" if options.verb == "run" else ""
        print(f"\ncompress: interrupted{on}", file=sys.stderr)
        return 130
    except OSError as e:  # a file that cannot be read or written, or that went away meanwhile
        return complain(f"{e.filename}: {e.strerror}" if e.filename else str(e), options.verbose)
    return 0


def complain(message: str, verbose: bool) -> int:
    """One line on stderr, whatever the message quotes; the traceback before it where the user asked."""
    if verbose:
        traceback.print_exc()
    print("compress: " + shown(message), file=sys.stderr)
    return 2


def shown(message: str) -> str:
    """A message as one line of a terminal: what would move the cursor is a space, and what is quoted does not fill screens."""
    text = "".join(c if c.isprintable() else " " for c in message)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


if __name__ == "__main__":
    sys.exit(main())
