"""The moving average against diffusers' EMAModel."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from stages.lib.training.ema import MovingAverage


def parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


@pytest.mark.parametrize("update_after_step", [0, 1, 7])
@pytest.mark.parametrize("power", [None, 2 / 3, 1.0])
def test_equals_diffusers_through_warm_up_and_beyond(power, update_after_step):
    live = parameters(0)
    average = MovingAverage(live, 0.8, power, update_after_step)
    # diffusers copies the weights for one update more than it is asked to wait.
    reference = EMAModel(
        live,
        decay=0.8,
        use_ema_warmup=power is not None,
        power=power or 0.0,
        update_after_step=update_after_step - 1,
    )
    for step in range(1, 51):
        with torch.no_grad():
            for parameter, moved in zip(live, parameters(step), strict=True):
                parameter.copy_(moved)
        average.update()
        reference.step(live)
        for mine, theirs in zip(average.average, reference.shadow_params, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=5e-7)
    assert reference.cur_decay_value == 0.8
    assert average.max_decay == 0.8


def test_the_average_is_a_copy_until_it_starts():
    live = parameters(0)
    average = MovingAverage(live, max_decay=0.9, update_after_step=2)
    for step in (1, 2, 3):
        with torch.no_grad():
            live[0].copy_(parameters(step)[0])
        average.update()
        assert torch.equal(average.average[0], live[0]) == (step <= 2)


def test_power_one_is_the_mean_of_all_weights():
    live = [torch.nn.Parameter(torch.zeros(1))]
    average = MovingAverage(live, max_decay=1.0, power=1.0)
    for step in range(1, 10):
        with torch.no_grad():
            live[0].fill_(step)
        average.update()
    torch.testing.assert_close(average.average[0], torch.tensor([sum(range(10)) / 10]))


def test_warm_up_in_numbers():
    live = [torch.nn.Parameter(torch.zeros(1))]
    average = MovingAverage(live, max_decay=0.5)
    with torch.no_grad():
        live[0].fill_(1.0)
    expected = 0.0
    for step in range(1, 12):
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
        torch.testing.assert_close(
            average.average[0].double(), torch.tensor([expected]).double(), rtol=1e-6, atol=0
        )


def test_applied_swaps_and_restores_even_after_an_error():
    live = parameters(0)
    average = MovingAverage(live, max_decay=0.9)
    with torch.no_grad():
        live[0].add_(1.0)
    kept, averaged = live[0].detach().clone(), average.average[0].clone()
    try:
        with average.applied():
            assert torch.equal(live[0], averaged)
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(live[0], kept)
    assert torch.equal(average.average[0], averaged)


def test_state_round_trip():
    average = MovingAverage(parameters(0), max_decay=0.9)
    average.update()
    other = MovingAverage(parameters(1), max_decay=0.9)
    other.load_state_dict(average.state_dict())
    assert other.num_updates == 1
    for mine, theirs in zip(average.average, other.average, strict=True):
        assert torch.equal(mine, theirs)
