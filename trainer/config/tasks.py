"""Settings of which tasks a run trains on, in which order, and which are held out."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from envs.reading.rows import FileOrDataset
from envs.settings import Settings


class DataConfig(Settings):
    """Tasks as rows in the hosted format; without this section the world's own tasks are used."""

    train: FileOrDataset = Field(description="training rows: a JSONL file, or a data set (see `envs.reading.rows`)")
    eval: FileOrDataset = Field(description="held-out rows, likewise")


class CurriculumConfig(Settings):
    """Tasks by measured difficulty: those whose rewards do not vary come rarely (see `trainer.tasks.difficulty`)."""

    preflight: Path | None = Field(None, description="preflight.json with what is known of the tasks beforehand")
    floor: float = Field(0.1, gt=0, le=1, description="how often a tied task comes, as a share of the others")
    min_rollouts: int = Field(4, ge=2, description="graded rollouts that it takes to call a task tied")


class EvalConfig(Settings):
    """Held-out evaluation."""

    every_steps: int = Field(0, ge=0, description="steps between evaluations; 0: before and after training only")
    num_tasks: int = Field(32, ge=1, description="held-out tasks, the first of the eval split")
    samples_per_task: int = Field(2, ge=1, description="rollouts of each")
    temperature: float = Field(1.0, ge=0, description="0 is greedy")
