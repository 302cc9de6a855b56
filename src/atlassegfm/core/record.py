"""JSON files of the program: one base class that reads, checks and writes them."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import InputError
from .files import PathLike, write_text


class Record(BaseModel):
    """Content of one kind of JSON file.

    NaN and infinity are written as the strings "NaN" and "Infinity" and read back as numbers. Unknown keys are errors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")

    def to_json(self) -> str:
        """Serialise to the text of the file."""
        return self.model_dump_json(indent=2) + "\n"

    def write(self, path: PathLike) -> None:
        """Write the file, whole or not at all."""
        write_text(Path(path), self.to_json())

    @classmethod
    def read(cls, path: PathLike) -> Self:
        """Read the file; InputError if it is missing, damaged, or of another version."""
        path = Path(path)
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            found = f"not as this version writes it ({where}: {first['msg']})"
            raise InputError(f"{path}: {found}; make it again with this version") from None
