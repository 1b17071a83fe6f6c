"""What commands share: progress on stderr, results on stdout, errors in one line."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ..errors import UnjudgedImageWarning

MAX_PROMPT = 2000


def quiet() -> None:
    """Silences what other libraries print about packages that Safelight does without."""
    warnings.filterwarnings("ignore", module="torch|diffusers|transformers")
    warnings.filterwarnings("ignore", category=UnjudgedImageWarning)  # commands say it in their own words
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()


@contextmanager
def early_quiet() -> Iterator[None]:
    """Keeps import-time notices of other libraries off the terminal."""
    import logging
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield


def fail(message: str, code: int = 1) -> typer.Exit:
    """Prints a one-line error; raise what it returns."""
    typer.secho(f"error: {' '.join(message.split())}", fg="red", err=True)
    return typer.Exit(code)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Prints a result: one JSON object and nothing else, or text for people."""
    typer.echo(json.dumps(result) if as_json else text)


def checked_prompt(prompt: str) -> str:
    """A prompt that a pipeline can do something with.

    Raises:
        ValueError: if it is empty, or longer than any text encoder reads.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what the picture should show")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"the prompt has {len(prompt):,} characters; text encoders read a few hundred, so give at most {MAX_PROMPT:,}")
    return prompt


@contextmanager
def progress(quiet_mode: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr: call it with (what, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=quiet_mode or not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield advance


def read_image(path: Any, limit: int = 64_000_000) -> Any:
    """An image file as RGB.

    Raises:
        ValueError: if it is no image, or has more than `limit` pixels.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            opened = Image.open(path)
        except FileNotFoundError:
            raise ValueError(f"there is no file {path}; give the path of an image") from None
        except Image.DecompressionBombError:
            raise ValueError(
                f"{path} claims an absurd number of pixels; give an image of at most {limit // 1_000_000} megapixels"
            ) from None
        except OSError as error:
            raise ValueError(f"{path} can't be opened as an image ({type(error).__name__}); give a PNG, JPEG or WebP file") from None
    with opened as image:
        if image.width * image.height > limit:
            raise ValueError(
                f"{path} claims {image.width} x {image.height} pixels; give an image of at most {limit // 1_000_000} megapixels"
            )
        try:
            return image.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} is a damaged image ({error}); give another one") from None
