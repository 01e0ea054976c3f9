"""The old name of `stadapter.inference.mlflow_pyfunc`, which models logged to MLflow before the move still ask for."""

from stadapter.inference.mlflow_pyfunc import VideoModel, _load_pyfunc

__all__ = ["VideoModel", "_load_pyfunc"]
