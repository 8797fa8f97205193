"""The clock with a time of its own: no step is ever faster than the chip, whoever waits for whom."""

import pytest

from vlm_jax.clock import Clock


class Time:
    """Seconds that a test moves on."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def steps(time: Time, clock: Clock, device: float, data: float, count: int) -> None:
    """`count` turns of the loop: the host gets data, dispatches, and reads the result of the step before."""
    finished = time.now  # when the device is done with all that was dispatched
    pending = None
    for _ in range(count):
        clock.begin()
        with clock.phase("data"):
            time.now += data
        finished = max(finished, time.now) + device
        if pending is not None:
            was_ready = pending <= time.now
            time.now = max(time.now, pending)
            clock.step_done(was_ready)
        pending = finished


@pytest.mark.parametrize(("device", "data"), [(0.1, 0.01), (0.01, 0.1), (0.1, 0.1)])
def test_time_per_step_is_that_of_the_slower_side(device: float, data: float) -> None:
    time = Time()
    clock = Clock(time)
    steps(time, clock, device, data, 50)
    first = clock.summary()
    assert first["seconds_per_step"] == pytest.approx(max(device, data), rel=0.05)
    assert first["seconds_per_step"] >= max(device, data) * 0.999
    assert first["data_wait"] == pytest.approx(data / max(device, data), rel=0.05)


def test_a_result_read_late_does_not_make_the_next_step_fast() -> None:
    """The chip finished step 1 long before the host looked; step 2 must not seem to take no time."""
    time = Time()
    clock = Clock(time)
    clock.begin()
    clock.step_done(was_ready=False)  # the first step, which holds the compilation
    clock.begin()
    time.now += 5.0  # the host is held up; both the step in flight and the next one finish meanwhile
    clock.step_done(was_ready=True)
    clock.summary()
    clock.step_done(was_ready=True)
    assert clock.summary()["seconds_per_step"] >= 5.0


def test_evaluation_and_saving_are_no_part_of_a_step() -> None:
    time = Time()
    clock = Clock(time)
    steps(time, clock, 0.1, 0.0, 2)
    clock.summary()
    with clock.phase("evaluation"):
        time.now += 100
    steps(time, clock, 0.1, 0.0, 11)
    assert clock.summary()["seconds_per_step"] < 0.2


def test_the_first_step_has_no_rate() -> None:
    time = Time()
    clock = Clock(time)
    assert clock.first_step()
    time.now += 30
    clock.step_done(was_ready=False)
    assert not clock.first_step()
    assert clock.summary() == {}


def test_steps_of_two_phases_weigh_by_their_own_flops() -> None:
    """A dear step at the end of cheap ones must not make all of them dear."""
    time = Time()
    clock = Clock(time)
    clock.step_done(was_ready=False)
    for flops in (1.0, 1.0, 1.0, 5.0):
        time.now += 1
        clock.step_done(was_ready=False, flops=flops)
    assert clock.summary()["flops_per_step"] == 2.0
