"""Reading checkpoints of PyTorch without running what may be in them."""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from ..errors import ModelError

#: PyTorch has written zip archives since 1.6, and a pickle of protocol 2 before that.
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80\x02"
#: The old format is a magic number, a version, a description of the machine and the content, each a pickle; then the
#: tensors (torch.serialization._legacy_save).
_OLD_PICKLES = 4
#: What saved downloads turn out to be that are no weights, by how they begin.
_STRANGERS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file it stands for"),
    (b"<", "is a web page, or other text in angle brackets"),
)


def load_state(path: Path, *, wanted: str) -> Any:
    """What is in a checkpoint, on the CPU; tensors and plain values only.

    Parameters
    ----------
    path : Path
        The file.
    wanted : str
        What it should be, for messages ("the weights of the model 'medsam2'").

    Raises
    ------
    ModelError
        If it is missing or unreadable, not of PyTorch, damaged, or could only be loaded by running what is in it.
    """
    import torch

    try:
        with path.open("rb") as file:
            head = file.read(32)
        if not head:
            raise ModelError(f"{path}: is empty; expected {wanted}: fetch or copy it again")
        if not head.startswith((_ZIP, _PICKLE)):
            found = next((words for start, words in _STRANGERS if head.startswith(start)), "is no file of PyTorch")
            raise ModelError(f"{path}: {found}; expected {wanted}")
        if head.startswith(_ZIP) and not zipfile.is_zipfile(path):
            raise _damaged(path, wanted)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if head.startswith(_PICKLE) and not _are_whole(path):
            raise _damaged(path, wanted) from None
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"other objects ({name[1]})" if name else "other objects"
        raise ModelError(
            f"{path}: holds {what} besides tensors and plain values, and loading these could run any program; "
            f"expected {wanted}"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}); expected {wanted}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        raise _damaged(path, wanted) from None


def _are_whole(path: Path) -> bool:
    """Whether the pickles of the old format are all there; nothing in them is run."""
    try:
        with path.open("rb") as file:
            for _ in range(_OLD_PICKLES):
                for _ in pickletools.genops(file):
                    pass
    except ValueError:
        return False
    return True


def _damaged(path: Path, wanted: str) -> ModelError:
    return ModelError(f"{path}: is cut short or damaged; expected {wanted}: fetch or copy it again")
