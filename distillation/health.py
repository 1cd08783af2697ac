"""When a training has gone astray, by rules on its losses that can be said in words.

What a network is asked for, x0 or v, has about the spread of the data: a blind guess of it is wrong by one or two
spreads. So the mean distance between student and target, in spreads, tells what no training recovers from.
"""

import math
from collections.abc import Sequence

from .settings import Settings

# Student and target are farther apart than anything that a picture could be; a single step may be unlucky.
ASTRAY, IN_A_ROW = 10.0, 10
# No step is as unlucky as that.
LOST = 1000.0


class Diverged(FloatingPointError):
    """The weights lead nowhere any more; what is kept of the training is from before.

    kept: the last step that is kept and fit to go on from, 0 if there is none.
    """

    kept = 0


class Health:
    """spread: root mean square of the latents, as the network sees them."""

    def __init__(self, settings: Settings, spread: float) -> None:
        self.settings, self.spread = settings, max(spread, 1e-6)

    def distance(self, loss: float) -> float:
        """Mean distance of student and target in spreads: the loss is its mean, or for L2 the mean of its square."""
        return (loss if self.settings.huber_c is not None else math.sqrt(abs(loss))) / self.spread

    def sound(self, loss: float) -> bool:
        """Whether the weights that gave this loss are fit to go on from."""
        return math.isfinite(loss) and self.distance(loss) <= ASTRAY

    def check(self, step: int, losses: Sequence[float]) -> None:
        """losses: the latest up to this step, IN_A_ROW of them or more if there are as many.

        Raises Diverged after one that is no number or over LOST, or IN_A_ROW over ASTRAY.
        """
        last, latest = losses[-1], losses[-IN_A_ROW:]
        if not math.isfinite(last):
            what = f"the loss of step {step} is {last}"
        elif self.distance(last) > LOST:
            what = f"the loss of step {step} is {last:.4g}: what it is the mean of is over {LOST:g} times the data's spread"
        elif len(latest) == IN_A_ROW and not any(map(self.sound, latest)):
            what = (
                f"the losses of {IN_A_ROW} steps, up to step {step}, are at {last:.4g}: what they are the mean of is "
                f"over {ASTRAY:g} times the data's spread"
            )
        else:
            return
        more = ", or train in bf16 or fp32" if self.settings.scale_loss else ""
        raise Diverged(f"{what}. Lower learning_rate (now {self.settings.learning_rate:g}){more}.")
