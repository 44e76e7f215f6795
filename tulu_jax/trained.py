"""What a run trained: its parameters, its tokenizer, its replies or its scores."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tulu_jax import atomic, digests, validation
from tulu_jax import base as base_lib
from tulu_jax import step as step_lib
from tulu_jax.data import chat as chat_lib
from tulu_jax.data import tokenizer_files
from tulu_jax.decode import decoder as decoder_lib
from tulu_jax.decode import results as results_lib
from tulu_jax.decode.sampling import Sampling
from tulu_jax.interop import chat_template, sources
from tulu_jax.models import llama, paged_attention
from tulu_jax.models.config import SCORE
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding, slices
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import agreement
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import state as state_lib
from tulu_jax.training.state import Frozen

Messages = list[dict[str, str]]
KEPT_TOKENIZER = "tokenizer.json"  # in the workdir
FEWEST = 64  # positions of a row that is scored
_PROBE = [
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def saved_step(config: TrainConfig, step: int | None) -> int:
    """`step`, or the latest of the run. Raises `UsageError` if there is no such checkpoint."""
    return checkpoint_lib.Checkpoints(config.workdir).require(step)


def load(config: TrainConfig, *, step: int | None) -> tuple[jax.sharding.Mesh, llama.Params]:
    """A mesh of the devices that are here and on it the parameters of `step`, or with None those
    that training starts from. Raises `UsageError` if there is no such checkpoint, or if its adapter
    or its base is another than that of `config`."""
    mesh = _mesh_here(config)
    with jax.set_mesh(mesh):
        if step is None:
            base = base_lib.policy_params(config, mesh)
            if config.adapter_from is None:
                return mesh, base
            adapters = base_lib.initial_adapters(config, state_lib.fingerprint(base))
            return mesh, Frozen(base=base).whole(adapters)
        checkpoints = checkpoint_lib.Checkpoints(config.workdir)
        about, folder = checkpoints.about(checkpoints.require(step)), checkpoints.folder / str(step)
        validation.raise_if(agreement.adapter_problems(about, folder, config.adapter, config.quant))
        state, frozen = step_lib.abstract_state(config, mesh)
        params = checkpoint_lib.load_params(config.workdir, config.model, state.params, step)
        if frozen.base:
            base = base_lib.policy_params(config, mesh)
            base_lib.require_same(config, state_lib.fingerprint(base), base_lib.fingerprint(about))
            frozen = step_lib.split(config, base)[1]
            params = frozen.whole(params)
        return mesh, llama.own(params)


def _mesh_here(config: TrainConfig) -> jax.sharding.Mesh:
    """A mesh of the devices that are here, for reading a model."""
    laid = slices.resident if jax.default_backend() == "tpu" else slices.anywhere
    return mesh_lib.make(laid(jax.device_count(), config.axis_sizes))


def tokenizer_path(config: TrainConfig) -> str:
    """The tokenizer that a run trained with: the one kept in its workdir, or of a run that has
    none there, that of its config."""
    kept = epath.Path(config.workdir) / KEPT_TOKENIZER
    return str(kept) if kept.exists() else config.data.tokenizer


def tokenizer_digest(path: str) -> str:
    """A digest of all that the tokenizer at `path` does to a plain text; that which a run keeps has
    the same as that which it was given."""
    return digests.of_bytes(_tokenizer_text(path).encode())


def _tokenizer_text(path: str) -> str:
    return tokenizer_files.for_plain_text(chat_lib.load_tokenizer(path).backend, path).to_str()


def keep_tokenizer(config: TrainConfig, *, replace: bool) -> None:
    """Writes the tokenizer of a run into its workdir, so that the folder is whole by itself. Raises
    `UsageError` for another one that is there, unless it may `replace` that."""
    kept, text = epath.Path(config.workdir) / KEPT_TOKENIZER, _tokenizer_text(config.data.tokenizer)
    if not kept.exists() or kept.read_text() != text:
        if kept.exists() and not replace:
            raise validation.UsageError(
                f"{kept} would be replaced, and no run wrote it; move it away, or choose another "
                "--workdir"
            )
        atomic.write_text(kept, text)


def reward_problems(config: TrainConfig, folder: str | None = None) -> list[str]:
    """Why the reward model in `folder`, by default that of the objective, cannot score what the
    policy of `config` says, one line each: what it is, its shapes, its tokenizer, its template."""
    folder = folder or config.objective.reward_from
    if folder is None:
        return []
    scored = config.model.with_head(SCORE)
    found = base_lib.source_problems(folder, scored, config.param_dtype)
    if not found:
        told = _told_by_folder if sources.is_published(folder) else _told_by_run
        found = list(told(config, folder))
    return [f"reward_from = {folder!r}: {problem}" for problem in found]


def _told_by_run(config: TrainConfig, folder: str) -> Iterator[str]:
    checkpoints = checkpoint_lib.Checkpoints(folder)
    step = checkpoints.require(None)
    recorded = checkpoints.about(step)["must_match"]
    now = {"chat": config.data.chat, "tokenizer": tokenizer_digest(config.data.tokenizer)}
    if lacks := [name for name in now if name not in recorded]:
        yield (
            f"its checkpoint of step {step} does not record its {' and '.join(lacks)}, so nobody "
            "knows what text it was taught; another version wrote it. Train it further, or convert "
            "its folder again"
        )
    for name, before, value in agreement.differences(recorded, now):
        yield (
            f"it was trained with {name} = {before}; this run has {value}, and would score other "
            "text than it was taught. Give one trained on these"
        )


def _told_by_folder(config: TrainConfig, folder: str) -> Iterator[str]:
    try:
        theirs = tokenizer_digest(folder)
    except (ValueError, OSError) as error:
        yield f"no tokenizer can be read there to compare ({error}); put its own beside it"
        return
    if theirs != (ours := tokenizer_digest(config.data.tokenizer)):
        yield (
            f"another tokenizer lies there, with the digest {theirs}; this run has {ours}, so the "
            "same ids are other text. Give one trained on these"
        )
    yield from _template_problems(config, folder)


def _template_problems(config: TrainConfig, folder: str) -> Iterator[str]:
    """Why a folder's model was not taught chats as the run writes them, if so."""
    chat, advice = config.data.chat, "Set loader.DataConfig.chat, or give one trained on that"
    if (template := chat_template.read(folder)) is None:
        yield (
            "it has no chat template, so nobody knows what text it was taught; expected that of "
            f"{chat!r}. Put its own into {chat_template.FILE} there"
        )
        return
    if named := chat_template.modes(template):
        if chat not in named:
            yield f"it has the chat template of {named[0]!r}; this run has {chat!r}. {advice}"
        return
    try:
        said = chat_template.written(folder, _PROBE)
    except validation.UsageError as error:
        yield str(error)
        return
    expected = chat_lib.render(_PROBE, chat=chat).text
    if said.removeprefix(chat_lib.BOS).strip() not in (
        expected,
        expected.replace("</s>\n", "</s>"),
    ):
        yield (
            f"its chat template writes {said[:80]!r}; this run writes {expected[:80]!r} "
            f"(chat = {chat!r}). {advice}"
        )


def base_problems(config: TrainConfig) -> list[str]:
    """Why a base that is a reward model already cannot become one of `config` as it is, one line
    each: its tokenizer, its template."""
    if config.objective.head != SCORE or not base_lib.has_score(config):
        return []
    told = _told_by_folder if sources.is_published(config.base) else _told_by_run
    return [f"base = {config.base!r}: {problem}" for problem in told(config, config.base)]


class RewardModel:
    """Parameters with a score head, of the shape of `config.model`, that score rows of ids on
    `mesh`.

    A score depends on its row alone, to the bit: a device computes one at a time, in a row whose
    length is that of its ids rounded up to a power of two.
    """

    def __init__(self, config: TrainConfig, mesh: jax.sharding.Mesh, params: llama.Params):
        self.mesh, self.params = mesh, params
        forward = llama.forward(config.model, config.execution)
        self._at_ends = jax.jit(
            lambda params, rows, ends: sharding.replicate(
                jnp.take_along_axis(llama.scores(forward(params, rows), params), ends, axis=1)
            )
        )

    def of_ids(self, rows: list[list[int]]) -> list[float]:
        """The score at the last of each row's ids, which are one or more. Raises `UsageError` for
        scores that are not finite, by their places."""
        count, pieces = (sharding.shards(x, self.mesh.shape)[1] for x in ("batch", "positions"))
        by_length: dict[int, list[int]] = {}
        for place, ids in enumerate(rows):
            length = max(1 << (len(ids) - 1).bit_length(), FEWEST)
            by_length.setdefault(length + -length % pieces, []).append(place)
        found = np.zeros(len(rows), np.float32)
        for length, places in by_length.items():
            for start in range(0, len(places), count):
                here = places[start : start + count]
                batch, ends = _one_each([rows[place] for place in here], count, length)
                with jax.set_mesh(self.mesh):
                    scores = np.asarray(self._at_ends(self.params, batch, ends))
                found[here] = scores[: len(here), 0]
        bad = np.flatnonzero(~np.isfinite(found)).tolist()
        if bad:
            raise validation.UsageError(
                f"the scores of rows {bad} are not finite: {found[bad].tolist()}; the reward model "
                "overflows on them, or its weights are damaged"
            )
        return found.tolist()


def reward_model(config: TrainConfig, folder: str) -> RewardModel:
    """The reward model in `folder`, a run's workdir or a Hugging Face folder, on the devices that
    are here. Raises `UsageError` if it cannot score what the policy of `config` says
    (`reward_problems`)."""
    validation.raise_if(reward_problems(config, folder))
    mesh = _mesh_here(config)
    with jax.set_mesh(mesh):
        return RewardModel(config, mesh, base_lib.reward_params(config, folder, mesh))


class Scorer:
    """Scores of conversations by the reward model that a run trained, at their last token.

    `step` as in `Generator`; with `initial` a base that has a score head. Raises
    `UsageError` if the run trains no reward model, or if its checkpoint was made with another
    tokenizer or template.
    """

    def __init__(self, config: TrainConfig, *, step: int | None = None, initial: bool = False):
        if config.objective.head != SCORE:
            raise validation.UsageError(
                f"{config.workdir} is no run of a reward model, and has no scores; expected one "
                "whose objective is reward.RewardConfig"
            )
        self.config = config
        self.step = None if initial else saved_step(config, step)
        with validation.reading():
            self.tokenizer = chat_lib.load_tokenizer(tokenizer_path(config))
        if self.step is not None:
            recorded = checkpoint_lib.Checkpoints(config.workdir).about(self.step)["must_match"]
            now = {"chat": config.data.chat, "tokenizer": tokenizer_digest(tokenizer_path(config))}
            validation.raise_if(
                f"the checkpoint of step {self.step} in {config.workdir} was made with {name} = "
                f"{before}; this config has {found}. Give the config.gin of that run"
                for name, before, found in agreement.differences(recorded, now)
            )
        mesh, params = load(config, step=self.step)
        if SCORE not in params:
            raise validation.UsageError(
                f"base = {config.base!r} has no score head, and a new one says nothing; give a "
                "reward model, or train this run and leave `initial` out"
            )
        self.model = RewardModel(config, mesh, params)

    def scores(self, conversations: list[Messages]) -> list[float]:
        """The score of each conversation, which ends with the assistant's turn."""
        names = [f"conversation {number}" for number in range(len(conversations))]
        validation.raise_if(
            f"{name} ends with {messages[-1]['role'] if messages else 'nothing'}; expected the "
            "assistant's turn, which is scored"
            for name, messages in zip(names, conversations, strict=True)
            if not messages or messages[-1]["role"] != "assistant"
        )
        with validation.reading():
            encoded = chat_lib.tokenize(
                conversations, names=names, tokenizer=self.tokenizer, chat=self.config.data.chat
            )
        return self.of_ids([[int(i) for i in found.ids] for found in encoded])

    def of_ids(self, rows: list[list[int]]) -> list[float]:
        """As `RewardModel` has it."""
        return self.model.of_ids(rows)


def _one_each(rows: list[list[int]], count: int, length: int):
    """`count` rows [B, T] of one sequence each, the last ones empty, and the last place of each
    [B, 1]."""
    batch = {name: np.zeros((count, length), np.int32) for name in ("tokens", "segment_ids")}
    batch["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), (count, length))
    ends = np.zeros((count, 1), np.int32)
    for number, ids in enumerate(rows):
        batch["tokens"][number, : len(ids)], batch["segment_ids"][number, : len(ids)] = ids, 1
        ends[number] = len(ids) - 1
    return batch, ends


class Generator:
    """Replies of what a run trained. Temperature 0 is greedy; otherwise draws depend on `seed`.

    `step` is that of the checkpoint (None: the latest, and then known), or None with `initial`: the
    parameters that training starts from. `sampling` are further fields of `Sampling`; `stop_ids`
    come to that of the tokenizer.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        step: int | None = None,
        initial: bool = False,
        seed: int = 0,
        **sampling,
    ):
        if config.objective.head == SCORE:
            raise validation.UsageError(
                f"{config.workdir} is the run of a reward model, which gives scores and no text; "
                "expected a run of SFT or DPO. trained.Scorer reads its scores"
            )
        self.config = config
        self.step = None if initial else saved_step(config, step)
        with validation.reading():
            self.tokenizer = chat_lib.load_tokenizer(tokenizer_path(config))
        stop_ids = (self.tokenizer.eos_id, *sampling.pop("stop_ids", ()))
        self.sampling = Sampling(stop_ids=stop_ids, **sampling)
        self.mesh, self.params = load(config, step=self.step)
        paged = {}
        if jax.default_backend() == "tpu":
            tensor = self.mesh.shape["tensor"]
            paged["page"] = paged_attention.page_for(config.model, tensor=tensor)
        self.decoder = decoder_lib.Decoder(config.model, config.execution, **paged)
        self.key = jax.random.key(seed)

    def replies(
        self,
        conversations: list[Messages],
        *,
        keys: jax.Array | None = None,
        stream: Callable[[results_lib.Piece], None] | None = None,
    ) -> list[str]:
        """The assistant's next turn in each conversation, without its `</s>`; of several samples
        one after the other. `keys` are those of the conversations: None draws new ones."""
        prompts = [
            chat_lib.generation_prompt(messages, self.tokenizer, chat=self.config.data.chat)
            for messages in conversations
        ]
        if keys is None:
            self.key, keys = jax.random.split(self.key)
        with jax.set_mesh(self.mesh):
            results = self.decoder.generate(
                self.params,
                prompts,
                self.sampling,
                keys,
                detokenize=self.tokenizer.decode,
                stream=stream,
            )
        return [result.text.strip() for result in results]
