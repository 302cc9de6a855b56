"""Bodies of type multipart/form-data, as the clients of MONAI Label write and read them."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.formparsers import MultiPartException, MultiPartParser

#: Parts of a body at most: a DICOM series has one for each slice.
_MOST_PARTS = 5000


@dataclass(frozen=True)
class File:
    """A file of a form; its name is that of the sender's disk, whole, and never used as a path here."""

    name: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Form:
    """Fields and files of a form by name; a name may have several files."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[File]] = field(default_factory=dict)

    @property
    def params(self) -> dict[str, Any]:
        """The field ``params``; ValueError if it is no JSON object."""
        try:
            found = json.loads(self.fields.get("params") or "{}")
        except ValueError:
            raise ValueError("the field 'params' is not JSON") from None
        if not isinstance(found, dict):
            raise ValueError("the field 'params' is no JSON object")
        return found


async def read_form(request: Request) -> Form:
    """Read the body of a request; ValueError if it is none of this type, malformed, or of too many parts."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ValueError("expected a body of type multipart/form-data")
    parser = MultiPartParser(request.headers, request.stream(), max_files=_MOST_PARTS, max_fields=_MOST_PARTS)
    try:
        sent = await parser.parse()
    except MultiPartException as error:
        raise ValueError(f"the body cannot be read: {error.message}") from None
    form = Form()
    for name, value in sent.multi_items():
        if isinstance(value, str):
            form.fields[name] = value
        else:
            form.files.setdefault(name, []).append(File(value.filename or "", await value.read()))
    await sent.close()
    return form


def write_form(params: dict[str, Any], name: str, file: File) -> tuple[bytes, str]:
    """Make a body of the field ``params`` and a file, and its type."""
    boundary = secrets.token_hex(16)
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\nContent-Type: application/json\r\n\r\n'
    middle = (
        f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{file.name}"\r\n'
        f"Content-Type: application/octet-stream\r\nContent-Length: {len(file.content)}\r\n\r\n"
    )
    body = b"".join(
        (head.encode(), json.dumps(params).encode(), middle.encode(), file.content, f"\r\n--{boundary}--\r\n".encode())
    )
    return body, f"multipart/form-data; boundary={boundary}"
