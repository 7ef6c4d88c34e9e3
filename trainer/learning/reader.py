"""The model read at the trainable tokens of a microbatch: hidden states, log-probabilities, entropies.

Shape suffixes: T positions of a microbatch, H hidden size, N trainable tokens of it, U different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.learning import adapter as lora
from trainer.learning.head import token_logprobs, token_logprobs_and_entropy
from trainer.learning.packing.padded import pack_padded
from trainer.learning.packing.rows import FixedRow, Microbatch
from trainer.templates.grammar import Grammar


class Reader:
    """A model under whichever adapter is at work. Keeps nothing of what it has read."""

    def __init__(self, model: Any, device: torch.device, grammar: Grammar | None) -> None:
        """Proves the model's head, see `adapter.read_head`. `grammar` is that of the run's answers."""
        self._model = model
        self._device = device
        self.grammar = grammar
        self.head = lora.read_head(model)

    def logprobs(self, microbatch: Microbatch, temperature: float, *, adapter: bool) -> Tensor:
        """(N,) log-probabilities of the microbatch's trainable tokens, with a gradient where grad mode is on."""
        if not adapter:
            with lora.as_adapter(self._model, None):
                return self.logprobs(microbatch, temperature, adapter=True)
        return self.of_tokens(microbatch, temperature, wants_entropy=False)[0]

    def of_tokens(
        self, microbatch: Microbatch, temperature: float, *, wants_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(N,) log-probabilities of the trainable tokens; where asked for, entropies of what they were chosen from."""
        microbatch = microbatch.to(self._device)
        hidden_TH = lora.hidden_states(self._model, microbatch).flatten(0, 1)
        positions, targets = microbatch.positions_N, microbatch.targets_N
        place_N: Tensor | None = None
        allowed_NW = self._allowed(microbatch)
        if microbatch.tree is not None and allowed_NW is None:
            # The same token behind the same ones goes through the head once.
            pairs_2U, place_N = torch.unique(torch.stack((positions, targets)), dim=1, return_inverse=True)
            positions, targets = pairs_2U
        of_tokens = (hidden_TH[positions], self.head, targets, temperature)
        entropy_N: Tensor | None = None
        if wants_entropy:
            logprobs_N, entropy_N = token_logprobs_and_entropy(*of_tokens, allowed_NW=allowed_NW)
        else:
            logprobs_N = token_logprobs(*of_tokens, allowed_NW=allowed_NW)
        if place_N is None:
            return logprobs_N, entropy_N
        return logprobs_N[place_N], None if entropy_N is None else entropy_N[place_N]

    def hidden(self, microbatch: Microbatch) -> Tensor:
        """(N, H) by the model as it is, at the positions before the trainable tokens."""
        microbatch = microbatch.to(self._device)
        return lora.hidden_states(self._model, microbatch).flatten(0, 1)[microbatch.positions_N]

    def _allowed(self, microbatch: Microbatch) -> Tensor | None:
        """(N, W) bits of the tokens that each was chosen from; None where nothing constrained the choice.

        Walked anew at each pass: the masks of a whole step would take more memory than the time is worth.
        """
        if not microbatch.constrained:
            return None
        assert self.grammar is not None, "constrained rows, but the run's config has no rollout.response_format"
        num_words = -(-len(self.head.weight_VH) // 32)
        allowed_NW = torch.full((len(microbatch.targets_N), num_words), -1, dtype=torch.int32)
        token_ids = microbatch.targets_N.tolist()
        for start, end in microbatch.constrained:
            self.grammar.fill(allowed_NW, start, token_ids[start:end])
        return allowed_NW.to(self._device)


def scores_of(model: Any, token_ids: Sequence[Sequence[int]]) -> list[float]:
    """Log-probabilities of every token but the first of each sequence, the sequences one after the other, on a CPU."""
    reader = Reader(model, torch.device("cpu"), None)
    with torch.no_grad():
        return [
            score
            for ids in token_ids
            for microbatch in pack_padded([FixedRow(token_ids=ids)], len(ids))
            for score in reader.logprobs(microbatch, 1.0, adapter=True).tolist()
        ]
