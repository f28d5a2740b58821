"""The shape of a model, read from a Hugging Face config.json.

Everything the decoder needs is checked here once, so that a model we would compute wrongly is refused by
name before a byte of weights is read. The raw dictionary is kept: what we do not interpret is written back
unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metareward.errors import UserError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_TYPES = ("default", "linear", "llama3")
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder.

    `rope_scaling` is None for plain rotary embeddings, else {"rope_type": "linear" | "llama3", ...}.
    `attention_bias` is the bias of q, k and v. `max_context` is in tokens: the smaller of
    max_position_embeddings and Mistral's sliding window, because within the window sliding attention equals
    full causal attention, and beyond it we would compute another model.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    max_context: int
    hf: dict[str, Any]

    @property
    def output_bias(self) -> bool:
        """Whether o_proj has a bias: with attention_bias, except in Qwen2, whose bias is on q, k and v
        only.
        """
        return self.attention_bias and self.architecture != "qwen2"

    @staticmethod
    def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
        """Interpret a config.json; raise UserError for a model this decoder would compute wrongly."""
        architecture = _architecture(hf)
        _refuse_unsupported(hf, architecture)
        num_heads = _positive(hf, "num_attention_heads")
        # Mistral's and Qwen's classes default this to other numbers than Llama's: a default here would be a
        # guess.
        num_kv_heads = (
            num_heads
            if architecture == "llama" and hf.get("num_key_value_heads") is None
            else _positive(hf, "num_key_value_heads")
        )
        hidden_size = _positive(hf, "hidden_size")
        if hf.get("head_dim") is not None:
            head_dim = _positive(hf, "head_dim")
        else:
            head_dim = 128 if architecture == "qwen3" else hidden_size // num_heads
        if num_heads % num_kv_heads:
            raise UserError(
                f"config.json has num_attention_heads {num_heads}, which is not a multiple of"
                " num_key_value_heads"
                f" {num_kv_heads}: correct the file."
            )
        if head_dim % 2:
            raise UserError(
                f"config.json gives a head dimension of {head_dim}, but rotary embeddings need an even one."
            )
        max_context = _positive(hf, "max_position_embeddings")
        rope_theta, rope_scaling = _rope(hf, max_context)
        if architecture == "mistral" and hf.get("sliding_window"):
            max_context = min(max_context, _positive(hf, "sliding_window"))
        return ModelConfig(
            architecture=architecture,
            vocab_size=_positive(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(hf, "intermediate_size"),
            num_layers=_positive(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=architecture == "qwen2"
            or (architecture != "mistral" and bool(hf.get("attention_bias", False))),
            qk_norm=architecture == "qwen3",
            max_context=max_context,
            hf=dict(hf),
        )

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The config.json to write: the one that was read, with `dtype` and the rope settings in both the
        spellings in use.

        transformers 5 reads `dtype` and `rope_parameters`; transformers 4 and other programs read
        `torch_dtype`, `rope_theta` and `rope_scaling`.
        """
        rope = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}
        names = {short: long for long, short in ARCHITECTURES.items()}
        return {
            **self.hf,
            "architectures": [names[self.architecture]],
            "model_type": self.architecture,
            "head_dim": self.head_dim,
            "tie_word_embeddings": self.tie_word_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "rope_parameters": rope,
            "dtype": dtype,
            "torch_dtype": dtype,
        }


def _architecture(hf: Mapping[str, Any]) -> str:
    listed = hf.get("architectures") or []
    supported = ", ".join(ARCHITECTURES)
    if listed:
        if listed[0] not in ARCHITECTURES:
            raise UserError(
                f"The architecture {listed[0]} is not supported: use a model of one of {supported}."
            )
        return ARCHITECTURES[listed[0]]
    if hf.get("model_type") in ARCHITECTURES.values():
        return str(hf["model_type"])
    raise UserError(
        f"config.json names no supported model (model_type {hf.get('model_type')!r}): use one of {supported}."
    )


def _refuse_unsupported(hf: Mapping[str, Any], architecture: str) -> None:
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {hf['hidden_act']!r} is not supported: use a model with 'silu'.")
    if hf.get("mlp_bias"):
        raise UserError("mlp_bias true is not supported: use a model without biases in its MLP.")
    if hf.get("quantization_config"):
        raise UserError(
            "config.json has a quantization_config, and quantized weights cannot be trained:"
            " use the unquantized model."
        )
    layers_slide = "sliding_attention" in (hf.get("layer_types") or [])
    if architecture != "mistral" and (hf.get("use_sliding_window") or layers_slide):
        raise UserError(
            "use_sliding_window true is not supported: use a model with full attention in every layer."
        )


def _rope(hf: Mapping[str, Any], context: int) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (older
    files).
    """
    rope = {**(hf.get("rope_parameters") or {}), **(hf.get("rope_scaling") or {})}
    rope_type = rope.pop("type", None)
    rope_type = rope.pop("rope_type", None) or rope_type or "default"
    theta = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0)
    if rope_type not in ROPE_TYPES:
        raise UserError(
            f"The rope type {rope_type!r} is not supported: use a model with one of {', '.join(ROPE_TYPES)}."
        )
    if float(rope.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(
            "A partial_rotary_factor other than 1 is not supported: use a model that rotates whole heads."
        )
    if rope_type == "llama3" and rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = hf.get("original_max_position_embeddings") or context
    missing = [key for key in ROPE_KEYS[rope_type] if rope.get(key) is None]
    if missing:
        raise UserError(
            f"config.json's rope settings of type {rope_type!r} lack {', '.join(missing)}: add them."
        )
    return theta, None if rope_type == "default" else {"rope_type": rope_type, **rope}


def _positive(hf: Mapping[str, Any], key: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UserError(
            f"config.json needs a positive whole number for {key}, but has {value!r}: correct the file."
        )
    return value
