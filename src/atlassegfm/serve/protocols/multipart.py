"""Bodies of type multipart/form-data, as the clients of MONAI Label write and read them."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from email.message import Message
from email.parser import HeaderParser
from typing import Any

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


def read_form(body: bytes, content_type: str) -> Form:
    """Take a body apart; ValueError if it is none of this type, or cut off."""
    kind = Message()
    kind["content-type"] = content_type
    boundary = kind.get_boundary()
    if kind.get_content_type() != "multipart/form-data" or not boundary:
        raise ValueError("expected a body of type multipart/form-data")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("utf-8", "surrogateescape"))
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise ValueError("the body ends early")
    if len(pieces) > _MOST_PARTS:
        raise ValueError(f"the body has more than {_MOST_PARTS} parts")
    form = Form()
    for piece in pieces[1:-1]:
        head, blank, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        header = HeaderParser().parsestr(head.decode("utf-8", "replace"))
        name = header.get_param("name", header="content-disposition")
        if not blank or not isinstance(name, str):
            raise ValueError("a part of the body has no name")
        filename = header.get_filename()
        if filename is None:
            form.fields[name] = content.decode("utf-8", "replace")
        else:
            form.files.setdefault(name, []).append(File(filename, content))
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
