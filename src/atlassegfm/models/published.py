"""Weights as their authors publish them on Hugging Face."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from ..core.errors import InputError

#: Environment variable that names a mirror of Hugging Face, as its own programs read it.
ENDPOINT_VARIABLE = "HF_ENDPOINT"
_ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True)
class WeightsFile:
    """One published file: its path below the model's folder, with its size in bytes and SHA-256 where known."""

    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class PublishedWeights:
    """Published weights of one model.

    ``repository`` is "owner/name" on Hugging Face, ``revision`` the commit that is downloaded, ``licence`` an SPDX
    expression or words. If ``non_commercial``, the licence must be accepted before they are used.
    """

    repository: str
    revision: str
    files: tuple[WeightsFile, ...]
    licence: str
    licence_url: str
    non_commercial: bool

    @property
    def page(self) -> str:
        """Address of the page that lists the files."""
        return f"{_endpoint()}/{self.repository}/tree/{quote(self.revision, safe='')}"

    def url_of(self, file: WeightsFile) -> str:
        """Address of a file; InputError if ``HF_ENDPOINT`` is no address."""
        return f"{_endpoint()}/{self.repository}/resolve/{quote(self.revision, safe='')}/{quote(file.path)}"


def _endpoint() -> str:
    endpoint = os.environ.get(ENDPOINT_VARIABLE) or _ENDPOINT
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"{ENDPOINT_VARIABLE} is {endpoint!r}; expected the address of a mirror, as {_ENDPOINT}")
    return endpoint.rstrip("/")
