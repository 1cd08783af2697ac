"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose steps are made orthogonal.

torch.optim.Muon takes matrices only; most weights of these models are convolutions, flattened here to
(out, in * kh * kw). Everything that is not a matrix or a kernel goes to AdamW.
"""

import torch


def orthogonal(g: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrix of g, roughly (singular values 0.7 to 1.2), by a quintic Newton-Schulz iteration.

    g: (rows, columns). The coefficients are those of the article above.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; step size lr * sqrt(max(1, rows / columns))."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                velocity = state.setdefault("momentum", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(velocity, group["momentum"]).flatten(1)
                update = orthogonal(direction).view_as(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, direction.shape[0] / direction.shape[1]) ** 0.5)


class Optimizers:
    """Muon for the hidden matrices and kernels, AdamW for the rest; one learning-rate factor for both."""

    def __init__(self, named, *, muon_lr: float, adam_lr: float, adam_only=()):
        named = [(n, p) for n, p in named if p.requires_grad]
        hidden = [p for n, p in named if p.ndim >= 2 and not any(n.endswith(s) for s in adam_only)]
        rest = [p for n, p in named if p.ndim < 2 or any(n.endswith(s) for s in adam_only)]
        self.parts = [Muon(hidden, lr=muon_lr), torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0)]
        self.base = [muon_lr, adam_lr]

    def step(self, factor: float) -> None:
        """One step at `factor` (0..1) of the full learning rates, then clear the gradients."""
        for part, lr in zip(self.parts, self.base, strict=True):
            for group in part.param_groups:
                group["lr"] = lr * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state) -> None:
        for part, s in zip(self.parts, state, strict=True):
            part.load_state_dict(s)
