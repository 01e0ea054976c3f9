"""A trial's model as MLflow runs it: from paths of videos to their most probable classes.

    model = mlflow.pyfunc.load_model("runs:/<run id>/model")
    model.predict(["clip.mp4"], params={"top": 3})    # a DataFrame: video, rank, class, probability

MLflow finds this module by its name in the model's MLmodel file, and hands it the safetensors file beside that. No code
is in the model, and nothing of it is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stadapter.config import ConfigError
from stadapter.inference.predict import predict, top_classes
from stadapter.inference.trained import open_trained

if TYPE_CHECKING:
    import pandas as pd


class VideoModel:
    """What `load_model` wraps. The name and arguments of its method are MLflow's."""

    def __init__(self, file: Path, weights_file: Path | None, device: str) -> None:
        self.model, self.recipe, self.header = open_trained(file, weights_file=weights_file)
        self.device = torch.device(device)

    def predict(self, videos: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        """The first column are paths of videos; `params["top"]` (5 unless given) is how many classes each gets.

        With a verb and a noun head the verbs come first, each head with ranks of its own. ConfigError names the first
        video that cannot be read.
        """
        import pandas as pd

        lines = []
        for video, found in predict(self.model, self.recipe, list(videos.iloc[:, 0]), device=self.device):
            if isinstance(found, str):
                raise ConfigError(found)
            for best in top_classes(found, self.recipe.data, self.header.class_names, params["top"]):
                lines += [(video, rank, name, probability) for rank, (name, probability) in enumerate(best, start=1)]
        return pd.DataFrame(lines, columns=["video", "rank", "class", "probability"])


def _load_pyfunc(file: str, config: dict[str, Any] | None = None) -> VideoModel:
    """Called by MLflow. `config` is load_model's `model_config`: `weights_file` of the backbone, and `device`."""
    given = config or {}
    weights = given.get("weights_file")
    device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    return VideoModel(Path(file), Path(weights) if weights else None, device)
