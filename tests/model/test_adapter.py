"""The ST-Adapter against the paper's equation."""

import pytest
import torch
import torch.nn.functional as F

from stadapter.model.adapter import STAdapter, depthwise


def randomised(adapter: STAdapter, seed: int = 0) -> STAdapter:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return adapter


def plain_adapter(adapter: STAdapter, x_MSD: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Return the adapter's output by the paper's equation, written plainly."""
    out = x_MSD.clone()
    M, S, _ = x_MSD.shape
    side = round((S - 1) ** 0.5)
    z = F.linear(x_MSD[:, 1:], adapter.down.weight, adapter.down.bias)
    z_BCTHW = z.reshape(M // num_frames, num_frames, side, side, -1).permute(0, 4, 1, 2, 3)
    padding = tuple(extent // 2 for extent in adapter.conv.weight.shape[2:])
    z_BCTHW = F.conv3d(z_BCTHW, adapter.conv.weight, adapter.conv.bias, padding=padding, groups=z_BCTHW.shape[1])
    if adapter.activation == "gelu":
        z_BCTHW = F.gelu(z_BCTHW)
    z = z_BCTHW.permute(0, 2, 3, 4, 1).reshape(M, S - 1, -1)
    out[:, 1:] += F.linear(z, adapter.up.weight, adapter.up.bias)
    return out


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_fresh_adapter_is_exactly_the_identity(activation) -> None:
    x_MSD = torch.randn(6, 10, 16)
    adapter = STAdapter(16, 8, (3, 3, 3), activation)
    assert torch.equal(adapter(x_MSD, num_frames=3), x_MSD)


def test_fresh_adapter_learns_first_through_its_convolution() -> None:
    adapter = STAdapter(16, 8)
    adapter(torch.randn(6, 10, 16), num_frames=3).square().sum().backward()
    assert adapter.conv.weight.grad.abs().sum() > 0


def test_cls_passes_untouched() -> None:
    x_MSD = torch.randn(6, 10, 16)
    out = randomised(STAdapter(16, 8))(x_MSD, num_frames=3)
    assert torch.equal(out[:, 0], x_MSD[:, 0])
    assert not torch.equal(out[:, 1:], x_MSD[:, 1:])


@pytest.mark.parametrize("kernel_size", [(1, 1, 1), (3, 1, 1), (7, 1, 1), (1, 3, 3), (3, 3, 3), (5, 3, 1), (9, 1, 3)])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_equals_the_naive_equation_in_values_and_gradients(kernel_size, activation) -> None:
    adapter = randomised(STAdapter(16, 8, kernel_size, activation)).double()
    x_MSD = torch.randn(2 * 4, 10, 16, dtype=torch.float64, requires_grad=True)
    target = torch.randn(8, 10, 16, dtype=torch.float64)
    tensors = [x_MSD, *adapter.parameters()]
    ours, plain = adapter(x_MSD, num_frames=4), plain_adapter(adapter, x_MSD, num_frames=4)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for got, expected in zip(
        torch.autograd.grad((ours * target).sum(), tensors),
        torch.autograd.grad((plain * target).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [(3, 1, 1), (3, 3, 3)])
def test_temporal_kernel_sees_neighbouring_frames_of_the_same_clip_only(kernel_size) -> None:
    adapter = randomised(STAdapter(16, 8, kernel_size))
    x_MSD = torch.randn(2 * 5, 10, 16)
    changed = x_MSD.clone()
    changed[4] += 1  # the last frame of the first clip
    difference = (adapter(changed, 5) - adapter(x_MSD, 5)).abs().amax(dim=(1, 2))
    assert (difference > 1e-4).nonzero().flatten().tolist() == [3, 4]


def test_single_frame_clips_work_with_a_temporal_kernel() -> None:
    adapter = randomised(STAdapter(16, 8, (3, 3, 3)))
    x_MSD = torch.randn(4, 10, 16)
    torch.testing.assert_close(adapter(x_MSD, 1), plain_adapter(adapter, x_MSD, 1))


@pytest.mark.parametrize("kernel_size", [(3, 1, 1), (3, 3, 3)])
def test_bfloat16_is_close_to_float32(kernel_size) -> None:
    adapter = randomised(STAdapter(16, 8, kernel_size))
    x_MSD = torch.randn(8, 10, 16)
    expected = adapter(x_MSD, 4)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = adapter(x_MSD, 4)
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, expected, rtol=0.05, atol=0.05)
    whole = adapter.bfloat16()(x_MSD.bfloat16(), 4)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(whole.float(), expected, rtol=0.05, atol=0.05)


def test_convolution_runs_in_float32_under_cpu_autocast() -> None:
    z_MNC, weight = torch.randn(8, 9, 8).bfloat16(), torch.randn(8, 1, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise(z_MNC, weight, None, 4)
    assert torch.equal(out, depthwise(z_MNC.float(), weight, None, 4).bfloat16())


def test_parameters_have_the_shapes_of_the_published_checkpoints() -> None:
    adapter = STAdapter(768, 384, (3, 1, 1))
    assert adapter.conv.weight.shape == (384, 1, 3, 1, 1)
    assert sum(p.numel() for p in adapter.parameters()) == 592_512


@pytest.mark.parametrize("arguments", [{"kernel_size": (2, 1, 1)}, {"activation": "relu"}])
def test_impossible_arguments_are_refused(arguments) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        STAdapter(16, 8, **arguments)


def test_an_adapter_whose_convolution_starts_at_random_is_not_the_identity() -> None:
    x_MSD = torch.randn(6, 10, 16)
    adapter = STAdapter(16, 8, zero_init_conv=False)
    out = adapter(x_MSD, num_frames=3)
    assert torch.equal(out[:, 0], x_MSD[:, 0])
    assert not torch.allclose(out[:, 1:], x_MSD[:, 1:], atol=1e-3)


@pytest.mark.parametrize("kernel_size", [(1, 1, 1), (3, 1, 1), (3, 3, 3)])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_cls_in_the_bottleneck_is_convolved_as_a_token_without_neighbours(kernel_size, activation) -> None:
    adapter = randomised(STAdapter(16, 8, kernel_size, activation, adapt_cls=True))
    x_MSD = torch.randn(6, 10, 16)
    out = adapter(x_MSD, num_frames=3)
    # The naive equation on clips of one frame with one patch, which is CLS.
    alone = torch.cat([torch.zeros(6, 1, 16), x_MSD[:, :1]], dim=1)
    torch.testing.assert_close(out[:, :1], plain_adapter(adapter, alone, num_frames=1)[:, 1:])
    torch.testing.assert_close(out[:, 1:], plain_adapter(adapter, x_MSD, num_frames=3)[:, 1:])
    torch.testing.assert_close(adapter(x_MSD[:, :1], num_frames=3), out[:, :1])  # CLS alone may come


@pytest.mark.parametrize("adapt_cls", [False, True])
def test_the_branch_can_be_added_to_other_tokens(adapt_cls) -> None:
    adapter = randomised(STAdapter(16, 8, (3, 3, 3), adapt_cls=adapt_cls))
    x_MSD, onto_MSD = torch.randn(6, 10, 16), torch.randn(6, 10, 16)
    expected = onto_MSD + (adapter(x_MSD, 3) - x_MSD)
    torch.testing.assert_close(adapter(x_MSD, 3, onto_MSD=onto_MSD), expected, rtol=1e-4, atol=1e-5)


def test_fresh_adapter_that_adapts_cls_is_exactly_the_identity() -> None:
    x_MSD = torch.randn(6, 10, 16)
    assert torch.equal(STAdapter(16, 8, (3, 3, 3), adapt_cls=True)(x_MSD, num_frames=3), x_MSD)
