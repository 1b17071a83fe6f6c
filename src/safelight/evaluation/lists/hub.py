"""Files of data sets on the Hugging Face Hub, fetched with the user's own access."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

PREFIX = "hub:"
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")


class Listing(Protocol):
    """What is said of a list that can't be had."""

    @property
    def access(self) -> str:
        """How to get it."""
        ...


def is_address(source: str) -> bool:
    """Whether a source is an address on the Hub rather than a path."""
    return source.startswith(PREFIX)


def fetch(source: str, listing: Listing) -> Path:
    """The local copy of `hub:owner/name/file` or `hub:owner/name/file@revision`; without a file, of the only table there.

    Raises:
        ValueError: without a network, access or such a file; the message says what to do.
    """
    from huggingface_hub import hf_hub_download

    address = re.fullmatch(rf"{PREFIX}([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([\w./-]+))?", source)
    if not address:
        raise ValueError(f"{source!r} is no address of a Hub data set; write hub:owner/name/file.csv, and @revision behind it if you like")
    repository, file, revision = address.groups()
    try:
        file = file or _only_table(repository, revision)
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except Exception as error:
        if message := _explained(error, repository, listing):
            raise ValueError(message) from error
        raise


def _only_table(repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(repository, repo_type="dataset", revision=revision)
    tables = [file for file in files if file.lower().endswith(TABLES)]
    if len(tables) != 1:
        raise ValueError(f"{repository} has the tables {', '.join(tables) or '(none)'}; name one: hub:{repository}/FILE")
    return tables[0]


def _explained(error: Exception, repository: str, listing: Listing) -> str | None:
    """What an error means for people; None if it isn't known."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated, and this account has no access. {listing.access} Then run `hf auth login`"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        return f"there is no data set {repository} of that revision on the Hub, or it is private; check its name, or run `hf auth login`"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{repository} has no such file; look at its list of files on the Hub"
    if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        return f"{repository} can't be reached ({type(error).__name__}); download the file where there is a network, and give its path"
    return None
