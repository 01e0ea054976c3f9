"""The old name of `stadapter.inference.mlflow_pyfunc`. Models that were logged to MLflow under it load through it."""

from stadapter.inference.mlflow_pyfunc import VideoModel, _load_pyfunc

__all__ = ["VideoModel", "_load_pyfunc"]
