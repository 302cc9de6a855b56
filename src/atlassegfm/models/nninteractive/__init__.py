"""nnInteractive (Isensee, Rokuss, Krämer et al. 2025, arXiv 2503.08373) by its own inference session.

The session computes in this process, or on a server that gets the scan. Either way it sees the scan as its training
data were stored: not resampled, arrays in the order (z, y, x) of a RAS scan, which is (k, j, i) here. It normalises
intensities itself. A box is the rectangle of the prompt on its axial slice: the published network takes boxes of one
slice.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InputError, ModelError
from ...core.image import Volume
from ...core.mask import LocalMap
from ...prompts import INSIDE, BoxPrompt, ClickPrompt, Prompt, RegionPrompt
from ...settings import ModelSettings
from ..base import OnPrompt, in_turn, intensities, scan_name

Field = NDArray[np.float32]
#: Gives one prompt to a session, which then predicts.
Put = Callable[[Any], None]


class NnInteractiveSegmenter(ABC):
    """Model behind :class:`~atlassegfm.models.Segmenter`, with a session in this process or on a server.

    The session holds one scan at a time. Its arrays and voxels are in the order (k, j, i).
    """

    session: Any
    provenance: Mapping[str, Any]
    _shown: Field | None = None
    _mask: NDArray[np.uint8]

    @abstractmethod
    def close(self) -> None:
        """Release threads, or the place on the server; done at the end of the program, too."""

    @abstractmethod
    def _probability(self, scan: Field, put: Put) -> LocalMap:
        """Predict the probability, (k, j, i), for one prompt on a scan."""

    def encode(self, image: Volume) -> Field:
        """Return (K, J, I) float32 intensities of one scan (RAS-canonical array order), a view.

        Raises InputError if it has NaN or infinite voxels, or one value only where it is not 0: the session would
        predict nothing.
        """
        data = intensities(image)
        # The session takes mean and standard deviation over the box of the voxels that are not 0.
        box = LocalMap.from_full(data).values
        if box.min() == box.max():
            raise InputError(
                f"{scan_name(image)}: all voxels but those of value 0 around them have the value {box.flat[0]:g}; "
                "expected a scan with contrast for the model 'nninteractive'"
            )
        return data.T

    def predict(
        self, encoded: Field, prompts: Mapping[int, Prompt], on_prompt: OnPrompt | None = None
    ) -> dict[int, LocalMap]:
        """Predict the structures one after the other, independently; see :class:`~atlassegfm.models.Segmenter`.

        Raises ModelError if the session, or the server, fails, or the network does not take this kind of prompt.
        """
        return {number: self._predict_one(encoded, prompt) for number, prompt in in_turn(prompts, on_prompt)}

    def _predict_one(self, scan: Field, prompt: Prompt) -> LocalMap:
        put = self._interaction(scan.shape, prompt)
        return LocalMap.empty() if put is None else _turned(self._probability(scan, put))

    def _ask(self, scan: Field, put: Put) -> NDArray[np.uint8]:
        """Give the session one prompt, and the scan if it is another one than the last; return the session's mask."""
        known, self._shown = self._shown is scan, None
        if known:
            self.session.reset_interactions()
        else:
            self.session.set_image(np.ascontiguousarray(scan)[None])
            self._mask = np.zeros(scan.shape, np.uint8)
            self.session.set_target_buffer(self._mask)
        put(self.session)
        self._shown = scan
        return self._mask

    def _interaction(self, shape: tuple[int, ...], prompt: Prompt) -> Put | None:
        """The prompt in terms of a session, cut to a scan of this shape, (K, J, I); None if nothing is left."""
        session = self.session
        if isinstance(prompt, ClickPrompt):
            self._require("click", session.supported_interactions["points"])
            voxel = prompt.ijk[::-1]
            if not all(0 <= n < length for n, length in zip(voxel, shape, strict=True)):
                return None
            return lambda session: session.add_point_interaction(voxel, include_interaction=True)
        if isinstance(prompt, BoxPrompt):
            self._require("box", session.supported_interactions["bbox2d"])
            corners = zip(prompt.start[::-1], prompt.stop[::-1], shape, strict=True)
            sides = [[max(first, 0), min(last, length)] for first, last, length in corners]
            if any(last <= first for first, last in sides):
                return None
            return lambda session: session.add_bbox_interaction(sides, include_interaction=True)
        if isinstance(prompt, RegionPrompt):
            raise TypeError("the model 'nninteractive' is prompted by mask, box or click, not by RegionPrompt")
        self._require("mask", session.supports_initial_label and session.supports_zero_shot_label_refinement)
        mask = np.ascontiguousarray(_turned(prompt.probability).on_box((0, 0, 0), shape) >= INSIDE).astype(np.uint8)
        if not mask.any():
            return None
        return lambda session: session.add_initial_seg_interaction(mask, run_prediction=True)

    @staticmethod
    def _require(kind: str, supported: object) -> None:
        if not supported:
            raise ModelError(f"this nnInteractive network does not take the prompt {kind!r}; choose another prompt")


def load(device: str, settings: ModelSettings, weights: Callable[[], Path]) -> NnInteractiveSegmenter:
    """Load the model onto "cpu" or "cuda"; errors as of :func:`~atlassegfm.models.load_model`.

    Or connect to the server that the settings name, which brings its own network and device: errors as of ``connect``.
    """
    options = settings.nninteractive
    if options.server:
        from .remote import connect

        return connect(options)
    from .local import open_folder

    return open_folder(weights, device, options)


def _turned(probability: LocalMap) -> LocalMap:
    """With its axes in the order (k, j, i) instead of (i, j, k), or back."""
    i, j, k = probability.start
    return LocalMap((k, j, i), np.ascontiguousarray(probability.values.T))
