"""Checkpoints of PyTorch: read without running what may be in them, and compared with the network they are for."""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

#: PyTorch has written zip archives since 1.6, and a pickle of protocol 2 before that.
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80\x02"
#: Pickles of the old format before its tensors: a magic number, a version, a description of the machine, the content.
_OLD_PICKLES = 4
#: First bytes of saved downloads that are not weights, and what they are.
_NOT_WEIGHTS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file it stands for"),
    (b"<", "is a web page, or other text in angle brackets"),
)
#: What PyTorch raises for damaged files besides the errors of files and pickles, found by damaging some.
_DAMAGE = (AssertionError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, struct.error)
#: This many names of weights are given in a message.
_MOST_NAMED = 3


class UnsafeCheckpointError(ModelError):
    """Loading a checkpoint could run code in it: ``found`` is what it holds besides tensors and plain values."""

    def __init__(self, path: Path, found: str, wanted: str) -> None:
        super().__init__(
            f"{path}: holds {found} besides tensors and plain values, and loading these could run any program; "
            f"expected {wanted}"
        )
        self.found = found


def load_state(path: Path, *, wanted: str) -> Any:
    """Load a checkpoint on the CPU; tensors and plain values only.

    ``wanted`` names what it should be ("the weights of the model 'medsam2'"). Raises UnsafeCheckpointError if loading
    could run code in it, ModelError if it is unreadable, not of PyTorch, or damaged.
    """
    import torch

    try:
        with path.open("rb") as file:
            head = file.read(32)
        if not head.startswith((_ZIP, _PICKLE)):
            found = next((words for start, words in _NOT_WEIGHTS if head.startswith(start)), "is no file of PyTorch")
            raise ModelError(f"{path}: {found if head else 'is empty'}; expected {wanted}: fetch or copy it again")
        if head.startswith(_ZIP) and not zipfile.is_zipfile(path):
            raise _damaged(path, wanted)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            with torch.serialization.safe_globals(_plain_types()):
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_sound(path):
            raise _damaged(path, wanted) from None
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise UnsafeCheckpointError(path, f"other objects ({name[1]})" if name else "other objects", wanted) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}); expected {wanted}") from None
    except _DAMAGE:
        raise _damaged(path, wanted) from None


def named_weights(content: Any, path: Path, *, wanted: str, key: str = "") -> dict[str, Tensor]:
    """Return the weights by name from what :func:`load_state` gave, there under ``key`` unless that is empty.

    Raises ModelError if there are no weights, or other values among them.
    """
    import torch

    where = ""
    if key:
        if not isinstance(content, Mapping) or key not in content:
            raise ModelError(f"{path}: holds {_found(content)} and no {key!r}; expected {wanted}")
        content, where = content[key], f" as {key!r}"
    if not isinstance(content, Mapping):
        raise ModelError(f"{path}: holds {_found(content)}{where}, not weights by name; expected {wanted}")
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others or not content:
        found = few(others) or "nothing"
        raise ModelError(f"{path}: holds {found}{where}, not weights by name alone; expected {wanted}")
    return {str(name): value for name, value in content.items()}


def check_fit(weights: Mapping[str, Tensor], network: Mapping[str, Tensor], path: Path, *, wanted: str) -> None:
    """Compare weights of a checkpoint with the ``state_dict`` of a network; ModelError if names or shapes differ."""
    found = {
        "missing": [name for name in network if name not in weights],
        "unknown": [name for name in weights if name not in network],
        "of another shape": [
            f"{name} is {_shape(weights[name])} instead of {_shape(tensor)}"
            for name, tensor in network.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    if faults := [f"{len(names)} {what} ({few(names)})" for what, names in found.items() if names]:
        raise ModelError(f"{path}: holds weights of another network: {'; '.join(faults)}; expected {wanted}")


def _found(content: Any) -> str:
    return (few(content) or "nothing") if isinstance(content, Mapping) else f"one {type(content).__name__}"


def few(names: Iterable[object]) -> str:
    """List the first few names for a message, and the number of the others."""
    listed = [str(name) for name in names]
    more = len(listed) - _MOST_NAMED
    return ", ".join(listed[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(n) for n in tensor.shape) or "a single number"


def _plain_types() -> list[Any]:
    """Classes, which run nothing, that pickle numbers and arrays of NumPy: nnU-Net leaves some in its checkpoints."""
    kinds = (np.float64, np.float32, np.int64, np.int32, np.bool_)
    makers = [getattr(np._core.multiarray, name) for name in ("scalar", "_reconstruct")]  # type: ignore[attr-defined]
    # By the names that NumPy 1 wrote, too.
    older = [(maker, f"numpy.core.multiarray.{maker.__name__}") for maker in makers]
    return [*makers, *older, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in kinds)]


def _is_sound(path: Path) -> bool:
    """Whether the pickles of a file are whole; nothing in them is run, and PyTorch does not check their checksums."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".pkl"):
                        archive.read(name)
            return True
        with path.open("rb") as file:
            for _ in range(_OLD_PICKLES):
                deque(pickletools.genops(file), maxlen=0)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error):
        return False
    return True


def _damaged(path: Path, wanted: str) -> ModelError:
    return ModelError(f"{path}: is cut short or damaged; expected {wanted}: fetch or copy it again")
