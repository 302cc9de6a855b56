"""The optimiser Adam, with PyTorch's numbers.

The class ``torch.optim.Adam`` loads PyTorch's compiler with its first step, which takes longer than the registration of
a small scan, and its checks take longer than a step on few numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

#: Added to the root of the mean squared gradient: the default of PyTorch.
_EPSILON = 1e-8


class Adam:
    """Adam (Kingma and Ba 2015), with decoupled weight decay (Loshchilov and Hutter 2019) where it is not 0.

    ``parameters`` are leaves that derivatives are taken for; ``rates`` one learning rate for each of them.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rates: Sequence[float],
        *,
        decay_rates: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters, self.rates = list(parameters), list(rates)
        self._decay_rates, self._weight_decay = decay_rates, weight_decay
        self._means = [torch.zeros_like(one) for one in self.parameters]
        self._squares = [torch.zeros_like(one) for one in self.parameters]
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], *, factor: float = 1.0, momentum: float | None = None) -> None:
        """Move the parameters against their gradients, at ``factor`` times the learning rates.

        ``momentum`` is used in this step in place of the first of the ``decay_rates``.
        """
        first, second = self._decay_rates
        first = first if momentum is None else momentum
        self._steps += 1
        root = sqrt(1 - second**self._steps)
        states = (self.parameters, gradients, self._means, self._squares)
        for rate, parameter, gradient, mean, square in zip(self.rates, *states, strict=True):
            if self._weight_decay:
                parameter.mul_(1 - rate * factor * self._weight_decay)
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            scale = (square.sqrt() / root).add_(_EPSILON)
            parameter.addcdiv_(mean, scale, value=-rate * factor / (1 - first**self._steps))
