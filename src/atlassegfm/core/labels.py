"""Structures of a label map: values, names, colours, and the formats that carry them."""

import colorsys
import difflib
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .errors import InputError
from .files import PathLike

#: Colours for structures whose file names none: seven of Okabe and Ito (2008), then each as far as possible from all
#: before it (CIEDE2000, the least of normal, protan and deutan vision), so that no two look alike to the colour-blind.
_PALETTE = bytes.fromhex(
    "d55e00 56b4e9 f0e442 009e73 cc79a7 0072b2 e69f00 b9f5d7 145f50 9b3214"
    "41f5f5 aac88c 9b5f7d 148cf5 aa1450 9b237d d79baa d75f5f 5014f5 c8f59b"
)


@dataclass(frozen=True)
class Structure:
    """One anatomical structure of a label map."""

    value: int  # in the label map; greater than 0, which is background
    name: str  # as the user knows it
    color: tuple[int, int, int]  # red, green, blue, 0 to 255


@dataclass(frozen=True)
class LabelEntry:
    """What a file says about one label value: a name, and a colour (0 to 255 each) where it has one."""

    name: str
    color: tuple[int, int, int] | None = None


LabelTable = Mapping[int, LabelEntry]


def structures_of(
    values: Iterable[int], tables: Iterable[LabelTable], *, default_name: str = "label_{value}"
) -> tuple[Structure, ...]:
    """Give each label value, without 0, the name and colour of the first table that knows it.

    ``default_name`` is the pattern for values no table names.
    """
    tables = tuple(tables)
    found = []
    for position, value in enumerate(sorted(values)):
        entries = [table[value] for table in tables if value in table]
        name = entries[0].name if entries else default_name.format(value=value)
        colors = [entry.color for entry in entries if entry.color is not None]
        found.append(Structure(value, name, colors[0] if colors else palette_color(position)))
    return tuple(found)


def rgb(channels: Iterable[float]) -> tuple[int, int, int] | None:
    """Red, green, blue of channels from 0 to 255; None if they are not three."""
    values = [min(255, max(0, round(channel))) for channel in channels]
    return (values[0], values[1], values[2]) if len(values) == 3 else None


def _color(fractions: Iterable[str]) -> tuple[int, int, int] | None:
    """Colour of channels written as fractions of 1; None if they are no three numbers."""
    try:
        return rgb([255 * float(fraction) for fraction in fractions])
    except ValueError:
        return None


def palette_color(position: int) -> tuple[int, int, int]:
    """Get colour number ``position`` (from 0) of an endless list of distinct colours, 0 to 255 each."""
    if position < len(_PALETTE) // 3:
        red, green, blue = _PALETTE[3 * position : 3 * position + 3]
        return red, green, blue
    # Successive multiples of the golden ratio spread hues evenly, however many structures there are.
    hue = (position * 0.618033988749895) % 1.0
    channels = colorsys.hsv_to_rgb(hue, 0.55 + 0.3 * (position % 3) / 2, 0.95 - 0.35 * (position % 2))
    return round(255 * channels[0]), round(255 * channels[1]), round(255 * channels[2])


def distinct_names(names: Sequence[str]) -> list[str]:
    """Tell equal names apart: "A", "A (2)"; scores and tables that go by names would mix them."""
    given: set[str] = {plain_name(name) for name in names}
    seen: set[str] = set()
    distinct = []
    for name in names:
        new, number = name, 1
        while plain_name(new) in seen or (number > 1 and plain_name(new) in given):
            number += 1
            new = f"{name} ({number})"
        seen.add(plain_name(new))
        distinct.append(new)
    return distinct


def file_names(structures: Sequence[Structure]) -> list[str]:
    """Make file names of structures: what no file system takes is replaced, and equal names get the label value."""
    plain = [re.sub(r'[\\/:*?"<>|\x00-\x1f]+', "_", one.name).strip(" .") or str(one.value) for one in structures]
    count = Counter(name.casefold() for name in plain)
    return [
        f"{name}_{one.value}" if count[name.casefold()] > 1 else name
        for name, one in zip(plain, structures, strict=True)
    ]


def read_names_file(path: PathLike) -> dict[int, LabelEntry]:
    """Read label names from a file a user wrote or another program exported.

    Understood are JSON (``{"liver": 1}``, ``{"1": "liver"}`` or a whole nnU-Net ``dataset.json``), and text with one
    label a line: ``1 liver``, a FreeSurfer / 3D Slicer colour table ``1 liver 200 80 60 0``, or an ITK-SNAP label
    description ``1 200 80 60 1 1 1 "liver"``. Lines that begin with ``#`` are comments. InputError if the file is
    missing, is not text, or a line or key has none of these forms.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin with a byte order mark
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a names file (JSON or text)") from None
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: not readable as text; expected a names file (JSON or text)") from None
    return _from_json(text, path) if path.suffix == ".json" else _from_lines(text, path)


def dataset_json_of(labels_path: Path) -> Path | None:
    """Find the ``dataset.json`` beside a label file or, as in the nnU-Net raw layout, one folder above."""
    folder = labels_path.resolve().parent
    return next(filter(Path.is_file, (folder / "dataset.json", folder.parent / "dataset.json")), None)


def from_nifti_xml(xml: str) -> dict[int, LabelEntry]:
    """Read names from the ``LabelTable`` of a NIfTI header extension (Connectome Workbench, TotalSegmentator)."""
    start = xml.find("<LabelTable")
    stop = xml.rfind("</LabelTable>")
    if start < 0 or stop < 0:
        return {}
    try:
        table = ElementTree.fromstring(xml[start : stop + len("</LabelTable>")])
    except ElementTree.ParseError:
        return {}
    entries = {}
    for label in table.iter("Label"):
        key, name = label.get("Key"), (label.text or "").strip()
        if key is None or not key.lstrip("-").isdecimal() or not name:
            continue
        fractions = (label.get(channel) or "" for channel in ("Red", "Green", "Blue"))
        entries[int(key)] = LabelEntry(name, _color(fractions))
    return entries


def to_nifti_xml(structures: Iterable[Structure]) -> str:
    """Write the header extension that :func:`from_nifti_xml` reads, as Connectome Workbench does."""
    root = ElementTree.Element("CaretExtension")
    volume = ElementTree.SubElement(root, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(volume, "LabelTable")
    for structure in structures:
        red, green, blue = (f"{channel / 255:.6f}" for channel in structure.color)
        label = ElementTree.SubElement(
            table, "Label", Key=str(structure.value), Red=red, Green=green, Blue=blue, Alpha="1"
        )
        label.text = structure.name
    ElementTree.SubElement(volume, "VolumeType").text = "Label"
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False)


@dataclass(frozen=True)
class SlicerSegment:
    """One segment in the header of a 3D Slicer ``.seg.nrrd``: layer, value there, name and colour."""

    layer: int
    value: int
    entry: LabelEntry


def slicer_segments(metadata: Mapping[str, str]) -> list[SlicerSegment]:
    """List the segments of a header (``Segment0_LabelValue``, ``_Layer``, ``_Name``, ``_Color``) in their order."""
    found = {}
    for key, text in metadata.items():
        match = re.fullmatch(r"Segment(\d+)_LabelValue", key)
        name = metadata.get(f"Segment{match[1]}_Name", "").strip() if match else ""
        if match is None or not text.strip().isdecimal() or not name:
            continue
        color = _color(metadata.get(f"Segment{match[1]}_Color", "").split())
        layer = metadata.get(f"Segment{match[1]}_Layer", "0").strip()
        found[int(match[1])] = SlicerSegment(int(layer) if layer.isdecimal() else 0, int(text), LabelEntry(name, color))
    return [found[number] for number in sorted(found)]


def from_slicer_metadata(metadata: Mapping[str, str]) -> dict[int, LabelEntry]:
    """Read names from the header fields of a 3D Slicer segmentation of one layer."""
    return {one.value: one.entry for one in slicer_segments(metadata)}


def to_slicer_metadata(structures: Sequence[Structure], shape: Sequence[int]) -> dict[str, str]:
    """Write the header fields of a 3D Slicer segmentation of ``shape`` voxels; none without structures."""
    if not structures:
        return {}
    extent = " ".join(f"0 {count - 1}" for count in shape)
    fields = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for position, structure in enumerate(structures):
        segment = {
            "ID": f"Segment_{structure.value}",
            "Name": structure.name,
            "LabelValue": str(structure.value),
            "Layer": "0",
            "Extent": extent,
            "Color": " ".join(f"{channel / 255:.6f}" for channel in structure.color),
        }
        fields |= {f"Segment{position}_{key}": text for key, text in segment.items()}
    return fields


def slicer_color_table(structures: Iterable[Structure]) -> str:
    """Write a colour table of 3D Slicer (``.ctbl``), which :func:`read_names_file` reads."""
    rows = ("{} {} {} {} {} 255\n".format(one.value, "_".join(one.name.split()), *one.color) for one in structures)
    return "# value name red green blue alpha\n0 background 0 0 0 0\n" + "".join(rows)


def itk_snap_labels(structures: Iterable[Structure]) -> str:
    """Write label descriptions of ITK-SNAP, which :func:`read_names_file` reads."""
    rows = (
        '{:5} {:5} {:4} {:4}        1  1  1    "{}"\n'.format(one.value, *one.color, one.name) for one in structures
    )
    return (
        "# ITK-SNAP label descriptions: value, red, green, blue, opacity, visible, shown in 3-D, name\n"
        '    0     0    0    0        0  0  0    "Clear Label"\n' + "".join(rows)
    )


def _from_json(text: str, path: Path) -> dict[int, LabelEntry]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON (line {error.lineno}: {error.msg}); correct it") from None
    if isinstance(content, dict) and isinstance(content.get("labels"), dict):
        content = content["labels"]
    if not isinstance(content, dict):
        raise InputError(f'{path}: expected an object such as {{"liver": 1}}, found a {type(content).__name__}')
    entries = {}
    for key, item in content.items():
        if isinstance(item, int) and not isinstance(item, bool):
            value, name = item, str(key)
        elif str(key).isdecimal() and isinstance(item, str):
            value, name = int(key), item
        else:
            # nnU-Net also allows regions ("whole_tumour": [1, 2]); a label map has single values only.
            raise InputError(f'{path}: {key!r}: {item!r} is not a label; expected "name": value or "value": "name"')
        if value:
            entries[value] = LabelEntry(name)
    return entries


#: Lines of label descriptions of ITK-SNAP, of colour tables of FreeSurfer and 3D Slicer, and of values and names.
_LINES = (
    re.compile(r'(?P<value>\d+)\s+(?P<color>\d+\s+\d+\s+\d+)\s+\S+\s+\d\s+\d\s+"(?P<name>.*)"'),
    re.compile(r"(?P<value>\d+)\s+(?P<name>.+?)\s+(?P<color>\d+\s+\d+\s+\d+)(?:\s+\d+)?"),
    re.compile(r"(?P<value>\d+)[\s,;:=]+(?P<name>.+)"),
)


def _from_lines(text: str, path: Path) -> dict[int, LabelEntry]:
    entries = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        match = next(filter(None, (form.fullmatch(line) for form in _LINES)), None)
        if match is None:
            raise InputError(f"{path}: line {number} is {line!r}; expected a label value and a name, as '1 liver'")
        if int(match["value"]):
            color = rgb(map(int, match.groupdict().get("color", "").split()))
            entries[int(match["value"])] = LabelEntry(match["name"].strip().strip('"'), color)
    return entries


#: A message that lists names stops after so many: about two lines of a terminal.
_LONGEST_LIST = 15


def plain_name(name: str) -> str:
    """Normalise a name for comparison: no capitals, one space for each run of spaces, underscores and hyphens.

    What stands in square brackets keeps its hyphens, as "[a-c]" in a pattern is a range.
    """
    return re.sub(r"(\[[^\]]*\])|[\s_-]+", lambda found: found[1] or " ", name.casefold()).strip()


def match_rank(wanted: str, value: int, name: str) -> int | None:
    """Rank how a structure matches what a user wrote: a value ("6"), a name ("left kidney") or a shell pattern.

    0 if ``wanted`` is its value, 1 if it is its name, 2 if it is a pattern (``*kidney*``) of its name; None if it is
    none of these. The lower one is meant where several fit.
    """
    if wanted.strip().isdecimal() and int(wanted) == value:
        return 0
    wanted, name = plain_name(wanted), plain_name(name)
    if wanted == name:
        return 1
    return 2 if fnmatchcase(name, wanted) else None


def hint(wanted: str, known: Iterable[str]) -> str:
    """Ask whether the known name most like a misspelt one was meant; empty if none is like it."""
    by_plain = {plain_name(name): name for name in known}
    found = difflib.get_close_matches(plain_name(wanted), by_plain, n=1)
    return f"did you mean {by_plain[found[0]]!r}? " if found else ""


def pick_values(names: Mapping[int, str], wanted: Sequence[str], place: str = "") -> tuple[int, ...]:
    """Find the label values, ascending, of structures by value, else name, else shell pattern.

    InputError, which begins with ``place``, if one of them fits none.
    """
    picked: set[int] = set()
    for one in wanted:
        ranks = {value: rank for value, name in names.items() if (rank := match_rank(one, value, name)) is not None}
        if not ranks:
            known = listed([f"{value} ({name})" for value, name in sorted(names.items())])
            likely = hint(one, names.values())
            raise InputError(f"{place}no structure {one!r}; {likely}expected a value, name or pattern of {known}")
        picked |= {value for value, rank in ranks.items() if rank == min(ranks.values())}
    return tuple(sorted(picked))


def listed(names: Sequence[str], limit: int = _LONGEST_LIST, separator: str = ", ") -> str:
    """List names for a message: "a, b, c", or the first ``limit`` of them "and 4 more"."""
    rest = len(names) - limit
    return separator.join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def shortened(text: str, most: int) -> str:
    """Cut a text of more than ``most`` letters in its middle: names differ at both ends."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"
