"""Switches off, in Ultralytics' settings, what it logs by itself into other trackers than W&B."""

OWN_LOGGERS_OFF = """
from ultralytics import settings
others = ("clearml", "comet", "dvc", "mlflow", "neptune", "raytune", "tensorboard")
settings.update({name: False for name in others if name in settings} | {"sync": False})
"""

if __name__ == "__main__":
    exec(OWN_LOGGERS_OFF, {})
