"""Advantages of a step's rewards: what estimators are given and give, the estimators, and their register."""

from trainer.learning.advantages.base import STD_EPS as STD_EPS
from trainer.learning.advantages.base import Attempt as Attempt
from trainer.learning.advantages.group import group_advantages as group_advantages
from trainer.learning.advantages.registry import estimator_of as estimator_of
