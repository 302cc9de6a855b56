"""nnInteractive (Isensee, Rokuss, Krämer et al. 2025, arXiv 2503.08373) by its own inference session.

The session computes in this process, or on a server that is given the scan. Either way it sees the scan as its
training data were stored: unresampled, arrays in the order (z, y, x) of a RAS scan, which is (k, j, i) here. It
normalises intensities itself.

A box is the rectangle of the prompt on its axial slice: the published network takes boxes of one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InputError, ModelError
from ...core.image import Volume
from ...core.mask import LocalMap
from ...prompts import INSIDE, BoxPrompt, ClickPrompt, Prompt, RegionPrompt
from ...settings import ModelSettings
from .. import OnPrompt
from ..inputs import intensities, scan_name
from ..weights import LocalWeights

Field = NDArray[np.float32]
#: Puts one prompt to a session, so that the session answers it.
Put = Callable[[Any], None]


class Backend(Protocol):
    """Where an nnInteractive session runs; arrays and voxels are in the order (k, j, i)."""

    @property
    def session(self) -> Any:
        """The session, local or remote: both have the same methods."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """As :attr:`~atlassegfm.models.Segmenter.provenance`."""
        ...

    def answer(self, scan: Field, put: Put) -> LocalMap:
        """Probability of what one prompt on a scan points at.

        The scan is handed to the session where it is not the one, by identity, of the last answer.
        """
        ...

    def close(self) -> None:
        """Give back threads, or the place on the server."""
        ...


@dataclass(frozen=True, eq=False)
class NnInteractiveEncoding:
    """An encoded scan; the session holds one scan at a time.

    Parameters
    ----------
    scan : array, (K, J, I) float32
        Intensities, finite and not constant; a view of the volume's data.
    """

    scan: Field


class NnInteractiveSegmenter:
    """Model behind :class:`~atlassegfm.models.Segmenter`.

    Parameters
    ----------
    backend : Backend
        Where its session runs.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The weights, or the server."""
        return self.backend.provenance

    def encode(self, image: Volume) -> NnInteractiveEncoding:
        """Take in one scan (RAS-canonical array order).

        Raises
        ------
        InputError
            If it has NaN or infinite voxels, or one value only where it is not 0: the session would turn them into
            an empty answer.
        """
        data = intensities(image)
        # The session takes mean and standard deviation over the box of the voxels that are not 0.
        box = LocalMap.from_full(data).values
        if box.min() == box.max():
            raise InputError(
                f"{scan_name(image)}: all voxels but those of value 0 around them have the value {box.flat[0]:g}; "
                "expected a scan with contrast for the model 'nninteractive'"
            )
        return NnInteractiveEncoding(data.T)

    def predict(
        self, encoded: NnInteractiveEncoding, prompts: Mapping[int, Prompt], on_prompt: OnPrompt | None = None
    ) -> dict[int, LocalMap]:
        """Predict the structures one after the other, independently; see :class:`~atlassegfm.models.Segmenter`.

        Raises
        ------
        ModelError
            If the session, or the server, fails, or the network does not take this kind of prompt.
        """
        maps = {}
        for number, prompt in prompts.items():
            if on_prompt is not None:
                on_prompt(number)
            maps[number] = self._answer(encoded.scan, prompt)
        return maps

    def close(self) -> None:
        """Give back threads, or the place on the server. Done at the end of the program, too."""
        self.backend.close()

    def _answer(self, scan: Field, prompt: Prompt) -> LocalMap:
        put = self._question(scan.shape, prompt)
        if put is None:
            return LocalMap.empty()
        found = self.backend.answer(scan, put)
        return _turned(found) if found.values.size else LocalMap.empty()

    def _question(self, shape: tuple[int, ...], prompt: Prompt) -> Put | None:
        """The prompt in terms of a session, cut to a scan of this shape, (K, J, I); None if nothing is left."""
        session = self.backend.session
        if isinstance(prompt, ClickPrompt):
            self._require("click", session.supported_interactions["points"])
            voxel = prompt.ijk[::-1]
            if not all(0 <= n < length for n, length in zip(voxel, shape, strict=True)):
                return None
            return lambda session: session.add_point_interaction(voxel, include_interaction=True)
        if isinstance(prompt, BoxPrompt):
            self._require("box", session.supported_interactions["bbox2d"])
            sides = [
                [max(first, 0), min(last, length)]
                for first, last, length in zip(prompt.start[::-1], prompt.stop[::-1], shape, strict=True)
            ]
            if any(last <= first for first, last in sides):
                return None
            return lambda session: session.add_bbox_interaction(sides, include_interaction=True)
        if isinstance(prompt, RegionPrompt):
            raise TypeError("the model 'nninteractive' is asked by mask, box or click, not by RegionPrompt")
        self._require("mask", session.supports_initial_label and session.supports_zero_shot_label_refinement)
        mask = np.ascontiguousarray(_turned(prompt.probability).on_box((0, 0, 0), shape) >= INSIDE).astype(np.uint8)
        if not mask.any():
            return None
        return lambda session: session.add_initial_seg_interaction(mask, run_prediction=True)

    @staticmethod
    def _require(kind: str, supported: object) -> None:
        if not supported:
            raise ModelError(f"this nnInteractive network does not take the prompt {kind!r}; choose another prompt")


def load(device: str, settings: ModelSettings, weights: Callable[[], LocalWeights]) -> NnInteractiveSegmenter:
    """Make the model ready on "cpu" or "cuda", or connect to the server that the settings name.

    A server brings its own network and device: no weights are looked for here, and PyTorch is not needed.

    Raises
    ------
    InputError
        If the weights are not there; if the server's address is none, or is on another machine and that is not
        allowed.
    MissingExtraError
        If nnInteractive, or its client, is not installed.
    ModelError
        If there is no such device, the weights are not those of an nnInteractive network, the installed nnInteractive
        is of another version, or the server does not answer.
    """
    options = settings.nninteractive
    if options.server:
        from .remote import connect

        return NnInteractiveSegmenter(connect(options))
    from .local import open_folder

    return NnInteractiveSegmenter(open_folder(weights, device, options))


def _turned(probability: LocalMap) -> LocalMap:
    """With its axes in the order (k, j, i) instead of (i, j, k), or back."""
    i, j, k = probability.start
    return LocalMap((k, j, i), np.ascontiguousarray(probability.values.T))
