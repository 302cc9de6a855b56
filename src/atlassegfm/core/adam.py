"""The optimiser Adam, as PyTorch computes it, without loading ``torch.optim``.

Loading that brings in PyTorch's compiler, which takes seconds: longer than the registration of a small scan.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Added to the root of the mean squared gradient.
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
        self._decay_rates, self._weight_decay, self._steps = decay_rates, weight_decay, 0
        self._means = [torch.zeros_like(one) for one in self.parameters]
        self._squares = [torch.zeros_like(one) for one in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], *, factor: float = 1.0, momentum: float | None = None) -> None:
        """Move the parameters against their gradients, at ``factor`` times the learning rates.

        ``momentum`` is used in this step in place of the first of the ``decay_rates``.
        """
        first, second = self._decay_rates
        first = first if momentum is None else momentum
        self._steps += 1
        first_total, second_total = 1 - first**self._steps, 1 - second**self._steps
        for one, rate, gradient, mean, square in zip(
            self.parameters, self.rates, gradients, self._means, self._squares, strict=True
        ):
            rate *= factor
            if self._weight_decay:
                one.mul_(1 - rate * self._weight_decay)
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            one.addcdiv_(mean, (square.sqrt() / second_total**0.5).add_(_EPSILON), value=-rate / first_total)
