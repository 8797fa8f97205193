"""The shortest time that a step can take by the chip's data sheet: compute, HBM, interconnect. Not a forecast: nothing
here knows how well the matrix unit is filled or how much communication is hidden.
"""

import dataclasses

ASSUMPTIONS = (
    "every product at the chip's bf16 peak (fp32 products of higher precision 3 or 6 times); HBM at its full "
    "bandwidth; all links of a chip busy; asynchronous communication hidden behind the longer of compute and HBM, "
    "synchronous communication not hidden at all; no other time between operations"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step on each device.

    Attributes:
        compute: of the matrix unit.
        memory: of HBM; weak, see `vlm_jax.plan.traffic`.
        asynchronous: of communication that can overlap.
        synchronous: of communication that can't.
    """

    compute: float
    memory: float
    asynchronous: float
    synchronous: float

    @property
    def interconnect(self) -> float:
        """Of all communication."""
        return self.asynchronous + self.synchronous

    @property
    def step(self) -> float:
        """The longest of the terms that overlap, and the communication that does not."""
        return max(self.compute, self.memory, self.asynchronous) + self.synchronous
