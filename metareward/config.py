"""Every setting of a run, with its unit, its default and where the default comes from.

A recipe is a TOML file with these sections. "(paper)" marks a value published in arXiv 2407.19594, "(ours)" one that the
paper leaves open or an option beyond it. Defaults are the paper's wherever it names a value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
CountOrOff = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class ModelSettings:
    """The model that the run starts from."""

    __pydantic_config__ = STRICT
    name: str = ""
    """A directory in Hugging Face form, or a hub id such as meta-llama/Meta-Llama-3-8B-Instruct."""
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Handed to the tokenizer's chat template, for instance enable_thinking = false for Qwen3."""


@dataclass(frozen=True)
class PromptSettings:
    """The pool of prompts."""

    __pydantic_config__ = STRICT
    file: str = "starter:prompts"
    """JSONL with {prompt} and, if it has them, {prompt_id}; a quality file serves too (each prompt once).
    "starter:prompts" is the small set in the package."""
    per_iteration: Count = 5000
    """Prompts drawn in each iteration; no prompt comes twice before all have been used. (paper: 5,000 of 20,000)"""


@dataclass(frozen=True)
class SeedSettings:
    """The seed stage: evaluation fine-tuning (EFT) on judgments built from people's quality labels."""

    __pydantic_config__ = STRICT
    enabled: bool = True
    """Off when the model already judges in the expected form. (paper: on)"""
    file: str = "starter:quality"
    """JSONL of {prompt, response, quality in [0, 1]}; a field "rationale" is used as it is where there is one."""
    max_class_share: Share = 0.25
    """No score class makes up more than this share of the examples; the surplus is left out. (paper thins out the most
    frequent score; the share is ours)"""
    max_examples: CountOrOff = 0
    """Use at most this many judgments, drawn at random after balancing; 0: all. (ours)"""
    meta_judge_examples: CountOrOff = 0
    """Comparisons of two judgments built from the same labels, for models too small to compare without an
    example. 0: none. (ours; the paper's EFT has judgments only)"""
    epochs: Count = 1
    """(ours: not published)"""
    batch_examples: Count = 16
    """Examples an optimizer step, over all ranks. (ours: not published)"""
    learning_rate: Positive = 1e-5
    """Peak, after warm-up. (ours: not published)"""


@dataclass(frozen=True)
class RespondSettings:
    """Stage 1: the actor answers."""

    __pydantic_config__ = STRICT
    samples: Count = 7
    """K, responses a prompt. (paper)"""
    temperature: NonNegative = 0.8
    """(paper)"""
    top_p: Share = 0.95
    """(paper)"""
    top_k: CountOrOff = 0
    """0: off. (ours)"""
    min_p: Fraction = 0.0
    """Leave out tokens less probable than this share of the most probable one; 0: off. (ours)"""
    max_new_tokens: Count = 1024
    """A response that reaches it is unfinished and enters no pair. (ours: not published)"""


@dataclass(frozen=True)
class JudgeSettings:
    """Stage 2: the judge scores every response from 0 to 5."""

    __pydantic_config__ = STRICT
    samples: Count = 11
    """N, judgments a response. (paper)"""
    temperature: NonNegative = 0.8
    """(paper)"""
    top_p: Share = 0.95
    """(paper)"""
    top_k: CountOrOff = 0
    """0: off. (ours)"""
    min_p: Fraction = 0.0
    """Leave out tokens less probable than this share of the most probable one; 0: off. (ours)"""
    max_new_tokens: Count = 512
    """(ours: not published)"""
    template: str = ""
    """File with another judge prompt; it needs {instruction} and {response}. Empty: the packaged one."""


@dataclass(frozen=True)
class MetaJudgeSettings:
    """Stage 4: the meta-judge compares judgments of one response a prompt, in both orders."""

    __pydantic_config__ = STRICT
    temperature: NonNegative = 0.8
    """(ours: not published)"""
    top_p: Share = 0.95
    """(ours: not published)"""
    top_k: CountOrOff = 0
    """0: off. (ours)"""
    min_p: Fraction = 0.0
    """Leave out tokens less probable than this share of the most probable one; 0: off. (ours)"""
    max_new_tokens: Count = 512
    """(ours: not published)"""
    template: str = ""
    """File with another meta-judge prompt; it needs {instruction}, {response}, {judgment_a} and {judgment_b}."""
    hide_scores: bool = False
    """Take the verdict line out of both judgments before they are compared. (ours; off is the paper's)"""
    consistent_only: bool = False
    """Count a verdict only where both orders agree. (ours; off is the paper's)"""
    skip_equal_scores: bool = False
    """Do not compare judgments that give the same score. (ours; off is the paper's)"""
    elo_ridge: Positive = 0.01
    """Keeps Elo finite when a judgment never loses. (ours)"""


@dataclass(frozen=True)
class PairSettings:
    """Limits on what enters the preference set."""

    __pydantic_config__ = STRICT
    max_score_class_share: Share = 1.0
    """Largest share of judge pairs whose chosen judgment gives the same score; 1: off. (ours; 0.4 is the remedy
    for a judge that drifts towards 5)"""
    max_judge_share: Fraction = 1.0
    """Largest share of judge pairs in the preference set; 1: off. (ours)"""
    max_tokens: Count = 4096
    """A pair whose prompt + longer completion has more tokens is dropped and counted, never cut. (ours)"""


@dataclass(frozen=True)
class GuardSettings:
    """The collapse guard: limits on the biases of judge and meta-judge, held after the stage that gives the figure. All ours;
    the paper reports the biases (table 5) and sets no limit."""

    __pydantic_config__ = STRICT
    action: Literal["warn", "drop_judge_pairs", "stop"] = "warn"
    """What a passed limit leads to. drop_judge_pairs: the iteration trains on actor pairs only. stop: the run ends, and can be
    continued with another setting of this section. (ours)"""
    max_higher_score_preference: Fraction = 0.9
    """Largest share of comparisons of unequal scores that the judgment with the higher score wins; 1: off. (ours; the paper's
    meta-judge began at 0.63 and came to 0.977 by iteration 2)"""
    max_position_preference: Fraction = 0.85
    """Largest share of comparisons won by the position that wins more often, first or second; 0.5 is unbiased, so a limit below it
    is always passed; 1: off. (ours; the paper measured 0.68, and 0.88 where the two scores are equal)"""
    min_score_entropy: NonNegative = 0.5
    """Smallest entropy of the score classes 0 to 5, in nats; 0: off. (ours; ln 6 = 1.79 is an even spread, 0.5 is four scores in
    five the same and the rest another)"""
    min_parse_rate: Fraction = 0.8
    """Smallest share of judgments with a readable score; 0: off. (ours)"""
    max_mean_drift: Annotated[float, Field(ge=0.0, le=5.0)] = 0.5
    """Largest distance of the mean score from that of iteration 1, in points; 5: off. (ours; the paper's judge went from 4.1 to
    above 4.7 in two iterations)"""
    min_observations: Count = 50
    """A figure of fewer judgments or comparisons is not held against its limit: it would be chance. (ours)"""


@dataclass(frozen=True)
class TrainSettings:
    """Stage 5: DPO; the seed stage uses the same step."""

    __pydantic_config__ = STRICT
    loss: Literal["dpo", "dpo_norm", "simpo", "ipo", "hinge", "sppo"] = "dpo"
    """dpo_norm: DPO on log ratios a token. simpo: log-probs a token, with a margin, and no reference policy: the pass that
    computes reference log-probs is left out. sppo: each completion's log ratio is drawn to a value of its own. (paper: dpo)"""
    beta: Positive = 0.1
    """Strength of the pull towards the reference policy. Its scale is the loss's own: 2 to 10 are usual for simpo, about 5
    for dpo_norm, 0.001 for sppo (1 / eta there). (paper, for dpo)"""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed share of swapped labels, for loss = "dpo", "dpo_norm" and "simpo" only. (ours; 0 is the paper's)"""
    simpo_gamma: NonNegative = 0.0
    """Margin by which simpo wants the chosen completion's reward to lead, for loss = "simpo" only; half of beta is a
    start. (ours)"""
    nll_weight: NonNegative = 0.0
    """Adds this times the chosen completion's mean negative log-prob a token to the loss; 0: off. (ours)"""
    lora_rank: CountOrOff = 0
    """Rank of the adapters that are trained in place of the weights (LoRA, arXiv 2106.09685; needs metareward[lora]); 0: off,
    all weights are trained. The seed stage too. (ours: not the paper's)"""
    lora_alpha: Positive = 32.0
    """An adapter's product counts lora_alpha / lora_rank times. (ours)"""
    lora_targets: Literal["all", "attention", "mlp"] = "all"
    """Matrices of every block that have an adapter: those of attention, of the MLP, or both. (ours)"""
    epochs: Count = 10
    """(paper)"""
    batch_pairs: Count = 32
    """Pairs an optimizer step, over all ranks. (paper)"""
    learning_rate: Positive = 5e-6
    """Peak, after warm-up. (paper; high for full fine-tuning, 1e-6 and 1 epoch is a careful start)"""
    min_learning_rate_share: Fraction = 0.0
    """The cosine ends at this share of the peak. (ours)"""
    warmup_share: Fraction = 0.1
    """Share of the steps with a linearly rising learning rate. (ours: not published)"""
    weight_decay: NonNegative = 0.0
    """(ours: not published)"""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """(ours: not published)"""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """(ours: not published)"""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm. (ours: not published)"""
    micro_batch_tokens: Count = 8192
    """Tokens a rank computes at once; larger batches accumulate. Changes memory and speed, not the result. (ours)"""
    compute_dtype: Dtype = "bfloat16"
    """Of the forward and backward passes; master weights and optimizer state are float32. (ours)"""
    activation_checkpointing: Literal["none", "selective", "full"] = "full"
    """What a layer keeps for its backward pass. none: everything; full: its input, and it is computed twice; selective: also the
    results of matrix products and attention, and only the cheap rest is computed twice. Changes memory and speed, not the
    result. (ours)"""
    compile: bool = False
    """torch.compile for every layer, one compiled function for all of them. Changes speed and memory, and the result by
    floating-point noise. Off, because short runs do not get back the time that compiling takes, and on a GPU it has not been
    tried. (ours)"""
    shard_within: CountOrOff = 0
    """Processes that share one copy of the weights and optimizer state, usually those of a node: gathering then stays inside of
    it, and only gradients cross (hybrid sharding). Must divide the number of processes; 0: all. (ours)"""
    checkpoint_steps: Count = 100
    """Optimizer steps between two checkpoints. (ours)"""
    keep_checkpoints: Count = 2
    """The newest ones kept while a stage trains. (ours)"""
    async_checkpoints: bool = True
    """Train on while a checkpoint is written. Takes a copy of the weights and the optimizer state in main memory, 12 bytes a
    parameter over all ranks. (ours)"""
    check_memory: bool = True
    """Refuse to train where the estimate of the memory it takes is more than is free; false: only tell both. (ours)"""


@dataclass(frozen=True)
class SamplerSettings:
    """How fast the sampler runs. None of these changes what is sampled, beyond floating-point noise."""

    __pydantic_config__ = STRICT
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of weights and KV cache. auto: bfloat16 on a GPU and on CPUs with bf16 arithmetic, else float32."""
    max_running: Count = 256
    """Sequences decoded together, a rank (or tensor_parallel ranks)."""
    tensor_parallel: Count = 1
    """Neighbouring processes that share one copy of the weights and of the KV cache, each with some of the heads, for a model that
    does not fit one GPU. Must divide the number of processes and the model's heads, key-value heads and intermediate_size."""
    page_size: Annotated[int, Field(ge=1, le=256)] = 16
    """Tokens a page of the KV cache."""
    max_step_tokens: Count = 2048
    """Tokens computed in one step, of prompts and of running sequences together."""
    kv_memory: Fraction = 0.0
    """Share of the memory that is free once the weights are loaded that the KV cache may take; 0: 0.8 of a GPU's, 0.5 of
    a CPU's (which its ranks divide)."""


@dataclass(frozen=True)
class LoggingSettings:
    """metrics.jsonl is always written; these come on top."""

    __pydantic_config__ = STRICT
    tensorboard: bool = False
    """Write TensorBoard event files to RUN/tensorboard."""
    wandb_project: str = ""
    """Send the same figures to this Weights & Biases project."""
    profile_steps: CountOrOff = 0
    """Record so many steps of every stage in full, with a trace of torch.profiler in RUN/spans; 0: off. They are slower."""
    profile_after: CountOrOff = 2
    """Steps of a stage that go before those, to warm up."""
    memory_snapshot: bool = False
    """On a GPU, record allocations while a stage trains, and write them to RUN/spans where memory runs out."""


@dataclass(frozen=True)
class Iteration:
    """What changes from one iteration to the next."""

    __pydantic_config__ = STRICT
    rho: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Width of the score interval in which length decides; 0: best against worst. (paper: 0, 0.32, 0.32, 0.4)"""
    meta_judge: bool = True
    """Compare judgments and train on judge pairs too. (paper: iterations 1 and 2)"""
    max_chosen_characters: CountOrOff = 0
    """Drop actor pairs whose chosen response is longer; 0: off. (paper: 2,500 in iteration 1)"""
    max_chosen_judgment_characters: CountOrOff = 0
    """Drop judge pairs whose chosen judgment is longer; 0: off. (paper: 1,100 and 1,000; the unit is ours)"""


PAPER_ITERATIONS = (
    Iteration(rho=0.0, max_chosen_characters=2500, max_chosen_judgment_characters=1100),
    Iteration(rho=0.32, max_chosen_judgment_characters=1000),
    Iteration(rho=0.32, meta_judge=False),
    Iteration(rho=0.4, meta_judge=False),
)


@dataclass(frozen=True)
class Recipe:
    """A whole Meta-Rewarding run (arXiv 2407.19594): seed stage, then respond, judge, compare, train, iterated."""

    __pydantic_config__ = STRICT
    model: ModelSettings = field(default_factory=ModelSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    seed: SeedSettings = field(default_factory=SeedSettings)
    respond: RespondSettings = field(default_factory=RespondSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    meta_judge: MetaJudgeSettings = field(default_factory=MetaJudgeSettings)
    pairs: PairSettings = field(default_factory=PairSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    iteration: tuple[Iteration, ...] = PAPER_ITERATIONS
    """One entry an iteration. (paper: four)"""
    random_seed: Annotated[int, Field(ge=0)] = 0
    """Every random choice of the run is a pure function of it and of what the choice is about."""
    save_dtype: Dtype = "bfloat16"
    """Of the models that the run writes."""


# Settings that say how fast, how loudly or in how much memory a run goes, never what it computes (beyond floating-point
# noise): they may differ when a run is continued. So may the guard's, which exist to be answered when it has spoken; each of
# its events records the action that was in force.
EXECUTION_SETTINGS = (
    "guard",
    "sampler",
    "logging",
    "train.micro_batch_tokens",
    "train.activation_checkpointing",
    "train.compile",
    "train.shard_within",
    "train.checkpoint_steps",
    "train.keep_checkpoints",
    "train.async_checkpoints",
    "train.check_memory",
)
