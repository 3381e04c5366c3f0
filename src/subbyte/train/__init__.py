"""The training loop, from a configuration to a scored file."""

from subbyte.train.checkpoint import EpochRecord
from subbyte.train.evaluate import Evaluation, evaluate
from subbyte.train.loop import TrainResult, train
from subbyte.train.progress import Progress, console_progress
from subbyte.train.run import RunResult, run
from subbyte.train.settings import DataConfig, LoopConfig, ModelConfig, RunConfig

__all__ = [
    "DataConfig",
    "EpochRecord",
    "Evaluation",
    "LoopConfig",
    "ModelConfig",
    "Progress",
    "RunConfig",
    "RunResult",
    "TrainResult",
    "console_progress",
    "evaluate",
    "run",
    "train",
]
