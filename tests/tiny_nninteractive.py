"""Networks for nnInteractive that need no download: folders in the published layout, and toys that follow prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

#: The name is free; plans and checkpoint must agree on it.
CONFIGURATION = "3d_fullres_ps192_bs24"
#: Image, previous mask, and positive and negative boxes, clicks and scribbles.
CHANNELS = 8


class PromptFollower(torch.nn.Module):
    """Finds what looks like the prompted voxels and is connected to them; no learning.

    A mask may grow by a few voxels only, clicks and boxes by many. The channels are those of the published network.
    """

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool = False, reach: int = 3) -> None:
        super().__init__()
        assert (input_channels, num_classes, deep_supervision) == (CHANNELS, 2, False)
        self.reach = reach
        self.gain = torch.nn.Parameter(torch.tensor(14.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image, mask = x[:, :1].float(), x[:, 1:2].float() > 0.5
        pointed = x[:, (2, 4, 6)].float().amax(dim=1, keepdim=True) > 0.25
        seeds = mask | pointed
        found = torch.zeros_like(image)
        if seeds.any():
            inside = image[seeds]
            middle = inside.median()
            spread = 4 * 1.4826 * (inside - middle).abs().median() + 0.15
            # Exactly 0 is what a patch is padded with.
            alike = (((image - middle).abs() < spread) & (image != 0)).float()
            found = seeds.float() * alike
            for _ in range(30 if pointed.any() else self.reach):
                grown = functional.max_pool3d(found, 3, stride=1, padding=1) * alike
                if torch.equal(grown, found):
                    break
                found = grown
        # Soft at the border, and never a tie.
        share = functional.avg_pool3d(found, 3, stride=1, padding=1)
        logit = self.gain * (0.5 * share + 0.5 * found - 0.501)
        return torch.cat((torch.zeros_like(logit), logit), dim=1)


class AppearanceRefiner(torch.nn.Module):
    """Moves the border of a prompted mask by what the image says about both sides of it; no learning.

    The model "builtin" in short: the log-odds of a voxel are those of a blurred mask, plus how much more often its
    intensity occurs inside than outside by histograms of this one patch, plus what alike neighbours have. It answers
    to a mask alone, takes voxels for cubes, and learns from one patch: it stands in for a trained network where a test
    needs an answer that is better than its prompt, and says nothing of how good one is.
    """

    #: Voxels around the mask that are looked at.
    margin = 10
    bins = 48
    sweeps = 8

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool = False) -> None:
        super().__init__()
        assert (input_channels, num_classes, deep_supervision) == (CHANNELS, 2, False)
        self.evidence = torch.nn.Parameter(torch.tensor(1.0))
        self.coupling = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = x[0, 1] > 0.5
        logit = torch.full(inside.shape, -9.0)
        if inside.any():
            box = tuple(
                slice(max(int(n.min()) - self.margin, 0), int(n.max()) + self.margin + 1)
                for n in torch.nonzero(inside, as_tuple=True)
            )
            logit[box] = self._refined(x[0, 0][box].float(), inside[box].float())
        # Both classes of a voxel lie side by side in memory: the session compares them 7 times as fast.
        return torch.stack((torch.zeros_like(logit), logit), dim=-1).permute(3, 0, 1, 2)[None]

    def _refined(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Log-odds after all three steps."""
        rim = functional.max_pool3d(1 - mask[None], (1, 3, 3), stride=1, padding=(0, 1, 1))[0] * mask
        error = float((0.4 * mask.sum() / rim.sum().clamp_min(1)).clamp(1, 4))  # a fifth of a ball's radius
        prior = torch.logit(self._blurred(mask, 1.4 * error), eps=1e-3)
        near = (prior > -4) & (image != 0)  # exactly 0 is what a patch is padded with
        own = torch.full_like(prior, -9)
        own[near] = (prior[near] + self.evidence * self._evidence(image[near], prior[near])).clamp(-4, 4)
        steps = [image.diff(dim=axis) for axis in range(3)]
        noise = max(min(float(step.abs().median()) for step in steps), 0.02)
        links = [self.coupling * torch.exp(-0.25 * (step / (2 * noise)) ** 2) for step in steps]
        found = own
        for _ in range(self.sweeps):
            sign, found = torch.tanh(found / 2), own.clone()
            for axis, link in enumerate(links):
                last = sign.shape[axis] - 1
                found.narrow(axis, 0, last).addcmul_(link, sign.narrow(axis, 1, last))
                found.narrow(axis, 1, last).addcmul_(link, sign.narrow(axis, 0, last))
        return found

    def _evidence(self, values: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        """Logarithm of how much more often an intensity occurs inside, by expectation maximisation."""
        order = values.sort().values
        low, high = order[len(order) // 200], order[-1 - len(order) // 200]
        place = (values - low) / (high - low).clamp_min(1e-6) * (self.bins - 1)
        bin_of = place.round().clamp(0, self.bins - 1).long()
        evidence = torch.zeros_like(prior)
        for _ in range(3):
            inside = torch.sigmoid(prior + evidence)
            counts = torch.stack([torch.bincount(bin_of, share, self.bins) for share in (inside, 1 - inside)])
            smooth = functional.avg_pool1d(functional.pad(counts[:, None], (3, 3), mode="replicate"), 7, stride=1)[:, 0]
            shares = smooth / smooth.sum(dim=1, keepdim=True).clamp_min(1e-6)
            # Where both sides look the same this is 0, and it is never large.
            one, other = 0.8 * shares + 0.1 * shares.sum(dim=0) + 1e-6
            evidence = torch.log(one / other)[bin_of]
        return evidence

    @staticmethod
    def _blurred(values: torch.Tensor, deviation: float) -> torch.Tensor:
        reach = round(3 * deviation)
        window = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
        window = window / window.sum()
        for axis in range(3):
            shape, padding = [1] * 5, [0] * 3
            shape[2 + axis], padding[axis] = len(window), reach
            values = functional.conv3d(values[None, None], window.view(shape), padding=padding)[0, 0]
        return values


def make_folder(
    root: Path,
    *,
    follower: bool = False,
    refiner: bool = False,
    patch: tuple[int, int, int] = (64, 64, 64),
    fold: int = 0,
    seed: int = 0,
) -> Path:
    """Write the folder of a network with one fold: a small random one of the published kind, or a toy."""
    if follower:
        name, arguments, imported = "tiny_nninteractive.PromptFollower", {"reach": 3}, []
        network: torch.nn.Module = PromptFollower(CHANNELS, 2)
    elif refiner:
        name, arguments, imported = "tiny_nninteractive.AppearanceRefiner", {}, []
        network = AppearanceRefiner(CHANNELS, 2)
    else:
        name, arguments, imported, network = _residual_encoder(seed)
    (root / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
    architecture = {"network_class_name": name, "arch_kwargs": arguments, "_kw_requires_import": imported}
    write(
        root / "dataset.json",
        {
            "channel_names": {"0": "zscore"},
            "labels": {"background": 0, "object": 1},
            "file_ending": ".nii.gz",
        },
    )
    write(
        root / "plans.json",
        {
            "dataset_name": "Dataset000_tiny",
            "plans_name": "tiny",
            "configurations": {CONFIGURATION: {"patch_size": list(patch), "architecture": architecture}},
        },
    )
    write(
        root / "inference_session_class.json",
        {
            "inference_class": "nnInteractiveInferenceSession",
            "point_radius": 4,
            "preferred_scribble_thickness": 2,
            "interaction_decay": 0.9,
            "pad_mode_image": "constant",
        },
    )
    (root / "LICENSE").write_text("CC0-1.0\nmade for tests\n")
    save_checkpoint(root / f"fold_{fold}", network_weights=network.state_dict())
    return root


def save_checkpoint(fold: Path, **changed: Any) -> None:
    """Write the checkpoint of a fold; None leaves an entry out."""
    content = {
        "network_weights": {},
        "trainer_name": "nnInteractiveTrainer_stub",
        "init_args": {"configuration": CONFIGURATION, "fold": 0},
    } | changed
    torch.save({key: value for key, value in content.items() if value is not None}, fold / "checkpoint_final.pth")


def write(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content))


def _residual_encoder(seed: int) -> tuple[str, dict[str, Any], list[str], torch.nn.Module]:
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    features = (4, 8, 8)
    stages = len(features)
    plain: dict[str, Any] = {
        "n_stages": stages,
        "features_per_stage": list(features),
        "kernel_sizes": [[3] * 3] * stages,
        "strides": [[1] * 3] + [[2] * 3] * (stages - 1),
        "n_blocks_per_stage": [1] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin_kwargs": {"inplace": True},
    }
    named = {
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "nonlin": "torch.nn.LeakyReLU",
    }
    kinds = {"conv_op": torch.nn.Conv3d, "norm_op": torch.nn.InstanceNorm3d, "nonlin": torch.nn.LeakyReLU}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResidualEncoderUNet(CHANNELS, num_classes=2, deep_supervision=False, **plain, **kinds)
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    return name, plain | named, [*named, "dropout_op"], network
