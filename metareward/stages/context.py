"""What every stage is given: the run, its recipe, where figures go, and the model that the iteration starts from."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from metareward.config import Recipe, SamplerSettings
from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.model.config import ModelConfig
from metareward.model.hf_files import load_decoder, read_config
from metareward.model.locate import locate_model
from metareward.model.tensor_parallel import ALONE, TensorGroup, check_tensor_parallel
from metareward.phases import UNRECORDED, Phases, Uncounted
from metareward.run import ranks
from metareward.run.directory import IterationFiles, RunDirectory
from metareward.run.memory import free_memory
from metareward.run.metrics import Metrics
from metareward.run.spans import Spans, no_spans
from metareward.sampler.engine import Engine

logger = logging.getLogger("metareward")


@dataclass
class Context:
    """Shared by the stages of one run. Holds at most one engine, because two models rarely fit side by side."""

    run: RunDirectory
    recipe: Recipe
    metrics: Metrics
    spans: Spans = field(default_factory=no_spans)
    _engine: tuple[Path, Engine] | None = field(default=None, repr=False)
    _group: TensorGroup | None = field(default=None, repr=False)
    _chats: dict[Path, Chat] = field(default_factory=dict, repr=False)

    def files(self, iteration: int) -> IterationFiles:
        """Files of an iteration; 0 is the seed stage."""
        return self.run.seed if iteration == 0 else self.run.iteration(iteration)

    def policy(self, iteration: int) -> Path:
        """The directory of M_t, the model that iteration t samples from and trains: what the iteration before made."""
        if iteration > 1:
            return self.run.iteration(iteration - 1).model
        if iteration == 1 and self.recipe.seed.enabled:
            return self.run.seed.model
        return ranks.on_first(lambda: locate_model(self.recipe.model.name))

    def chat(self, policy: Path) -> Chat:
        if policy not in self._chats:
            self._chats[policy] = Chat.load(policy, self.recipe.model.chat_template_kwargs)
        return self._chats[policy]

    def max_context(self, policy: Path) -> int:
        return read_config(policy).max_context

    def engine(self, policy: Path) -> Engine:
        """The sampler of a model; kept while stages sample from the same weights. A collective."""
        if self._engine is None or self._engine[0] != policy:
            self.release()
            group = self.tensor_group(policy)
            engine = load_engine(
                policy,
                self.chat(policy),
                self.recipe.sampler,
                self.recipe.random_seed,
                self.spans if group.is_first else Uncounted(self.spans),
                group,
            )
            self._engine = (policy, engine)
        return self._engine[1]

    def tensor_group(self, policy: Path) -> TensorGroup:
        """The ranks that this one shares the sampler's model with, itself among them. A collective.

        Raises:
            UserError: `sampler.tensor_parallel` does not fit the model in `policy` or the number of ranks.
        """
        size = self.recipe.sampler.tensor_parallel
        check_tensor_parallel(size, ranks.world_size(), read_config(policy))
        if self._group is None:
            self._group = (
                ALONE if size == 1 else TensorGroup(ranks.rank() % size, size, ranks.neighbours(size))
            )
        return self._group

    def release(self) -> None:
        """Free the sampler's weights and cache, before training or another model."""
        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        self.metrics.close()
        self.spans.close()


def load_engine(
    policy: Path,
    chat: Chat,
    settings: SamplerSettings,
    seed: int,
    phases: Phases = UNRECORDED,
    group: TensorGroup = ALONE,
) -> Engine:
    """A sampler for the model in `policy`, on this rank's device, in the dtype that the settings say; for this rank's part of it
    where a group shares it. A collective.

    Raises:
        UserError: too little memory is free for the cache, or the settings want a group and there is none.
    """
    if settings.tensor_parallel != group.size:
        raise UserError(
            f"this command samples with one process a model, and sampler.tensor_parallel = {settings.tensor_parallel} in its "
            f"recipe shares one: set it to 1, or give the model's own folder in place of a run's"
        )
    device = ranks.device()
    dtype = sampling_dtype(settings.dtype, device)
    decoder = load_decoder(policy, dtype=dtype, device=str(device), group=group)
    # The ranks of a machine share its memory: measured only when all of them hold their weights.
    ranks.barrier()
    # The ranks of a group decide alike only with caches of one size.
    free = group.least(free_memory(device))
    size = token_bytes(decoder.config, dtype)
    tokens = kv_tokens(free, size, decoder.config.max_context, settings, device)
    if ranks.is_first():
        logger.info(
            "sampling from %s in %s on %s%s, key-value cache of %s tokens (%.3g GiB of %.3g GiB free a rank)",
            policy,
            str(dtype).removeprefix("torch."),
            device,
            f", {group.size} ranks a model" if group.size > 1 else "",
            f"{tokens:,}",
            tokens * size / 2**30,
            free / 2**30,
        )
    return Engine(
        decoder,
        stop_ids=chat.stop_ids,
        seed=seed,
        max_running=settings.max_running,
        page_size=settings.page_size,
        max_step_tokens=settings.max_step_tokens,
        kv_tokens=tokens,
        phases=phases,
    )


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token takes in the key-value cache."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def kv_tokens(free: int, size: int, max_context: int, settings: SamplerSettings, device: torch.device) -> int:
    """Tokens of the key-value cache: the share of `free` bytes that the settings allow, at `size` bytes a token, but no more than
    `max_running` sequences can ever use.

    Raises:
        UserError: not even one page fits.
    """
    share = settings.kv_memory or (0.8 if device.type == "cuda" else 0.5)
    pages = int(share * free) // (size * settings.page_size)
    if pages < 1:
        raise UserError(
            f"a share of {share} of the {free / 2**20:.0f} MiB that are free on {device} holds not one page of the key-value "
            f"cache: free some memory, raise sampler.kv_memory, or use fewer processes on this machine"
        )
    most = settings.max_running * -(-max_context // settings.page_size)
    return min(pages, most) * settings.page_size


def sampling_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype to sample in; "auto" is bfloat16 wherever the hardware has bf16 arithmetic."""
    if setting != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[setting]
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX-512 BF16 or AMX); emulated bf16 is slower than float32."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
