"""What one global batch tells about the noise of the gradient."""

from __future__ import annotations

from tunewise.recipe import Value


class NoiseSums(Value):
    """Two unbiased estimates from one global batch (see `engine.noise`).

    Attributes:
        squared_norm: of the true gradient; may come out negative where noise is larger than it.
        variance: the trace of the gradients' covariance, of one supervised token.
    """

    squared_norm: float
    variance: float
