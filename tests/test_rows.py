"""Rows that Hugging Face's `datasets` loads, as tasks, conversations and bad input. No hub is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from envs.errors import UserError
from envs.finance.config import FinanceConfig
from envs.finance.world import FinanceWorld, task_row
from envs.rows import DatasetSource, read_dataset
from trainer.config import RunConfig
from trainer.tasks import load_demonstrations, load_tasks

pytestmark = pytest.mark.usefixtures("offline_datasets")
WORLD = FinanceWorld(FinanceConfig(num_companies=8, num_train_tasks=6, num_eval_tasks=2))
ROWS = [{"messages": [{"role": "user", "content": f"How much is {i}?"}], "answer": str(i)} for i in range(3)]


def make_config(folder: Path, train: object, **more: object) -> RunConfig:
    data = {"train": train, "eval": train}
    return RunConfig.model_validate({"output_dir": folder, "grader": {"type": "numeric"}, "data": data} | more)


def saved(folder: Path, **splits: list[dict[str, Any]]) -> str:
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(folder)
    return str(folder)


def test_tasks_of_a_data_set_are_those_of_the_same_rows_in_a_file(tmp_path):
    rows = [task_row(t, WORLD.tools) for t in WORLD.tasks("train")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    of_file = load_tasks(make_config(tmp_path, str(tmp_path / "rows.jsonl")), WORLD, "train")
    folder = saved(tmp_path / "saved", train=rows)
    of_dataset = load_tasks(make_config(tmp_path, {"dataset": folder}), WORLD, "train")
    # Arrow gives each tool's schema the keys of all others; as nulls they must not reach the model.
    assert of_dataset == of_file and of_dataset[0].definitions


def test_a_folder_of_parquet_files_is_a_data_set_and_a_slice_of_it_a_split(tmp_path):
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows" / "train.parquet")
    source = {"dataset": str(tmp_path / "rows"), "split": "train[1:]"}
    tasks = load_tasks(make_config(tmp_path, source), WORLD, "train")
    assert [(t.task_id, t.item) for t in tasks] == [("row-1", ROWS[1]), ("row-2", ROWS[2])]


def test_demonstrations_may_be_a_data_set(tmp_path):
    rows = [{"messages": [*r["messages"], {"role": "assistant", "content": r["answer"]}]} for r in ROWS]
    config = make_config(
        tmp_path, {"dataset": "unused"}, warmstart={"data": {"dataset": saved(tmp_path / "saved", train=rows)}}
    )
    assert [d.messages[-1].content for d in load_demonstrations(config)] == ["0", "1", "2"]


def test_a_bad_row_of_a_data_set_is_named(tmp_path):
    folder = saved(tmp_path / "saved", valid=[*ROWS, {"messages": [{"role": "assistant", "content": "x"}]}])
    with pytest.raises(UserError, match=r"saved \(valid\), row 4: messages: the last message must be the user's"):
        load_tasks(make_config(tmp_path, {"dataset": folder, "split": "valid"}), WORLD, "train")
    dated = datasets.Dataset.from_list(ROWS).cast_column("answer", datasets.Value("binary"))
    dated.save_to_disk(tmp_path / "binary")
    with pytest.raises(UserError, match=r"row 1: .*bytes is not JSON serializable"):
        load_tasks(make_config(tmp_path, {"dataset": str(tmp_path / "binary")}), WORLD, "train")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"dataset": "SAVED", "split": "test"}, "no such split; it has train"),
        ({"dataset": "SAVED", "revision": "main"}, "neither name nor revision"),
        ({"dataset": "WHOLE", "split": "test"}, "without splits; leave split out"),
        ({"dataset": "FILES", "split": "test"}, "ValueError: Unknown split"),
        ({"dataset": "./none"}, "no such folder"),
        ({"dataset": "nobody/nothing"}, "nobody/nothing"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_named_with_the_reason(tmp_path, source, expected):
    saved(tmp_path / "SAVED", train=ROWS)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "WHOLE")
    (tmp_path / "FILES").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "FILES" / "train.parquet")
    if (tmp_path / source["dataset"]).is_dir():
        source = source | {"dataset": str(tmp_path / source["dataset"])}
    with pytest.raises(UserError, match=f"data.train .*{expected}") as caught:
        read_dataset(DatasetSource(**source), key="data.train")
    assert "\n" not in str(caught.value)
