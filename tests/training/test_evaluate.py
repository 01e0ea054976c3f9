"""Accuracies equal counts by hand, with several views and with unreadable clips."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stadapter.training.evaluate import evaluate
from stadapter.training.optim import summed_loss


class Scripted(nn.Module):
    """A model whose logits are the first pixels of its input, so that a test can choose them."""

    def forward(self, pixels_BTCHW: Tensor) -> Tensor:
        return pixels_BTCHW.flatten(1)[:, :6].float()


def batch(logits_BVK: list[list[list[float]]], labels: list[int], bad: list[bool] | None = None) -> dict[str, Tensor]:
    pixels = torch.zeros(len(labels), len(logits_BVK[0]), 1, 3, 2, 2)
    pixels.flatten(2)[:, :, :6] = torch.tensor(logits_BVK)
    return {"pixels": pixels, "label": torch.tensor(labels), "bad": torch.tensor(bad or [False] * len(labels))}


def run(*batches: dict[str, Tensor], **options: Any) -> dict[str, float]:
    return evaluate(Scripted(), batches, torch.device("cpu"), torch.float32, **options)  # type: ignore[arg-type]


def test_top1_and_top5_count_clips_across_batches_of_any_size() -> None:
    first = batch([[[9, 1, 2, 3, 4, 5]], [[9, 8, 7, 6, 5, 4]]], [0, 5])
    second = batch([[[9, 8, 7, 6, 5, 4]]], [4])
    result = run(first, second)
    assert result["top1"] == pytest.approx(100 / 3)
    assert result["top5"] == pytest.approx(200 / 3)


def test_views_are_averaged_after_softmax() -> None:
    # Summed logits would choose class 1 (10 against 9); averaged probabilities choose class 0.
    views = [[3.0, 0, 0, 0, 0, 0], [3.0, 0, 0, 0, 0, 0], [3.0, 10.0, 0, 0, 0, 0]]
    assert run(batch([views], [0]))["top1"] == 100
    probability = torch.tensor(views).softmax(1).mean(0)[0]
    assert run(batch([views], [0]))["loss"] == pytest.approx(-probability.log().item(), rel=1e-6)


def test_a_clip_that_could_not_be_read_is_wrong_and_reported() -> None:
    result = run(batch([[[9, 0, 0, 0, 0, 0]], [[9, 0, 0, 0, 0, 0]]], [0, 0], bad=[False, True]))
    assert (result["top1"], result["top5"], result["bad_clips"]) == (50, 50, 1)


def test_a_constant_output_earns_nothing() -> None:
    result = run(batch([[[1, 1, 1, 1, 1, 1]]], [0]), opposite_pairs=True)
    assert (result["top1"], result["top5"], result["direction_top1"]) == (0, 0, 0)


def test_an_output_that_is_no_number_earns_nothing() -> None:
    nan = float("nan")
    result = run(batch([[[nan] * 6]], [0]), batch([[[9, 0, 0, 0, 0, 0]]], [0]), opposite_pairs=True)
    assert (result["top1"], result["top5"], result["direction_top1"]) == (50, 50, 50)
    assert math.isnan(result["loss"])
    verb_and_noun = batch([[[nan, nan, 0, 0, 0, 0]]], [0]) | {"label": torch.tensor([[0, 0]])}
    result = run(verb_and_noun, label_groups=(2, 4))
    assert (result["top1"], result["verb_top1"]) == (0, 0)


def test_direction_compares_a_class_with_its_reversal_only() -> None:
    right_pair_wrong_class = batch([[[5, 4, 9, 0, 0, 0]], [[4, 5, 9, 0, 0, 0]]], [0, 0])
    result = run(right_pair_wrong_class, opposite_pairs=True)
    assert (result["top1"], result["direction_top1"]) == (0, 50)


def test_a_model_in_training_goes_on_in_training() -> None:
    model = Scripted().train()
    evaluate(model, [batch([[[1, 0, 0, 0, 0, 0]]], [0])], torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    assert model.training


def test_an_action_is_right_when_verb_and_noun_are() -> None:
    # Verbs are the first 2 classes, nouns the other 4.
    logits = [[5, 0, 9, 0, 0, 0], [5, 0, 0, 9, 0, 0], [0, 5, 9, 0, 0, 0], [0, 5, 0, 9, 0, 0]]
    given = batch([[row] for row in logits], [[0, 0]] * 4)  # type: ignore[arg-type,list-item]
    result = run(given, label_groups=(2, 4))
    assert (result["top1"], result["verb_top1"], result["noun_top1"]) == (25, 50, 50)


def test_an_action_of_the_top5_may_have_a_wrong_verb_first() -> None:
    # 2 x 4 actions by their product: the true one (verb 1, noun 0) is second in the first clip, seventh in the other.
    given = batch([[[1, 0, 9, 0, 0, 0]], [[9, 0, 0, 1, 2, 3]]], [[1, 0], [1, 1]])  # type: ignore[list-item]
    result = run(given, label_groups=(2, 4))
    assert (result["top1"], result["top5"]) == (0, 50)


def test_the_loss_of_two_heads_is_their_sum() -> None:
    logits = torch.tensor([3.0, 1, 0, 2, 5, 1])
    result = run(batch([[logits.tolist()]], [[1, 2]]), label_groups=(2, 4))  # type: ignore[list-item]
    expected = -logits[:2].log_softmax(0)[1] - logits[2:].log_softmax(0)[2]
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert summed_loss(logits[None], torch.tensor([[1, 2]]), (2, 4), 0.0).item() == pytest.approx(result["loss"])


def test_an_unreadable_clip_of_two_heads_is_wrong_in_all() -> None:
    given = batch([[[5, 0, 9, 0, 0, 0]]] * 2, [[0, 0]] * 2, bad=[False, True])  # type: ignore[list-item]
    result = run(given, label_groups=(2, 4))
    assert [result[name] for name in ("top1", "top5", "verb_top1", "noun_top1", "bad_clips")] == [50, 50, 50, 50, 1]
