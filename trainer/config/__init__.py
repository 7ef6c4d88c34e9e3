"""The run's configuration: YAML → validated objects. A file a room; loads neither torch nor vllm."""

from trainer.config.engines import EngineConfig as EngineConfig
from trainer.config.engines import Sleep as Sleep
from trainer.config.engines import publishes_merged as publishes_merged
from trainer.config.learning import CustomLossConfig as CustomLossConfig
from trainer.config.learning import LossConfig as LossConfig
from trainer.config.learning import LossSettings as LossSettings
from trainer.config.learning import OptimConfig as OptimConfig
from trainer.config.learning import WarmstartConfig as WarmstartConfig
from trainer.config.load import load_config as load_config
from trainer.config.load import read_sections as read_sections
from trainer.config.load import validate_config as validate_config
from trainer.config.model import Attention as Attention
from trainer.config.model import LoraConfig as LoraConfig
from trainer.config.model import ModelConfig as ModelConfig
from trainer.config.rollouts import Answer as Answer
from trainer.config.rollouts import RolloutConfig as RolloutConfig
from trainer.config.run import CheckpointConfig as CheckpointConfig
from trainer.config.run import RunConfig as RunConfig
from trainer.config.run import check_publish as check_publish
from trainer.config.run import depends_on_the_machine as depends_on_the_machine
from trainer.config.tasks import CurriculumConfig as CurriculumConfig
from trainer.config.tasks import DataConfig as DataConfig
from trainer.config.tasks import EvalConfig as EvalConfig
