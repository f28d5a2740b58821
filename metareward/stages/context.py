"""What every stage is given: the run, its recipe, where figures go, and the model that the iteration starts from."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from metareward.config import Recipe, SamplerSettings
from metareward.model.chat import Chat
from metareward.model.hf_files import load_decoder, read_config
from metareward.model.locate import locate_model
from metareward.run import ranks
from metareward.run.directory import IterationFiles, RunDirectory
from metareward.run.metrics import Metrics
from metareward.sampler.engine import Engine

logger = logging.getLogger("metareward")


@dataclass
class Context:
    """Shared by the stages of one run. Holds at most one engine, because two models rarely fit side by side."""

    run: RunDirectory
    recipe: Recipe
    metrics: Metrics
    _engine: tuple[Path, Engine] | None = field(default=None, repr=False)
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
        """The sampler of a model; kept while stages sample from the same weights."""
        if self._engine is None or self._engine[0] != policy:
            self.release()
            self._engine = (
                policy,
                load_engine(policy, self.chat(policy), self.recipe.sampler, self.recipe.random_seed),
            )
        return self._engine[1]

    def release(self) -> None:
        """Free the sampler's weights and cache, before training or another model."""
        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_engine(policy: Path, chat: Chat, settings: SamplerSettings, seed: int) -> Engine:
    """A sampler for the model in `policy`, on this rank's device, in the dtype that the settings say."""
    device = ranks.device()
    dtype = sampling_dtype(settings.dtype, device)
    decoder = load_decoder(policy, dtype=dtype, device=str(device))
    if ranks.is_first():
        logger.info("sampling from %s in %s on %s", policy, str(dtype).removeprefix("torch."), device)
    return Engine(
        decoder,
        stop_ids=chat.stop_ids,
        seed=seed,
        max_running=settings.max_running,
        page_size=settings.page_size,
        max_prefill_tokens=settings.max_prefill_tokens,
        kv_tokens=kv_tokens(
            decoder.config.num_layers, decoder.config.num_kv_heads * decoder.config.head_dim, dtype
        ),
    )


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


def kv_tokens(layers: int, width: int, dtype: torch.dtype) -> int | None:
    """Size of the KV cache in tokens: most of what a GPU has free after the weights; None on a CPU, where it grows as needed."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    # A fifth stays for activations and logits.
    return int(0.8 * free) // (2 * layers * width * dtype.itemsize)
