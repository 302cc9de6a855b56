"""The built-in model: refines a prompt by the appearance and the edges of the query itself.

It has no weights, so that the program does its whole job on a fresh machine. Per structure, on a crop
around the prompt:

1. *Where it may be.* The signed distance to the prompt's border, divided by the size of error to expect,
   is the log-odds of the prior: a registered mask is wrong near its border, not in its middle.
2. *What it looks like.* Densities of the intensity inside and outside, learned from the prompt by
   expectation maximisation with that prior, so that the contaminated border counts little. Three views are
   averaged: intensity over the whole crop, smoothed intensity with its local spread, and intensity in the
   neighbourhood (a four-dimensional bilateral grid, Chen et al. 2007, "Real-time edge-aware image processing
   with the bilateral grid"). Both densities are mixed with their mean: where inside and outside look the
   same the evidence is 0 and the prompt stays.
3. *Where a border can run.* A Markov random field with contrast-sensitive couplings (Boykov and Jolly 2001),
   solved by mean field in a few sweeps. On the same energy a graph cut (maximum flow) and total variation
   (Chambolle-Pock) came out within 0.002 Dice of it, at 6 to 15 times the time; a random walker with priors
   (Grady 2005) was 0.003 lower.

Distances and weights are in mm. Nothing is random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from ..errors import ModelError
from ..image import LocalMap, Volume
from ..prompts import INSIDE, BoxPrompt, ClickPrompt, MaskPrompt, Prompt

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

ERROR_PER_RADIUS = 0.2
SMALLEST_ERROR_MM = 1.0
LARGEST_ERROR_MM = 6.0
SMALLEST_ERROR_VOXELS = 0.5
REACH_ERRORS = 3.0
REACH_VOXELS = 2.5
PRIOR_SLOPE = 1.2
EVIDENCE_WEIGHT = 2.0
SHARED_APPEARANCE = 0.2
EM_SWEEPS = 3
TEXTURE_MM = 2.0
NEIGHBOURHOOD_MM = 20.0
NEIGHBOURHOOD_VOXELS = 20.0
COUPLING = 1.0
CONTRAST_NOISES = 2.0
SMALLEST_COUPLING = 0.02
SMALLEST_NOISE = 0.02
SWEEPS = 8
KEEP = 0.0
MIX = (1, 1, 2)
STRAY = True
LARGEST_LOG_ODDS = 4.0
BINS = 64
TEXTURE_BINS = 24
NEIGHBOURHOOD_BINS = 16
PRIOR_BINS = 24


@dataclass(frozen=True, eq=False)
class BuiltinEncoding:
    data: NDArray[np.float32]
    spacing_mm: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BuiltinSegmenter:
    device: torch.device

    def encode(self, image: Volume) -> BuiltinEncoding:
        return BuiltinEncoding(np.asarray(image.data, np.float32), image.grid.spacing_mm)

    def predict(self, encoded: BuiltinEncoding, prompt: Prompt) -> LocalMap:
        shape = np.array(encoded.data.shape)
        if isinstance(prompt, MaskPrompt):
            start, soft = clip_to_volume(prompt.probability, shape)
        else:
            raise NotImplementedError
        return self.refine(encoded, start, soft)

    def refine(self, encoded, start, soft):
        sp = encoded.spacing_mm
        hit = np.argwhere(soft >= INSIDE)
        if not len(hit):
            return LocalMap.empty()
        radius = radius_mm(soft >= INSIDE, sp)
        s = max(min(max(ERROR_PER_RADIUS * radius, SMALLEST_ERROR_MM), LARGEST_ERROR_MM), SMALLEST_ERROR_VOXELS * sp.min())
        reach = max(REACH_ERRORS * s, REACH_VOXELS * sp.min())
        margin = np.ceil(reach / sp).astype(int) 
        first = np.maximum(start + hit.min(0) - margin, 0)
        last = np.minimum(start + hit.max(0) + 1 + margin, encoded.data.shape)
        box = tuple(slice(a, b) for a, b in zip(first, last))
        image = encoded.data[box]
        mask = LocalMap(tuple(start), soft).on_box(first, last) >= INSIDE
        sd = signed_distance_mm(mask, sp)
        near = sd > -reach
        prior = (PRIOR_SLOPE / s * sd[near]).astype(np.float32)
        ev = evidence(image, near, sd[near] * (1.7 / s), sp)
        lo = np.full(image.shape, -LARGEST_LOG_ODDS, np.float32)
        lo[near] = np.clip(prior + EVIDENCE_WEIGHT * ev, -LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)
        x0 = np.full(image.shape, -1, np.float32); x0[near] = np.tanh(prior / 2)
        p = mean_field(lo, couplings(image, near, sp), self.device, x0)
        p[~near] = 0
        if STRAY:
            comp, n = ndimage.label(p >= INSIDE)
            if n > 1:
                keep = np.zeros(n + 1, bool); keep[np.unique(comp[mask])] = True; keep[0] = True
                p = np.where(keep[comp], p, np.float32(0.49))
        return LocalMap(tuple(int(x) for x in first), p)


def clip_to_volume(local: LocalMap, shape):
    first = np.maximum(local.start, 0); last = np.minimum(local.stop, shape)
    if (last <= first).any():
        return first, np.zeros((0, 0, 0), np.float32)
    return first, local.on_box(first, last)


def signed_distance_mm(mask, sp):
    h = sp.min() / 2
    if mask.all():
        return np.full(mask.shape, 1e3, np.float32)
    return np.where(mask, ndimage.distance_transform_edt(mask, sp) - h, h - ndimage.distance_transform_edt(~mask, sp)).astype(np.float32)


def radius_mm(mask, sp):
    surface = 0.0
    padded = np.pad(mask, 1)
    for ax in range(3):
        surface += np.count_nonzero(np.diff(padded, axis=ax)) * np.prod(np.delete(sp, ax))
    return 3 * mask.sum() * np.prod(sp) / (surface / 1.5)


def _bins(values, n):
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip((values - low) * ((n - 1) / max(high - low, 1e-6)), 0, n - 1)


def _ratio(inside, outside):
    pool = (inside + outside) / 2 + 1e-9
    return np.log(((1 - SHARED_APPEARANCE) * inside + SHARED_APPEARANCE * pool) / ((1 - SHARED_APPEARANCE) * outside + SHARED_APPEARANCE * pool))


def _sig(x):
    return 1 / (1 + np.exp(-x))


def evidence(image, near, prior_lo, sp):
    prior = np.clip(_sig(prior_lo), 1e-3, 1 - 1e-3)
    vals = image[near]
    b = _bins(vals, BINS)
    g1 = histogram_evidence(np.rint(b).astype(np.int32), (BINS,), prior, 1.5)
    mean = ndimage.gaussian_filter(image, TEXTURE_MM / sp)
    spread = np.sqrt(np.maximum(ndimage.gaussian_filter(image * image, TEXTURE_MM / sp) - mean * mean, 0))[near]
    j = np.rint(_bins(mean[near], TEXTURE_BINS)).astype(np.int32) * TEXTURE_BINS + np.rint(_bins(spread, TEXTURE_BINS)).astype(np.int32)
    gs = histogram_evidence(j, (TEXTURE_BINS, TEXTURE_BINS), prior, 1.0)
    l20 = local_evidence(b * ((NEIGHBOURHOOD_BINS - 1) / (BINS - 1)), near, prior, sp)
    a, b_, c_ = MIX
    return (a * g1 + b_ * gs + c_ * l20) / (a + b_ + c_)


def histogram_evidence(f, shape, prior, smooth):
    n = int(np.prod(shape))
    q = np.minimum((prior * PRIOR_BINS).astype(np.int32), PRIOR_BINS - 1)
    T = np.bincount(q * n + f, minlength=PRIOR_BINS * n).reshape(PRIOR_BINS, n).astype(float)
    qs = np.bincount(q, prior, PRIOR_BINS) / np.maximum(T.sum(1), 1)
    qs = np.clip(qs, 1e-3, 1 - 1e-3); lq = np.log(qs / (1 - qs))[:, None]
    L = np.zeros(n)
    for _ in range(EM_SWEEPS):
        r = _sig(lq + L)
        a = ndimage.gaussian_filter((T * r).sum(0).reshape(shape), smooth, mode="nearest").ravel()
        c = ndimage.gaussian_filter((T * (1 - r)).sum(0).reshape(shape), smooth, mode="nearest").ravel()
        L = _ratio(a / max(a.sum(), 1e-9), c / max(c.sum(), 1e-9))
    return L[f]


def local_evidence(b, near, prior, sp):
    cell = np.maximum(NEIGHBOURHOOD_MM, sp)
    half = (np.array(near.shape) - 1) / 2 * sp / cell
    mid = np.ceil(half - 0.5).astype(int) + 1
    dims = (*(2 * mid + 1), NEIGHBOURHOOD_BINS)
    coords = np.empty((4, len(b)), np.float32)
    for ax, idx in enumerate(np.nonzero(near)):
        coords[ax] = (idx - (near.shape[ax] - 1) / 2) * (sp[ax] / cell[ax])
    flat = np.zeros(len(b), np.int64)
    for ax in range(3):
        x = coords[ax]
        flat = flat * dims[ax] + (np.sign(x) * np.floor(np.abs(x) + 0.5)).astype(np.int64) + mid[ax]
        coords[ax] += mid[ax]
    coords[3] = b
    flat = flat * NEIGHBOURHOOD_BINS + np.rint(b).astype(np.int64)
    n = int(np.prod(dims)); r = prior; lq = np.log(prior / (1 - prior)); L = 0
    tot = np.bincount(flat, minlength=n).astype(float)
    for it in range(EM_SWEEPS):
        a = np.bincount(flat, r, n)
        c = ndimage.gaussian_filter((tot - a).reshape(dims), (1, 1, 1, 0.8), mode="constant")
        a = ndimage.gaussian_filter(a.reshape(dims), (1, 1, 1, 0.8), mode="constant")
        sa, sc = a.sum(-1, keepdims=True), c.sum(-1, keepdims=True)
        k = NEIGHBOURHOOD_VOXELS
        conf = np.minimum(sa, sc); conf = conf / (conf + k)
        L = conf * _ratio(a / (sa + k), c / (sc + k))
        if it + 1 < EM_SWEEPS:
            r = _sig(lq + L.ravel()[flat])
    return ndimage.map_coordinates(L.astype(np.float32), coords, order=1, mode="nearest")


def couplings(image, near, sp):
    diffs = [np.diff(image, axis=ax) for ax in range(3)]
    noises = [np.median(np.abs(d[_lo(near, ax)])) / 0.954 for ax, d in enumerate(diffs) if d.size and _lo(near, ax).any()]
    low, high = np.percentile(image[near], (0.5, 99.5))
    noise = max(min(noises, default=0), SMALLEST_NOISE * (high - low), 1e-6)
    out = []
    for ax, d in enumerate(diffs):
        g = np.exp(-0.5 * (d / (CONTRAST_NOISES * 1.414 * noise)) ** 2)
        out.append(((SMALLEST_COUPLING + (1 - SMALLEST_COUPLING) * g) * (COUPLING * sp.min() / sp[ax])).astype(np.float32))
    return out


def _lo(near, ax):
    n = near.shape[ax]
    return np.take(near, range(n - 1), axis=ax)


def mean_field(lo, W, device, x0):
    l = torch.from_numpy(lo).to(device)
    W = [torch.from_numpy(w).to(device) for w in W]
    def pull(x, h):
        for ax, w in enumerate(W):
            n = x.shape[ax]
            h.narrow(ax, 0, n - 1).addcmul_(w, x.narrow(ax, 1, n - 1))
            h.narrow(ax, 1, n - 1).addcmul_(w, x.narrow(ax, 0, n - 1))
        return h
    if KEEP:
        l = l - KEEP * pull(torch.from_numpy(x0).to(device), torch.zeros_like(l))
    x = torch.tanh(l / 2)
    for _ in range(SWEEPS):
        x = pull(x, l.clone()).div_(2).tanh_()
    return ((x + 1) / 2).clamp_(0, 1).cpu().numpy()


def load(device: str) -> BuiltinSegmenter:
    return BuiltinSegmenter(torch.device(device))
