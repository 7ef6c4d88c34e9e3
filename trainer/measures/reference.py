"""What every key of metrics.jsonl means: `python -m trainer.measures.reference` prints docs/metrics.md."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.measures.catalogue import CATALOGUE, COUNTS
from trainer.measures.masked import WHY_MASKED

OTHERS: dict[str, tuple[tuple[str, str], ...]] = {
    "of the rollouts, after `train/` or `eval/`": (
        *((f"masked_by/{kind}", f"rollouts {why}, where there are any") for kind, why in WHY_MASKED.items()),
        ("stop/REASON", "share of episodes that ended so"),
        ("part/NAME", "mean of a part of the reward: the grader's own score, then the penalties"),
        ("score/NAME", "mean score of a grader inside a `multi`"),
        ("grader_error/KIND", "errors of the grader per rollout"),
        ("judge_tokens/MODEL", "tokens that a judge read and wrote per rollout"),
        ("grader_latency_s", "seconds of grading per rollout"),
        ("watch/score", "mean score of the grader that only watches"),
        ("watch/divergence", "how much more the grader gives than the one that only watches"),
        ("tool/NAME/calls", "calls of a tool per rollout"),
        ("tool/NAME/errors", "calls of a tool that were answered with an error, per rollout"),
        ("tool/NAME/latency_s", "seconds per call"),
        ("tool/NAME/tokens", "tokens of the output per call"),
    ),
    "of the groups": (
        ("groups/tied_share", "share of groups without an advantage, their rewards being equal or masked"),
        ("groups/reward_std", "standard deviation of the rewards within a group, mean over groups with two or more"),
        ("groups/skipped", "groups without an advantage that were left out, where they are"),
        ("groups/replacements", "groups of fresh tasks that the step asked for besides, where tied ones are replaced"),
        ("groups/kl_in_reward", "divergence from the reference a token, where it is taken off the reward"),
        ("curriculum/tied_share", "share of the tasks seen so far that taught nothing when last seen"),
    ),
    "of rollouts that run ahead of the training (`overlap.max_staleness` above 0)": (
        ("staleness/mean", "updates that the policy has seen since it sampled a trained token"),
        ("staleness/max", "the most"),
        ("staleness/dropped", "rollouts not learned from, as a token was older than `overlap.max_staleness` steps"),
    ),
    "of the update, per trainable token where nothing else is said": (
        ("loss/num_tokens", "trainable tokens that took part, counted in each pass of `optim.num_epochs`"),
        ("loss/ratio", "policy to old policy"),
        ("loss/ratio_max", "the largest"),
        ("loss/clipped_low_share", "share of tokens clipped from below"),
        ("loss/clipped_high_share", "share of tokens clipped from above"),
        ("loss/dual_clipped_share", "share of tokens whose ratio `delta` bounds"),
        ("loss/ratio_capped_share", "share of tokens whose ratio is capped, under CISPO"),
        ("loss/kl_to_reference", "divergence from the reference, with a KL term"),
        ("loss/entropy", "of the policy, nats, where `loss.entropy` is given"),
        ("loss/entropy_coef", "weight of the bonus for entropy in the step; 0 above the floor"),
        ("loss/mismatch_kl", "divergence of the engine's log-probabilities from the trainer's"),
        ("loss/mismatch_abs", "their mean absolute difference in nats"),
        ("loss/mismatch_abs_max", "the largest"),
        ("loss/mismatch_ratio_p95", "95th percentile of the ratio trainer to sampler, to 1 %"),
        ("loss/mismatch_ratio_p99", "its 99th percentile"),
        ("loss/mismatch_kl/staleness_VERSIONS", "`loss/mismatch_kl` of the tokens sampled so many updates before"),
        ("loss/mismatch_abs/staleness_VERSIONS", "`loss/mismatch_abs` of them"),
        ("loss/num_tokens/staleness_VERSIONS", "of `loss/num_tokens`, where tokens differ in it"),
        ("loss/tis_weight", "weight by which the mismatch is corrected"),
        ("loss/tis_capped_share", "share of tokens whose weight was capped"),
        ("loss/mismatch_masked_share", "share of tokens that `loss.correction` masks out"),
        ("loss/effective_samples", "share of the tokens that the weighted ones are worth: (Σ w)² / (N Σ w²)"),
        ("loss/critic_loss", "the critic's clipped squared error, with `loss.advantage: gae`"),
        ("loss/critic_value", "its values"),
        ("loss/critic_return", "what they should have been"),
        ("loss/critic_error", "mean distance of the two"),
        ("loss/critic_grad_norm", "of its gradient before clipping, mean over updates"),
        ("loss/grad_norm", "norm of the gradient before clipping, mean over updates"),
        ("loss/learning_rate", "of the step"),
        ("loss/skipped_updates", "minibatches without a gradient for the policy; all while a critic warms up"),
    ),
    "of the proof that the engine runs the trained policy": (
        ("canary/mismatch", "mean absolute difference of log-probability between engine and trainer"),
        ("canary/applied_since_model", "how much of what training has changed the engine shows: 1 is all"),
        ("canary/applied_since_version", "the same of the last update"),
    ),
    "of the time": (
        ("time/LAP_s", "wall-clock seconds of a part of the step"),
        ("time/other_share", "share of the step outside rollouts and training"),
        ("time/waiting_for_rollouts_s", "with overlap: seconds that the trainer waited for the step's rollouts"),
        (
            "time/waiting_for_trainer_s",
            "with overlap: seconds in which nothing that was asked for was left to roll out",
        ),
        ("throughput/sampled_tokens_per_s", "generated tokens per second of rollouts; with overlap, of the step"),
        ("throughput/trained_tokens_per_s", "tokens of rows with an advantage per second of training"),
    ),
    "of memory, where there is a GPU": (
        ("memory/gpu_used_gib", "of the main process's GPU when the step is done, the engine's part included"),
        ("memory/trainer_peak_gib", "the most that the trainer has reserved on it until then"),
    ),
    "of servers and of the user's code, where there are any": (
        ("http/HOST/COUNT", "of calls of remote tools: requests, retries, failures, waiting"),
        ("http/close_failures", "rollouts that could not be closed at their server"),
        ("grader/NAME/COUNT", "the same of an endpoint grader"),
        ("user/COUNT", "the same of a simulated user"),
        ("judge/COUNT", "requests, retries, failures, tokens, cache hits, seconds per answer of the judge"),
        ("hung_threads", "calls of the user's code that do not come back"),
    ),
}
"""Under headings: a key, in which capitals stand for any name, and what it means. What a reward function logs has the
name that it is given there."""


def is_known(key: str) -> bool:
    """Whether a key of metrics.jsonl stands here."""
    name = re.sub(r"^(train|eval)/", "", key)
    patterns = [re.sub(r"[A-Z]{2,}", ".+", pattern) for rows in OTHERS.values() for pattern, _ in rows]
    known = {m.key for m in CATALOGUE if m.is_logged} | {c.key for c in COUNTS} | {"step"}
    return name in known or any(re.fullmatch(pattern, name) for pattern in patterns)


def page() -> str:
    """The whole of docs/metrics.md."""
    logged = [m for m in CATALOGUE if m.is_logged]
    parts = [
        "# The figures of a run",
        "",
        "A line of `metrics.jsonl` is a JSON object with its `step` and figures under the keys below: a line for each",
        "step, and one for each evaluation. This page is written by `python -m trainer.measures.reference`.",
        "",
        *_table("of a rollout, after `train/` or `eval/`: means over graded rollouts",
                [(m.key, m.unit, m.meaning or m.label) for m in logged], ("key", "unit", "what it is")),
        *_table("of all rollouts, after `train/` or `eval/`", [(c.key, c.meaning) for c in COUNTS]),
    ]  # fmt: skip
    for heading, rows in OTHERS.items():
        parts += _table(heading, rows)
    parts.append("What a reward function logs with `log_metric` stands under the name that it is given there.")
    return "\n".join(parts) + "\n"


def _table(heading: str, rows: Sequence[Sequence[str]], names: Sequence[str] = ("key", "what it is")) -> list[str]:
    lines = [f"| {' | '.join([f'`{key}`', *rest])} |" for key, *rest in rows]
    return [f"## Figures {heading}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|", *lines, ""]


if __name__ == "__main__":
    print(page(), end="")
