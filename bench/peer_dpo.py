"""The peer of the DPO benchmark: TRL's DPOTrainer, what a user would otherwise call.

It gets the same token ids, global batches, AdamW and constant learning rate: fp32 weights and optimizer state, bf16
autocast, reference log-probs precomputed. Of its settings those are taken that make it fast here: PyTorch's fused
attention; the pairs of a global batch in the order of their lengths, so that it computes little padding; and the
batch size, with or without gradient checkpointing, that is fastest. Its padding-free mode is switched off in TRL 1.16
and needs flash-attn, which has no CPU version.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch

from bench.dpo_job import Job
from bench.sides import peak_since, reply, start_peak, wait_for_device

NEEDED = ("trl", "datasets", "accelerate")


@dataclass(frozen=True)
class PeerSetting:
    """Pairs a forward pass; the global batch is a multiple."""

    batch: int
    gradient_checkpointing: bool = False


def missing() -> str | None:
    """Why the peer cannot run, or None."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (pip install metareward[bench])" if absent else None


def candidates(batch_pairs: int) -> list[PeerSetting]:
    """Settings to try: batch sizes that divide the global batch, and the middle one with checkpointing too.

    Larger ones only pad more: a CPU's cores are busy with one pair.
    """
    sizes = [size for size in (1, 2, 4) if batch_pairs % size == 0]
    return [*map(PeerSetting, sizes), PeerSetting(sizes[len(sizes) // 2], True)]


def rows_of(job: Job, steps: int) -> list[dict[str, Sequence[int]]]:
    """The global batches one after another, in each the longest pair first: the loss is a mean over the batch."""
    ordered = (
        example
        for step in range(steps)
        for example in sorted(
            job.batch(step), key=lambda pair: -len(pair.prompt) - max(map(len, pair.completions))
        )
    )
    return [
        {
            "prompt_ids": list(example.prompt),
            "chosen_ids": list(example.completions[0]),
            "rejected_ids": list(example.completions[1]),
        }
        for example in ordered
    ]


def serve_peer(
    connection: Connection, job: Job, setting: PeerSetting, steps: int, device_type: str = "cpu"
) -> None:
    """Exactly `steps` steps, each when it is asked for: `train` runs through, and a callback waits."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    class Stopped(Exception):
        """No further step is wanted."""

    class TokenExact(DPOTrainer):  # type: ignore[misc]
        """The dataset holds token ids already: its template would put other tokens behind a completion."""

        tokens = 0

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
            self.tokens += inputs["input_ids"].numel()
            return super().training_step(model, inputs, *rest, **options)

    class OneByOne(TrainerCallback):  # type: ignore[misc]
        """Every step waits for its command; its time is from its first forward pass to the update."""

        before: int | None = None
        began = seconds = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                self.before = start_peak(device_type)
            if connection.recv() == "stop":
                raise Stopped
            trainer.tokens = 0
            self.began = perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait_for_device(device_type)
            self.seconds = perf_counter() - self.began

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "grad_norm" in logs:
                figures = {"loss": logs["loss"], "grad_norm": logs["grad_norm"], "tokens": trainer.tokens}
                reply(
                    connection, {**figures, "seconds": self.seconds, **peak_since(self.before, device_type)}
                )

    settings = job.settings
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=settings.batch_pairs // setting.batch,
            max_steps=steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            max_grad_norm=settings.max_grad_norm,
            beta=settings.beta,
            bf16=True,
            use_cpu=device_type == "cpu",
            gradient_checkpointing=setting.gradient_checkpointing,
            max_length=None,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        model = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=torch.float32, attn_implementation="sdpa"
        )
        callback = OneByOne()
        trainer = TokenExact(
            model=model,
            args=config,
            # Named, not hashed: datasets 5.2 cannot hash a table of pyarrow 26.
            train_dataset=datasets.Dataset(
                datasets.table.InMemoryTable.from_pylist(rows_of(job, steps)), fingerprint="pairs"
            ),
            processing_class=AutoTokenizer.from_pretrained(job.model),
            callbacks=[callback],
        )
        trainer.remove_callback(PrinterCallback)
        reply(
            connection,
            {
                "batch_pairs": setting.batch,
                "gradient_checkpointing": setting.gradient_checkpointing,
                "padding": "to the longest of a batch, pairs in the order of their lengths",
                "attention": model.config._attn_implementation,
                "optimizer": str(getattr(config.optim, "value", config.optim)),
            },
        )
        try:
            trainer.train()
        except Stopped:
            return
