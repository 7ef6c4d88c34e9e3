"""Advantages of each turn by itself: credit for what the turn did, not for how the episode ended alone.

A turn's rewards are those that tools, environments and graders gave it, and penalties that were charged to it; the rest
of the reward, the outcome, comes at the last turn. Without any, the estimators by turn still tell turns apart where a
baseline does: by the state in which the turn began, or by its number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from trainer.config.advantages import GigpoConfig, MtGrpoConfig, TurnDiscountedConfig
from trainer.learning.advantages.base import Advantages, Attempt, Groups, normalised, returns_to_go, rewards_in_time
from trainer.learning.advantages.group import group_advantages

Place = tuple[int, int]
"""A rollout's place in its group, and the turn's in the rollout."""


def mt_grpo(groups: Groups, config: MtGrpoConfig) -> Advantages:
    """A_ik = (G_ik - mean_k) / (std_k + 1e-4), with G_ik = Σ_{j ≥ k} gamma^(j - k) r_ij and mean and std over the
    group's rollouts that have a turn k.

    Turn-level credit of MT-GRPO, Zeng et al. 2025, arXiv:2505.11821, for any number of turns. What a turn's return is
    compared with holds nothing that was earned before the turn. (P, G) attempts in, (P, G, T) out. A turn that one
    rollout of the group alone has, has nothing to be compared with: 0.
    """
    return [_by_key(group, {p: p[1] for p in _places(group)}, _returns(group, config.gamma)) for group in groups]


def gigpo(groups: Groups, config: GigpoConfig) -> Advantages:
    """A_ik = A_i + weight · (G_ik - mean_s) / (std_s + 1e-4), with A_i GRPO's of the episode and mean and std over all
    turns of the group that began in the state s of turn (i, k).

    GiGPO, Feng et al. 2025, arXiv:2505.10978. The anchor state is what the model was shown, token for token: without
    its own rollouts of another past, since the prompt holds the whole conversation. So the first turns of a group
    always share one, later ones where the same was said and answered. A state seen once adds nothing.
    """
    advantages: Advantages = []
    for group in groups:
        states = {(i, k): group[i].states_T[k] for i, k in _places(group)}
        by_state = _by_key(group, states, _returns(group, config.gamma))
        episode = group_advantages([a.reward for a in group], "grpo").advantages
        advantages.append(_sums(episode, by_state, config.weight))
    return advantages


def turn_discounted(groups: Groups, config: TurnDiscountedConfig) -> Advantages:
    """A_ik = A_i + weight · (D_ik - mean) / (std + 1e-4), with A_i GRPO's of the outcomes, D_ik the discounted sum of
    the rewards of turns k and later, and mean and std over all turns of the group.

    Outcome and process normalised apart and summed, as DeepSeekMath's process supervision does with gamma 1 (Shao et
    al. 2024, arXiv:2402.03300, section 4.1.3).
    """
    advantages: Advantages = []
    for group in groups:
        process = {
            (i, k): value
            for i, a in enumerate(group)
            if a.reward is not None
            for k, value in enumerate(returns_to_go(a.turn_rewards_T, config.gamma))
        }
        by_turn = _by_key(group, dict.fromkeys(process, 0), process)
        outcome = group_advantages([None if a.reward is None else a.outcome for a in group], "grpo").advantages
        advantages.append(_sums(outcome, by_turn, config.weight))
    return advantages


def _places(group: Sequence[Attempt]) -> list[Place]:
    return [(i, k) for i, a in enumerate(group) if a.reward is not None for k in range(len(a.turn_rewards_T))]


def _returns(group: Sequence[Attempt], gamma: float) -> dict[Place, float]:
    return {
        (i, k): value
        for i, a in enumerate(group)
        if a.reward is not None
        for k, value in enumerate(returns_to_go(rewards_in_time(a), gamma))
    }


def _by_key(
    group: Sequence[Attempt], keys: dict[Place, Hashable], values: dict[Place, float]
) -> list[tuple[float, ...] | None]:
    """The values normalised among those with the same key."""
    members: dict[Hashable, list[Place]] = defaultdict(list)
    for place, key in keys.items():
        members[key].append(place)
    found: dict[Place, float] = {}
    for places in members.values():
        found |= {p: x or 0.0 for p, x in zip(places, normalised([values[p] for p in places]), strict=True)}
    return [
        None if a.reward is None else tuple(found[i, k] for k in range(len(a.turn_rewards_T)))
        for i, a in enumerate(group)
    ]


def _sums(
    episode: Sequence[float | None], by_turn: Sequence[tuple[float, ...] | None], weight: float
) -> list[tuple[float, ...] | None]:
    return [
        None if whole is None or turns is None else tuple(whole + weight * x for x in turns)
        for whole, turns in zip(episode, by_turn, strict=True)
    ]
