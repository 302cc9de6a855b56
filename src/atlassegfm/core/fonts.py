"""Fonts of pictures: letters that matplotlib's own font lacks come from a font of the machine, or are replaced."""

from functools import cache

#: Comes with matplotlib: the same letters on every machine.
FONT = "DejaVu Sans"
#: Stands for a letter that no font has.
MISSING = "□"


def fonts_for(text: str) -> tuple[list[str], str]:
    """Choose font families for a text, and replace what they lack by :data:`MISSING`; needs matplotlib."""
    from matplotlib.font_manager import findfont

    text = " ".join(text.split())
    families, lacking = [FONT], _lacking(findfont(FONT), text)
    if lacking:
        family, path = _font_with("".join(sorted(lacking)))
        families, lacking = ([FONT, family], _lacking(path, "".join(lacking))) if family else (families, lacking)
    return families, "".join(MISSING if letter in lacking else letter for letter in text)


def drawable(text: str) -> str:
    """Replace letters that :data:`FONT` lacks by :data:`MISSING`; needs matplotlib."""
    from matplotlib.font_manager import findfont

    text = " ".join(text.split())
    lacking = _lacking(findfont(FONT), text)
    return "".join(MISSING if letter in lacking else letter for letter in text)


@cache
def _font_with(letters: str) -> tuple[str, str]:
    """Find the family that has most of some letters, the first by name, and its file; empty if none has any."""
    from matplotlib.font_manager import fontManager

    regular = (font for font in fontManager.ttflist if font.style == "normal" and font.weight in (400, "normal"))
    paths = {font.name: font.fname for font in regular if "last resort" not in font.name.lower()}
    fewest, family = min(((len(_lacking(path, letters)), name) for name, path in paths.items()), default=(1, ""))
    return (family, paths[family]) if fewest < len(letters) else ("", "")


def _lacking(path: str, text: str) -> set[str]:
    """Letters of a text that a font lacks; all of them if its file cannot be read or drawn."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        font.set_size(12, 100)
    except (OSError, RuntimeError):
        return set(text)
    return {letter for letter in text if not font.get_char_index(ord(letter))}
