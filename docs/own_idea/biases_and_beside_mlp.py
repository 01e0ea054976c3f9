"""Two ideas that the paper does not have: ST-Adapters with the biases unfrozen, and adapters beside the MLP.

`with_biases` is a strategy of our own: what is trained besides the adapters and the head changes. `beside_mlp` is a
placement of our own: the adapter's branch reads what the MLP reads, and both are added to the tokens.

Expected: not known beforehand.

Cost: embedded, 3 arms x 2 seeds: a few minutes on 2 CPU cores.

    python docs/own_idea/biases_and_beside_mlp.py
"""

from typing import Any

from torch import Tensor

from stadapter.ablation import Arm, main
from stadapter.backbone.vit import ViT
from stadapter.config import ConfigError, Recipe
from stadapter.model.build import classifier
from stadapter.model.classifier import Triple, VideoClassifier
from stadapter.model.custom import custom_model


def with_biases(recipe: Recipe, vit: ViT, mean: Triple, std: Triple) -> VideoClassifier:
    """The recipe's model, with the biases of the backbone trained as well."""
    model = classifier(recipe, vit, mean, std)
    for name, parameter in model.vit.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    return model


class BesideMlp(VideoClassifier):
    """The adapters of `after_mhsa`, moved beside the MLP. M = B * T images, S = 1 + N tokens, D width."""

    def block(self, index: int, x_MSD: Tensor, num_frames: int, cls_only: bool) -> Tensor:
        """One block: tokens [M, S, D] in and out, or [M, 1, D] out where only CLS is read behind it."""
        vit_block = self.vit.blocks[index]
        x_MSD = x_MSD[:, : 1 if cls_only else None] + vit_block.attend(x_MSD, cls_only)
        if cls_only or str(index) not in self.after:  # the adapter does not touch CLS
            return x_MSD + vit_block.mlp(x_MSD)
        return self.after[str(index)](x_MSD, num_frames, onto_MSD=x_MSD + vit_block.mlp(x_MSD))


def beside_mlp(recipe: Recipe, vit: ViT, mean: Triple, std: Triple) -> VideoClassifier:
    """The recipe's model with its adapters beside the MLP."""
    return classifier(recipe, vit, mean, std, BesideMlp)


ARMS: dict[str, dict[str, Any]] = {
    "st_adapter": {},
    "with_biases": custom_model(with_biases) | {"optim.backbone_lr_factor": 0.5},
    "beside_mlp": custom_model(beside_mlp) | {"adapter.placement": "after_mhsa"},
}


def make_arm(recipe: Recipe, value: str) -> Arm:
    if value not in ARMS:
        raise ConfigError(f"--values {value}: must be one of {', '.join(ARMS)}")
    return Arm(value, ARMS[value])


if __name__ == "__main__":
    main(__doc__, name="own_ideas", values=tuple(ARMS), make_arm=make_arm)
