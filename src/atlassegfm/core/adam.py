"""The optimiser Adam by PyTorch's own functional form.

The class ``torch.optim.Adam`` loads PyTorch's compiler with its first step, which takes longer than the registration of
a small scan; the function it calls does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

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
        self._steps = [torch.tensor(0.0) for _ in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], *, factor: float = 1.0, momentum: float | None = None) -> None:
        """Move the parameters against their gradients, at ``factor`` times the learning rates.

        ``momentum`` is used in this step in place of the first of the ``decay_rates``.
        """
        first, second = self._decay_rates
        states = (self.parameters, gradients, self._means, self._squares, self._steps)
        for rate, *state in zip(self.rates, *states, strict=True):
            parameter, gradient, mean, square, count = ([one] for one in state)
            adamw(
                parameter,
                gradient,
                mean,
                square,
                [],
                count,
                foreach=False,
                amsgrad=False,
                beta1=first if momentum is None else momentum,
                beta2=second,
                lr=rate * factor,
                weight_decay=self._weight_decay,
                eps=_EPSILON,
                maximize=False,
            )
