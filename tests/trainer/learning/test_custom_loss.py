"""`loss: {type: custom}`: a loss that a user brings, tried before the run and trained by as the trainer's own are."""

from __future__ import annotations

import datetime
import traceback
from pathlib import Path

import pytest
import torch

from envs.errors import FoundLate, UserError
from envs.finance.world import FinanceWorld
from envs.reading.json_text import read_strict_json
from tests.support.configs import scripted_config
from tests.support.policy_worker import random_samples, save_tiny_llama, tiny_policy
from tests.support.scripted_engine import engine_starter, finance_script
from trainer.config import CustomLossConfig, LossConfig, RunConfig
from trainer.config.learning import LOSS_SETTINGS, LossSettings
from trainer.learning.losses.registry import LOSSES, check_loss, forgotten, loss_of
from trainer.prepare import prepare
from trainer.runs.files import read_lines
from trainer.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

REINFORCE = """
import torch

def reinforce(inputs):
    weight = (inputs.logprobs_N.detach() - inputs.sampler_logprobs_N).exp().clamp(max=2.0)
    loss = -(weight * inputs.logprobs_N * inputs.advantages_N * inputs.weights_N).sum()
    return loss, {"mine": weight.sum(), "mine_max": weight.max()}

class Scaled:
    def __init__(self, by=1.0):
        self.by, self.calls = by, 0
    def __call__(self, inputs):
        self.calls += 1
        loss, metrics = reinforce(inputs)
        return self.by * loss, metrics | {"calls": self.calls * inputs.logprobs_N.numel()}

def of_rows(inputs):
    rows = torch.zeros(int(inputs.row_of_N.max()) + 1).index_add(0, inputs.row_of_N, inputs.logprobs_N)
    return -(rows[inputs.row_of_N] * inputs.advantages_N * inputs.weights_N).sum()

def needs_reference(inputs):
    return (inputs.logprobs_N - inputs.ref_logprobs_N).square().sum(), {}

def needs_correction(inputs): return (inputs.correction_N * inputs.logprobs_N).sum()
def two(inputs, other): return inputs.logprobs_N.sum()
def no_gradient(inputs): return inputs.logprobs_N.detach().sum()
def with_axes(inputs): return -inputs.logprobs_N
def a_list(inputs): return inputs.logprobs_N.sum(), [1.0]
def a_row_of_figures(inputs): return inputs.logprobs_N.sum(), {"mine": inputs.logprobs_N}
def our_name(inputs): return inputs.logprobs_N.sum(), {"num_tokens": 4}
def our_other_name(inputs): return inputs.logprobs_N.sum(), {"grad_norm": 4}
def our_kind_of_name(inputs): return inputs.logprobs_N.sum(), {"ratio_histogram": 4}
def critics_name(inputs): return inputs.logprobs_N.sum(), {"critic_loss": 4}
class Module(torch.nn.Module):
    def forward(self, inputs): return inputs.logprobs_N.sum()
class Dated:
    def __init__(self, since, by): self.since, self.by = since, by
    def __call__(self, inputs): return inputs.logprobs_N.sum(), {"year": self.since.year, "by/two": self.by[2]}
def fails(inputs): return inputs.logprob
def exits(inputs): raise SystemExit(0)
def foreign(inputs): return torch.zeros((), requires_grad=True) * 1.0
def is_nan(inputs): return inputs.logprobs_N.sum() * float("nan")
def nan_metric(inputs): return inputs.logprobs_N.sum(), {"mine": float("inf")}
def four(inputs): return (inputs.logprobs_N * torch.ones(4)).sum()
def in_place(inputs):
    inputs.advantages_N.mul_(2)
    return (inputs.logprobs_N * inputs.advantages_N).sum()
class Later:
    def __init__(self, how): self.how, self.calls = how, 0
    def __call__(self, inputs):
        self.calls += 1
        loss = -(inputs.logprobs_N * inputs.advantages_N * inputs.weights_N).sum()
        if self.calls <= 2:
            return loss
        if self.how == "raises": raise KeyError("gold")
        if self.how == "exits": raise SystemExit(0)
        if self.how == "figure": return loss, {"mine": float("inf")}
        return {"nan": loss * float("nan"), "text": "loss", "axes": loss[None]}[self.how]
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_loss.py"
    path.write_text(REINFORCE)
    return path


def custom(file: Path, name: str, **settings: object) -> CustomLossConfig:
    return CustomLossConfig(type="custom", target=f"{file}:{name}", **settings)


def adapters_after(model: Path, *losses: LossSettings) -> list[dict[str, torch.Tensor]]:
    adapters = []
    for loss in losses:
        policy = tiny_policy(model, max_microbatch_tokens=64)
        for seed in range(2):
            policy.update(random_samples(seed=seed), loss, temperature=1.0, constant_tokens=64)
        adapters.append(policy.state_dict()["adapter"])
    return adapters


def test_the_users_reinforce_moves_the_adapter_as_the_clipped_loss_does_on_policy(tmp_path, file):
    """With one update a step the ratio is 1, so that the two have the same gradient."""
    model = save_tiny_llama(tmp_path / "model")
    ours, theirs, other = adapters_after(
        model, LossConfig(), custom(file, "reinforce"), custom(file, "Scaled", kwargs={"by": -1.0})
    )
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(ours[name], other[name], atol=1e-3) for name in ours)


def test_its_figures_stand_beside_ours_and_it_is_made_once(tmp_path, file):
    policy = tiny_policy(save_tiny_llama(tmp_path / "model"))
    loss = custom(file, "Scaled", kwargs={"by": 0.5})
    calls = []
    for seed in range(2):
        metrics = policy.update(random_samples(seed=seed), loss, temperature=1.0, constant_tokens=64).metrics
        assert metrics["mismatch_abs"] > 0 and 0 < metrics["mine"] <= metrics["mine_max"] <= 2.0
        calls.append(metrics["calls"])
    assert calls == [1, 2]


def test_no_run_learns_from_its_trial_or_from_another_run(tmp_path, file):
    loss = custom(file, "Scaled", kwargs={"by": 0.5})
    check_loss(loss)
    for _ in range(2):
        policy = tiny_policy(save_tiny_llama(tmp_path / "model"))
        assert policy.update(random_samples(), loss, temperature=1.0, constant_tokens=64).metrics["calls"] == 1


def test_its_kwargs_are_given_as_the_config_has_them(tmp_path, file):
    policy = tiny_policy(save_tiny_llama(tmp_path / "model"))
    loss = custom(file, "Dated", kwargs={"since": datetime.date(2024, 1, 31), "by": {2: 3.0, "two": 4.0}})
    metrics = policy.update(random_samples(), loss, temperature=1.0, constant_tokens=64).metrics
    assert metrics["year"] > 0 and metrics["by/two"] == pytest.approx(metrics["year"] * 3 / 2024)


def test_a_loss_of_rows_knows_which_token_is_of_which_row(tmp_path, file):
    policy = tiny_policy(save_tiny_llama(tmp_path / "model"), max_microbatch_tokens=512)
    samples = [s for s in random_samples() if s.advantage]
    [work, *_] = policy._work(samples, LossConfig(), 1.0, 64, needs_old=False)
    assert work.row_of_N.tolist() == [i for i, row in enumerate(work.rows) for _ in range(row.num_trainable)]
    before = policy.state_dict()["adapter"]
    policy.update(samples, custom(file, "of_rows"), temperature=1.0, constant_tokens=64)
    assert any(not torch.equal(before[name], after) for name, after in policy.state_dict()["adapter"].items())


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("nothing", {}, r"my_loss\.py has no 'nothing'"),
        ("number", {}, "expected a function of one argument, a LossInputs; got int"),
        ("two", {}, "got one that takes inputs, other"),
        ("Scaled", {"kwargs": {"times": 2}}, "kwargs: got an unexpected keyword argument 'times'"),
        ("no_gradient", {}, r"with a gradient to logprobs_N; got one of shape \(\) without a gradient"),
        ("with_axes", {}, r"without axes, .* got one of shape \(4,\)"),
        ("a_list", {}, "expected a dict of sums over tokens for metrics; got list"),
        ("a_row_of_figures", {}, r"metrics: 'mine': expected a sum over tokens, one number; got one of shape \(4,\)"),
        ("our_name", {}, "metrics: 'num_tokens' is a name of the trainer's own"),
        ("our_other_name", {}, "metrics: 'grad_norm' is a name of the trainer's own"),
        ("our_kind_of_name", {}, "metrics: 'ratio_histogram' is a name of the trainer's own"),
        ("critics_name", {"advantage": "gae"}, "metrics: 'critic_loss' is a name of the trainer's own"),
        ("fails", {}, r"raised AttributeError: .*my_loss\.py, line \d+"),
        ("needs_reference", {}, r"raised TypeError: .*, line \d+\); inputs.ref_logprobs_N is None unless loss.kl_coef"),
        ("needs_correction", {}, r"; inputs.correction_N is None unless loss.tis_cap is set"),
        ("needs_correction", {"kl_coef": 0.1}, r"line \d+\); inputs.correction_N is None unless loss.tis_cap is set$"),
        ("exits", {}, "raised SystemExit"),
        ("foreign", {}, "has no gradient to logprobs_N"),
        ("is_nan", {}, "the loss is nan"),
        ("nan_metric", {}, "mine is inf"),
        ("four", {}, "raised RuntimeError"),
        ("in_place", {}, "changes advantages_N in place"),
    ],
)
def test_what_is_wrong_with_it_is_told_before_a_model_is_loaded(tmp_path, tiny_model, file, name, settings, told):
    loss = {"type": "custom", "target": f"{file}:{name}", **settings}
    config = RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model, loss=loss))
    with pytest.raises(UserError, match=rf"^loss\.target '.*my_loss\.py:{name}': .*{told}"):
        prepare(config)
    assert not (tmp_path / "run").exists()


def test_what_an_object_forgets_when_a_run_goes_on_is_said_and_a_function_forgets_nothing(file):
    [told] = forgotten(custom(file, "Scaled", kwargs={"by": 0.5}))
    assert "my_loss.py:Scaled': is made anew; what it has kept of the updates before is in no checkpoint" in told
    assert forgotten(custom(file, "reinforce")) == [] == forgotten(LossConfig())


def test_with_a_kl_term_it_gets_the_reference(file):
    check_loss(custom(file, "needs_reference", kl_coef=0.1))


def test_a_module_of_torch_is_a_loss_too(file):
    check_loss(custom(file, "Module"))


def test_a_run_trains_by_it(tmp_path, tiny_model, file):
    loss = {"type": "custom", "target": f"{file}:reinforce", "advantage": "dr_grpo"}
    config = RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model, loss=loss, optim={"num_steps": 1}))
    train(config, start_engine=engine_starter(finance_script(FinanceWorld(config.world))))
    [step] = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss/num_tokens" in line]
    assert step["loss/mine"] > 0 and step["loss/grad_norm"] > 0 and "loss/ratio" not in step


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("nan", "the loss is nan on a microbatch of"),
        ("text", "expected a tensor without axes, .* got str"),
        ("axes", r"expected a tensor without axes, .* shape \(1,\)"),
    ],
)
def test_what_only_the_run_shows_of_it_ends_with_exit_code_1(tmp_path, tiny_model, file, how, told):
    """Code 2 says that nothing was loaded."""
    loss = {"type": "custom", "target": f"{file}:Later", "kwargs": {"how": how}}
    config = RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model, loss=loss, optim={"num_steps": 4}))
    with pytest.raises(FoundLate, match=rf"^loss\.target '.*my_loss\.py:Later': {told}") as caught:
        train(config, start_engine=engine_starter(finance_script(FinanceWorld(config.world))))
    assert caught.value.exit_code == 1 and UserError.exit_code == 2
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] >= 1


def test_a_figure_of_it_that_is_no_finite_number_is_null_and_said_aloud(tmp_path, tiny_model, file):
    loss = {"type": "custom", "target": f"{file}:Later", "kwargs": {"how": "figure"}}
    config = RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model, loss=loss, optim={"num_steps": 3}))
    train(config, start_engine=engine_starter(finance_script(FinanceWorld(config.world))))
    lines = [read_strict_json(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1 if "loss/mine" in lines[-1] else -2]["loss/mine"] is None
    assert "null in metrics.jsonl: loss/mine" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize(("how", "error"), [("raises", KeyError), ("exits", RuntimeError)])
def test_what_it_raises_in_the_run_names_it(tmp_path, file, how, error):
    policy, loss = tiny_policy(save_tiny_llama(tmp_path / "model")), custom(file, "Later", kwargs={"how": how})
    with pytest.raises(error) as caught:
        for seed in range(3):
            policy.update(random_samples(seed=seed), loss, temperature=1.0, constant_tokens=64)
    assert "my_loss.py:Later" in "".join(traceback.format_exception_only(caught.value))


def test_every_loss_of_the_register_is_a_type_of_the_config():
    assert {*LOSSES, "custom"} == {*LOSS_SETTINGS}
    for name in LOSSES:
        config = RunConfig.model_validate({"output_dir": "x", "grader": {"type": "numeric"}, "loss": {"type": name}})
        assert type(config.loss) is LOSS_SETTINGS[name] and callable(loss_of(config.loss))
