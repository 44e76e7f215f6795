"""The models of a run that is evaluated: its own, its reward model, the one that it began from."""

import dataclasses
import functools
from collections.abc import Iterator

from tulu_jax import trained
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode import decoder as decoder_lib
from tulu_jax.evals import measures
from tulu_jax.recipe import TrainConfig
from tulu_jax.serving import best_of as best_of_lib
from tulu_jax.serving import engine as engine_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunModels:
    """Those of the run `config` at `step` (None: what training starts from), each loaded when it is
    first needed.

    `reward_from` is a reward model, a workdir or a Hugging Face folder, that measures each answer
    (`measures.REWARD`); with `best_of` it chooses each of so many. `is_drawn` says that answers are
    drawn at temperature 1: then `measures.KL` is measured too.
    """

    config: TrainConfig
    step: int | None
    tokenizer: chat_lib.ChatTokenizer
    slots: int
    reward_from: str | None = None
    best_of: int | None = None
    is_drawn: bool = False

    def problems(self) -> Iterator[str]:
        """Why the reward model cannot score the answers of the run; nothing is loaded."""
        if self.reward_from is not None:
            yield from trained.reward_problems(self.config, self.reward_from)

    def engine(self) -> engine_lib.Engine:
        """What answers."""
        if self.best_of is None:
            return self._policy
        return best_of_lib.BestOfEngine(self._policy, self._reward.of_ids, self.best_of)

    def measures(self) -> dict[str, measures.Measure]:
        """What is measured of answers. The KL divergence is that of a run of preferences from its
        start, or of the best of n its budget, which holds for every answer alike."""
        found: dict[str, measures.Measure] = {}
        if self.reward_from is not None:
            found[measures.REWARD] = lambda rows: self._reward.of_ids([p + a for p, a in rows])
        if self.best_of is not None:
            budget = best_of_lib.kl_budget(self.best_of)
            found[measures.KL] = lambda rows: [budget] * len(rows)
        elif self.is_drawn and self.config.objective.kind == "preference" and self.step is not None:
            found[measures.KL] = lambda rows: measures.log_ratio(self._policy, self._start)(rows)
        return found

    @functools.cached_property
    def _policy(self) -> engine_lib.OwnEngine:
        return self._engine_at(self.step)

    @functools.cached_property
    def _start(self) -> engine_lib.OwnEngine:
        return self._engine_at(None)

    @functools.cached_property
    def _reward(self) -> trained.RewardModel:
        return trained.reward_model(self.config, self.reward_from)

    def _engine_at(self, step: int | None) -> engine_lib.OwnEngine:
        config = self.config
        model = trained.Generator(config, step=step, initial=step is None, max_new_tokens=1)
        decoder = decoder_lib.Decoder(
            config.model, config.execution, slots=self.slots, page=model.decoder.page
        )
        return engine_lib.OwnEngine(decoder, model.params, self.tokenizer, mesh=model.mesh)
