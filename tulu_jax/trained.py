"""What a run trained: its parameters, its replies, its Hugging Face folder."""

import jax
from absl import logging
from etils import epath

from tulu_jax import atomic, validation
from tulu_jax import base as base_lib
from tulu_jax import step as step_lib
from tulu_jax.data import chat as chat_lib
from tulu_jax.data import tokenizer_files
from tulu_jax.decode import sampler
from tulu_jax.interop import hf, tokenizer_export
from tulu_jax.models import llama
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import slices
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import checkpoint as checkpoint_lib

Messages = list[dict[str, str]]
KEPT_TOKENIZER = "tokenizer.json"  # in the workdir


def saved_step(config: TrainConfig, step: int | None) -> int:
    """`step`, or the latest of the run. Raises `UsageError` if there is no such checkpoint."""
    return checkpoint_lib.Checkpoints(config.workdir).require(step)


def load(config: TrainConfig, *, step: int | None) -> tuple[jax.sharding.Mesh, llama.Params]:
    """A mesh of the devices that are here and on it the parameters of `step`, or with None those
    that training starts from. Raises `UsageError` if there is no such checkpoint."""
    mesh = mesh_lib.make(slices.anywhere(jax.device_count(), config.model.axis_sizes))
    with jax.set_mesh(mesh):
        if step is None:
            return mesh, base_lib.initial_params(config, mesh)
        state, frozen = step_lib.abstract_state(config, mesh)
        params = checkpoint_lib.load_params(config.workdir, config.model, state.params, step)
        if frozen.base:
            base = base_lib.initial_params(config, mesh)
            frozen = config.objective.split(base, jax.random.key(config.seed))[1]
            params = frozen.whole(params)
        return mesh, llama.own(params)


def tokenizer_path(config: TrainConfig) -> str:
    """The tokenizer that a run trained with: the one kept in its workdir, or of a run that has
    none there, that of its config."""
    kept = epath.Path(config.workdir) / KEPT_TOKENIZER
    return str(kept) if kept.exists() else config.data.tokenizer


def keep_tokenizer(config: TrainConfig, *, replace: bool) -> None:
    """Writes the tokenizer of a run into its workdir, so that the folder is whole by itself. Raises
    `UsageError` for another one that is there, unless it may `replace` that."""
    path = config.data.tokenizer
    backend = tokenizer_files.for_plain_text(chat_lib.load_tokenizer(path).backend, path)
    kept, text = epath.Path(config.workdir) / KEPT_TOKENIZER, backend.to_str()
    if not kept.exists() or kept.read_text() != text:
        if kept.exists() and not replace:
            raise validation.UsageError(
                f"{kept} would be replaced, and no run wrote it; move it away, or choose another "
                "--workdir"
            )
        atomic.write_text(kept, text)


class Generator:
    """Replies of what a run trained. Temperature 0 is greedy; otherwise draws depend on `seed`.

    `step` is that of the checkpoint (None: the latest, and then known), or None with `initial`: the
    parameters that training starts from.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        step: int | None = None,
        initial: bool = False,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        self.config = config
        self.step = None if initial else saved_step(config, step)
        self.mesh, self.params = load(config, step=self.step)
        with validation.reading():
            self.tokenizer = chat_lib.load_tokenizer(tokenizer_path(config))
        self.settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        self.key = jax.random.key(seed)

    def replies(self, conversations: list[Messages]) -> list[str]:
        """The assistant's next turn in each conversation, without its `</s>`."""
        prompts = [
            chat_lib.generation_prompt(messages, self.tokenizer, chat=self.config.data.chat)
            for messages in conversations
        ]
        self.key, key = jax.random.split(self.key)
        with jax.set_mesh(self.mesh):
            new_tokens = sampler.generate(
                self.config.model,
                self.config.execution,
                self.params,
                prompts,
                eos_id=self.tokenizer.eos_id,
                key=key,
                **self.settings,
            )
        return [self.tokenizer.decode(ids).strip() for ids in new_tokens]


def export(
    config: TrainConfig, out: str, *, step: int | None, dtype: str | None, overwrite: bool
) -> None:
    """Writes the checkpoint of `step` (default: the latest) as the Hugging Face folder `out`.

    The folder has the tokenizer with a chat template that makes exactly the training ids, and the
    generation config of what the run began from. `dtype` None is that of the base, where it is
    float32, else bfloat16. The rows of the run are not asked for, nor its base, unless the
    objective keeps it frozen. Raises `UsageError`, before the parameters are loaded, if there is no
    such checkpoint or `out` cannot be written.
    """
    step = saved_step(config, step)
    about = checkpoint_lib.Checkpoints(config.workdir).about(step)
    dtype = dtype or _dtype_of_base(config, about)
    problems = hf.target_problems(out, config.model, dtype=dtype, overwrite=overwrite)
    if problems:
        raise validation.UsageError("\n".join(problems))
    with validation.reading():
        path = tokenizer_path(config)
        tokenizer = chat_lib.load_tokenizer(path)
        backend = tokenizer_files.for_plain_text(tokenizer.backend, path)
        generation = about.get("generation_config")  # checkpoints of before have none
        if generation is None:
            generation = base_lib.generation_config(config)
    mesh, params = load(config, step=step)
    with jax.set_mesh(mesh):
        hf.save(
            out,
            params,
            config.model,
            dtype=dtype,
            generation_config=generation
            | {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id},
            overwrite=overwrite,
            write_tokenizer=lambda folder: tokenizer_export.save(
                backend,
                str(folder),
                max_length=config.data.max_length,
                mode=config.data.chat,
            ),
        )


def _dtype_of_base(config: TrainConfig, about: dict) -> str:
    base = about.get("base_dtype", config.param_dtype)
    dtype = base if base in hf.DTYPES else "bfloat16"  # float16 is read, never written
    logging.info(
        "Weights are written in %s: what the run began from is %s, the parameters are %s; "
        "--dtype chooses",
        *(dtype, base, config.param_dtype),
    )
    return dtype
