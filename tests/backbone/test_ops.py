"""The custom autograd functions and the shortcuts of the last block, against their plain twins."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from stadapter.backbone import ops
from stadapter.backbone.vit import Block, ViT, VitShape, activate, attention, seed_weights
from stadapter.config import AdapterConfig, ConfigError
from stadapter.model.adapter import STAdapter
from stadapter.model.build import freeze
from stadapter.model.classifier import VideoClassifier
from stadapter.model.state import trainable_parameters
from stadapter.training import hardware

SHAPE = VitShape(32, 8, 32, 2, 4, 64, "quick_gelu")
T = 4


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that turns the custom autograd functions off for the rest of the test."""
    return lambda: monkeypatch.setattr(ops, "wanted", lambda *tensors: False)


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def results(function: Callable[..., Tensor], inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Return the output and all gradients."""
    out = function(*inputs)
    generator = torch.Generator().manual_seed(2)
    up = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [*inputs, *weights], up)]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for mine, plain in zip(got, expected, strict=True):
        assert mine.dtype == plain.dtype
        assert (mine - plain).abs().max() <= tolerance * plain.abs().max()


def kept(function: Callable[[], Tensor], own: nn.Module) -> int:
    """Return how many numbers the graph keeps, without those of parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in own.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()  # noqa: F841  # holds the graph while it is counted
    return sum(storages.values())


@pytest.mark.parametrize("kernel_size", [(1, 1, 1), (3, 1, 1), (5, 1, 1)])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("onto_other", [False, True])
@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 2e-2)])
def test_the_adapter_equals_its_plain_twin(kernel_size, activation, onto_other, half, tolerance, plain) -> None:
    adapter = seeded(STAdapter(32, 8, kernel_size, activation))
    x_MSD = torch.randn(2 * T, 17, 32, requires_grad=True)
    inputs = [x_MSD, torch.randn(2 * T, 17, 32, requires_grad=True)] if onto_other else [x_MSD]

    def run(x: Tensor, onto: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return adapter(x, T, onto)

    got = results(run, inputs, list(adapter.parameters()))
    plain()
    assert_close(got, results(run, inputs, list(adapter.parameters())), tolerance)


def test_the_adapter_keeps_its_input_and_its_bottleneck_alone() -> None:
    adapter = seeded(STAdapter(32, 8))
    x_MSD = torch.randn(2 * T, 17, 32, requires_grad=True)
    assert kept(lambda: adapter(x_MSD, T), adapter) == 2 * T * 17 * (32 + 8)


@pytest.mark.parametrize("kernel_size", [(3, 1, 1), (3, 3, 3)])
def test_a_second_backward_pass_through_a_retained_graph_adds_the_same_gradients(kernel_size) -> None:
    adapter = seeded(STAdapter(32, 8, kernel_size))
    out = adapter(torch.randn(T, 17, 32, requires_grad=True), T).square().sum()
    once, twice = (torch.autograd.grad(out, list(adapter.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_an_adapter_above_frozen_blocks_asks_for_no_gradient_of_its_input() -> None:
    adapter = seeded(STAdapter(32, 8))
    adapter(torch.randn(T, 17, 32), T).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_quick_gelu_equals_its_formula_and_keeps_one_tensor() -> None:
    x = torch.randn(50, 20, dtype=torch.float64, requires_grad=True)
    got = results(lambda x: activate(x, "quick_gelu"), [x], [])
    assert_close(got, results(lambda x: x * torch.sigmoid(1.702 * x), [x], []), 1e-12)
    assert kept(lambda: activate(x, "quick_gelu"), nn.Identity()) == x.numel()


def test_splitting_queries_keys_and_values_equals_its_plain_twin(plain) -> None:
    block = seeded(Block(SHAPE)).double()
    x_MSD = torch.randn(3, 17, 32, dtype=torch.float64, requires_grad=True)
    weights = [block.qkv.weight, block.qkv.bias, block.proj.weight]
    got = results(block.attend, [x_MSD], weights)
    plain()
    assert_close(got, results(block.attend, [x_MSD], weights), 1e-12)


@pytest.mark.parametrize("tokens", [26, 130])  # below and above the number from which PyTorch's kernel is used
def test_attention_equals_its_formula(tokens) -> None:
    q, k, v = (torch.randn(2, 4, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    got = results(attention, [q, k, v], [])
    assert_close(got, results(lambda q, k, v: (q @ k.mT / 8**0.5).softmax(-1) @ v, [q, k, v], []), 1e-12)
    single = [tensor.detach().float().requires_grad_() for tensor in (q, k, v)]
    for mine, expected in zip(results(attention, single, []), got, strict=True):
        assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_what_cls_gathers_equals_the_first_token_of_full_attention(qkv_bias) -> None:
    block = seeded(Block(VitShape(32, 8, 32, 2, 4, 64, qkv_bias=qkv_bias))).double()
    x_MSD = torch.randn(3, 17, 32, dtype=torch.float64, requires_grad=True)
    weights = [p for name, p in block.named_parameters() if name.startswith(("norm1", "qkv", "proj"))]
    got = results(lambda x: block.attend(x, cls_only=True), [x_MSD], weights)
    assert_close(got, results(lambda x: block.attend(x)[:, :1], [x_MSD], weights), 1e-12)


def small_model(depth: int = 2) -> VideoClassifier:
    vit = ViT(dataclasses.replace(SHAPE, depth=depth))
    seed_weights(vit, 0)
    model = VideoClassifier(vit, 5, AdapterConfig(8, (3, 1, 1)))
    freeze(model, "st_adapter", train_final_norm=False)
    return seeded(model)  # type: ignore[return-value]  # the same one


def gradients(model: VideoClassifier, pixels: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    logits = model(pixels)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in trainable_parameters(model).values() if p.grad is not None)]


def test_the_last_block_keeps_its_input_alone() -> None:
    model = small_model()
    pixels = torch.rand(1, T, 3, 32, 32)
    x_MSD = torch.randn(T, 17, 32, requires_grad=True)
    whole = kept(lambda: model.block(1, x_MSD, T, cls_only=True), model)
    assert kept(lambda: model(pixels), model) < kept(lambda: model.block(0, x_MSD, T, cls_only=False), model) + whole


@pytest.mark.parametrize("recompute", [False, True])
def test_computing_again_changes_no_gradient(recompute, monkeypatch) -> None:
    model, pixels = small_model(), torch.rand(2, T, 3, 32, 32)
    model.recompute = recompute
    got = gradients(model, pixels)
    monkeypatch.setattr("stadapter.model.classifier._recomputed", lambda function, x: function(x))
    for mine, expected in zip(got, gradients(model, pixels), strict=True):
        assert torch.equal(mine, expected)


def test_a_compiled_model_gives_the_same_logits_and_gradients() -> None:
    model, pixels = small_model(depth=1), torch.rand(2, T, 3, 32, 32)
    expected = gradients(model, pixels)
    model.compile()
    assert_close(gradients(model, pixels), expected, 1e-5)


def test_a_cpu_is_named_with_its_precision_and_no_setting_of_the_process_is_changed() -> None:
    before = torch.get_float32_matmul_precision()
    line = hardware.set_up(torch.device("cpu"), "float32")
    assert torch.get_float32_matmul_precision() == before
    assert line.startswith(hardware.cpu_name()) and "float32" in line and "\n" not in line


def test_a_gpu_without_bfloat16_is_refused_before_it_imitates_it(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(ConfigError, match="Tesla V100 has no bfloat16; use float16"):
        hardware.set_up(torch.device("cuda"), "bfloat16")
