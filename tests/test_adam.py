"""Adam against PyTorch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from atlassegfm.core.adam import Adam
from atlassegfm.fusion.correction_training import _one_cycle


def curved(parameters: list[torch.Tensor]) -> torch.Tensor:
    return sum(((one - 0.3).pow(2) * (1 + torch.arange(one.numel())).reshape(one.shape)).sum() for one in parameters)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_that_of_pytorch(weight_decay: float) -> None:
    start = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=start).requires_grad_(True) for shape in ((3, 4), (5,))]
    theirs = [one.detach().clone().requires_grad_(True) for one in ours]
    optimizer = Adam(ours, [0.1, 0.1], decay_rates=(0.8, 0.95), weight_decay=weight_decay)
    reference = torch.optim.AdamW(theirs, 0.1, betas=(0.8, 0.95), weight_decay=weight_decay)
    for step in range(20):
        factor = 1 - step / 30
        optimizer.step(torch.autograd.grad(curved(ours), ours), factor=factor)
        reference.param_groups[0]["lr"] = 0.1 * factor
        reference.zero_grad()
        curved(theirs).backward()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_each_parameter_has_its_rate() -> None:
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    Adam(parameters, [0.5, 0.1]).step([torch.ones(1), torch.ones(1)])
    assert [round(float(one.detach()), 4) for one in parameters] == [-0.5, -0.1]


@pytest.mark.parametrize("steps", [10, 400])
def test_one_cycle_is_that_of_pytorch(steps: int) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], 1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=steps)
    for step in range(steps):
        group = optimizer.param_groups[0]
        assert _one_cycle(step, steps) == pytest.approx((group["lr"], group["betas"][0]), abs=1e-9)
        optimizer.step()
        if step + 1 < steps:
            schedule.step()


def test_a_registration_does_not_load_the_compiler_of_pytorch() -> None:
    program = (
        "import sys, numpy as np\n"
        "from atlassegfm.core.geometry import Grid\n"
        "from atlassegfm.core.image import Volume\n"
        "from atlassegfm.registration import register\n"
        "from atlassegfm.settings import RegistrationSettings\n"
        "data = np.random.default_rng(0).random((12, 12, 12), np.float32)\n"
        "scan = Volume(data, Grid(data.shape, np.eye(4)))\n"
        "register(scan, scan, RegistrationSettings(linear_iterations=1, deformable=False))\n"
        "sys.exit('torch._dynamo' in sys.modules or 'sympy' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
