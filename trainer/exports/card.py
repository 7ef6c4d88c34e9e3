"""The model card: what was trained on which data, by which grader, what it gave, and how to use it. Pure but for files.

Markdown with the front matter that model hubs read. Paths of the training machine are cut to their last part, secrets
are left out as in every file of a run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from envs.terminal import clean
from trainer.exports.commands import adapter_command, chat_arguments, merged_command
from trainer.exports.trained import Trained
from trainer.reports.comparison import Comparison
from trainer.reports.comparison_page import remarks
from trainer.reports.run_report import before_after_table, before_and_after
from trainer.reports.tables import escaped, facts, to_markdown
from trainer.runs.about import plain_config

if TYPE_CHECKING:
    from trainer.templates.chat import Chat

_KINDS = {"adapter": ("peft", "adapter"), "merged": ("transformers", "finetune"), "gguf": ("gguf", "quantized")}
"""Library and relation to the base, as hubs name them."""
_SECTIONS = ("world", "data", "grader", "penalties")


def model_card(trained: Trained, *, form: str, weights: str | None, chat: Chat, template: Path | None) -> str:
    """README.md of an artefact. `weights`: dtype or quantisation, where it is not the run's own."""
    config = _portable(plain_config(trained.config))
    shown = {key: config[key] for key in _SECTIONS if config.get(key) is not None}
    comparison = before_and_after(trained.run, until=trained.step)
    parts = [
        f"---\n{_yaml(_front_matter(trained, form))}---\n",
        f"# {escaped(trained.name)}\n",
        f"{escaped(str(config['model']['name']))}, trained on episodes with tools by reinforcement (agent-rft): "
        f"the policy after step {trained.step} of {trained.config.optim.num_steps}.\n",
        "## Before and after\n",
        _figures(comparison, trained.step),
        "## Data and grader\n",
        _fenced(_yaml(shown)),
        _files(trained.about),
        "## Training\n",
        "".join(f"- {name}: {escaped(value)}\n" for name, value in _facts(trained, form, weights)),
        f"<details><summary>The whole config</summary>\n\n{_fenced(_yaml(config))}\n</details>\n",
        "## Use\n",
        _use(trained, form, weights, chat, template),
    ]
    return clean("\n".join(filter(None, parts)))


def _front_matter(trained: Trained, form: str) -> dict[str, Any]:
    library, relation = _KINDS[form]
    # A hub refuses a base that it does not know by this name.
    base = {"base_model": trained.hub_id, "base_model_relation": relation} if trained.hub_id else {}
    tags = ["agent-rft", "reinforcement-learning", "tool-use", *(["lora"] if form == "adapter" else [])]
    return {**base, "library_name": library, "pipeline_tag": "text-generation", "tags": tags}


def _figures(comparison: Comparison | None, step: int) -> str:
    if comparison is None:
        return f"There is no evaluation on held-out tasks up to step {step}.\n"
    numbers = ", ".join(f"{len(e.rollouts)} ({e.name})" for e in comparison.evaluations)
    told = [f"{comparison.num_tasks} held-out tasks; graded rollouts of them: {numbers}.", *remarks(comparison)]
    return f"{to_markdown(replace(before_after_table(comparison), title=''))}\n" + "".join(
        f"- {escaped(note)}\n" for note in told
    )


def _files(about: Mapping[str, Any]) -> str:
    files = about.get("files")
    if not isinstance(files, Mapping) or not files:
        return ""
    rows = [(Path(str(name)).name, str(digest)) for name, digest in files.items()]
    return to_markdown(facts("files", rows, headers=("file", "SHA-256")))


def _facts(trained: Trained, form: str, weights: str | None) -> list[tuple[str, str]]:
    config, versions = trained.config, trained.about.get("versions")
    known = versions if isinstance(versions, Mapping) else {}
    weights = weights or ("float32" if form == "adapter" else trained.dtype)
    rows = [
        ("weights here", f"{form}, {weights}; the base was held in {trained.dtype}"),
        ("LoRA", f"rank {config.model.lora.r}, alpha {config.model.lora.alpha:g}"),
        ("loss", f"{config.loss.type}, learning rate {config.optim.learning_rate:g}"),
        ("rollouts of a step", f"{config.rollout.tasks_per_step} tasks × {config.rollout.group_size}"),
        ("seed", str(config.seed)),
        ("run", f"{trained.about['run_id']}, begun {trained.about.get('started', 'at an unknown time')}"),
        ("hardware", str(trained.about.get("hardware", "unknown"))),
        ("trained with", ", ".join(f"{name} {version}" for name, version in known.items())),
    ]
    return [(name, str(value)) for name, value in rows]


def _use(trained: Trained, form: str, weights: str | None, chat: Chat, template: Path | None) -> str:
    """Commands in which this folder is `.`."""
    here, base = Path(), Path(trained.hub_id or f"path/to/{Path(trained.config.model.name).name}")
    named = Path(template.name) if template else None
    arguments = chat_arguments(chat, named, trained.model_path, trained.config)
    if form == "adapter":
        rank = trained.config.model.lora.r
        command = adapter_command(base, here, dtype=trained.dtype, rank=rank, chat=arguments)
    elif form == "merged":
        command = merged_command(here, dtype=weights or trained.dtype, chat=arguments)
    else:
        return f"{_fenced('llama-server -m model.gguf --jinja')}The chat template of the training is in the file.\n"
    if "--model" in command:
        command = ["vllm", "serve", *command[command.index("--model") + 1 :]]
    return (
        f"{_fenced(shlex.join(command))}The training's prompts were rendered by this template, its turns read by these "
        "parsers.\n"
    )


def _portable(value: Any) -> Any:
    """Without the folders of the training machine."""
    if isinstance(value, dict):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_portable(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and re.match(r"(/|~/)[^\n]*$", value) else value


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _fenced(text: str) -> str:
    """As a block of code, whatever it holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}\n"
