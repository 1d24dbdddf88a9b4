"""The moving average against diffusers' EMAModel."""

import torch
from diffusers.training_utils import EMAModel

from stages.lib.ema import MovingAverage


def parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def test_equals_diffusers_through_warm_up_and_beyond():
    live = parameters(0)
    average = MovingAverage(live, max_decay=0.9)
    # diffusers counts the first update as step 0 of its warm-up and copies the weights there.
    reference = EMAModel(live, decay=0.9)
    reference.optimization_step = 1
    for step in range(1, 40):
        with torch.no_grad():
            for parameter, moved in zip(live, parameters(step), strict=True):
                parameter.copy_(moved)
        average.update()
        reference.step(live)
    assert average.max_decay == 0.9
    for mine, theirs in zip(average.average, reference.shadow_params, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


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
