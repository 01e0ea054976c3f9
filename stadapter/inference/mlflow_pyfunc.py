"""The form in which MLflow loads a trial's model: from paths of videos to their most probable classes.

    model = mlflow.pyfunc.load_model("runs:/<run id>/model")
    model.predict(["clip.mp4"], params={"top": 3})    # a DataFrame: video, rank, class, probability

MLflow imports this module by its name in the model's MLmodel file, and hands it the safetensors file beside that. The
model contains no code, and nothing of it is unpickled.
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
    """The object that `load_model` wraps. MLflow decides the name and arguments of `predict`."""

    def __init__(self, file: Path, weights_file: Path | None, device: str) -> None:
        self.model, self.recipe, self.header = open_trained(file, weights_file=weights_file)
        self.device = torch.device(device)

    def predict(self, videos: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        """Return the most probable classes of the videos whose paths are the first column.

        Each video gets `params["top"]` rows (5 unless given): video, rank, class, probability. With a verb and a noun
        head, each head has as many, the verbs first. Raises ConfigError about the first video that cannot be read.
        """
        import pandas as pd  # here, so that importing this module does not load it

        lines = []
        for video, found in predict(self.model, self.recipe, list(videos.iloc[:, 0]), device=self.device):
            if isinstance(found, str):
                raise ConfigError(found)
            for best in top_classes(found, self.recipe.data, self.header.class_names, params["top"]):
                lines += [(video, rank, name, probability) for rank, (name, probability) in enumerate(best, start=1)]
        return pd.DataFrame(lines, columns=["video", "rank", "class", "probability"])


def _load_pyfunc(file: str, config: dict[str, Any] | None = None) -> VideoModel:
    """Return the model that MLflow loads from `file`.

    `config` is load_model's `model_config`: `weights_file` of the backbone, and `device`.
    """
    given = config or {}
    weights = given.get("weights_file")
    device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    return VideoModel(Path(file), Path(weights) if weights else None, device)
