"""Fixtures that several rooms share: the real small model, and a tiny one that learns its roles in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct: what `make` imported, else imported now from the packaged GGUF file, once a session."""
    from metareward.errors import UserError
    from metareward.model.gguf import import_gguf, packaged_smollm2

    made = ROOT / "models" / "smollm2-135m-instruct"
    if (made / "config.json").is_file():
        return made
    try:
        source = packaged_smollm2()
    except UserError as missing:
        pytest.skip(str(missing))
    pytest.importorskip("gguf", reason="reading GGUF needs the gguf package")
    pytest.importorskip("accelerate", reason="reading GGUF needs the accelerate package")
    out = tmp_path_factory.mktemp("models") / "smollm2"
    import_gguf(source, out, dtype="bfloat16")
    return out


RATIONALES = ("It helps.", "It is thin.", "Good points.", "Off topic.", "Clear enough.", "Not much here.")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TINY_RECIPE = """
random_seed = 7
save_dtype = "float32"
[model]
name = "{folder}/model"
[prompts]
file = "{folder}/prompts.jsonl"
per_iteration = 6
[seed]
file = "{folder}/quality.jsonl"
meta_judge_examples = 48
epochs = 30
batch_examples = 16
learning_rate = 3e-3
[respond]
samples = 4
max_new_tokens = 32
[judge]
samples = 4
max_new_tokens = 32
template = "{folder}/judge.txt"
[meta_judge]
max_new_tokens = 96
template = "{folder}/meta_judge.txt"
[train]
epochs = 2
batch_pairs = 4
learning_rate = 1e-4
micro_batch_tokens = 512
compute_dtype = "float32"
activation_checkpointing = "none"
checkpoint_steps = 2
[sampler]
dtype = "float32"
max_running = 16
max_step_tokens = 512
[[iteration]]
rho = 0.0
max_chosen_characters = 2500
[[iteration]]
rho = 0.32
"""


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model, short templates, prompts, labels and `recipe.toml`: a whole fp32 run in seconds.

    The seed stage of the recipe teaches the model both verdict forms, so every stage has real work to do.
    """
    folder = tmp_path_factory.mktemp("tiny-world")
    write_inputs(folder)
    write_model(folder / "model")
    (folder / "recipe.toml").write_text(TINY_RECIPE.format(folder=folder))
    return folder


def write_inputs(folder: Path) -> None:
    topics = (
        "tea",
        "rain",
        "maps",
        "bread",
        "stars",
        "chess",
        "ferns",
        "locks",
        "waves",
        "paint",
        "coins",
        "birds",
    )
    prompts = [
        {"prompt_id": f"p{index}", "prompt": f"Tell me about {topic}."} for index, topic in enumerate(topics)
    ]
    quality = [
        {
            "prompt_id": f"q{index}",
            "prompt": f"Explain {topic}.",
            "response_id": str(score),
            "response": f"{topic} {'yes ' * score}".strip(),
            "quality": score / 5,
            "rationale": RATIONALES[(index + score) % len(RATIONALES)],
        }
        for index, topic in enumerate(topics)
        for score in range(6)
    ]
    for name, lines in (("prompts", prompts), ("quality", quality)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "judge.txt").write_text("Judge.\n{instruction}\n<response>\n{response}\n</response>\n")
    (folder / "meta_judge.txt").write_text(
        "Compare.\n{instruction}\n<response>\n{response}\n</response>\nA: {judgment_a}\nB: {judgment_b}\n"
    )


def write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from metareward.roles.seed_judgment import comparison_text

    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    texts = [
        comparison_text("A"),
        comparison_text("B"),
        *RATIONALES,
        "Score: 5",
        "Tell me about",
        "Explain",
        "yes yes",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
