"""The all-MiniLM-L6-v2 sentence encoder as a function of its weights, in plain torch.

The weights are a flat dict of tensors. The inference actors of the demo replace the whole dict
between two calls whenever the trainer sends new weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

Weights = dict[str, torch.Tensor]

BATCH_SENTENCES = 50
MAX_TOKENS = 128


def load_weights(model_dir: Path) -> Weights:
    """Return the 103 float tensors of model.safetensors, which may be changed in place.

    The integer buffer of the file (the numbers 0 to 511) is not a parameter and is omitted.
    """
    tensors = load_file(model_dir / "model.safetensors")
    return {name: tensor.clone() for name, tensor in tensors.items() if tensor.is_floating_point()}


def train_step(weights: Weights, step: int) -> None:
    """Change every weight in place, with the same result in every process that runs this step."""
    noise = torch.Generator().manual_seed(step)
    for weight in weights.values():
        weight.mul_(0.999).add_(torch.randn(weight.shape, generator=noise), alpha=1e-4)


class SentenceEncoder:
    """Converts sentences into unit vectors of 384 numbers.

    Args:
        model_dir: The folder with config.json and tokenizer.json.
    """

    def __init__(self, model_dir: Path) -> None:
        config = json.loads((model_dir / "config.json").read_text())
        self._layers: int = config["num_hidden_layers"]
        self._heads: int = config["num_attention_heads"]
        self._epsilon: float = config["layer_norm_eps"]
        self._tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding()

    @torch.inference_mode()
    def embed(self, weights: Weights, sentences: list[str]) -> torch.Tensor:
        """Return one row of length 1 for each sentence."""
        batches = [
            self._embed_batch(weights, sentences[start : start + BATCH_SENTENCES])
            for start in range(0, len(sentences), BATCH_SENTENCES)
        ]
        return torch.cat(batches)

    def _embed_batch(self, weights: Weights, sentences: list[str]) -> torch.Tensor:
        encoded = self._tokenizer.encode_batch(sentences)
        ids = torch.tensor([item.ids for item in encoded])
        mask = torch.tensor([item.attention_mask for item in encoded])
        hidden = self._token_vectors(weights, ids)
        for layer in range(self._layers):
            hidden = self._layer(weights, f"encoder.layer.{layer}.", hidden, mask)
        present = mask.unsqueeze(-1).float()
        return functional.normalize((hidden * present).sum(dim=1) / present.sum(dim=1), dim=1)

    def _token_vectors(self, weights: Weights, ids: torch.Tensor) -> torch.Tensor:
        words = functional.embedding(ids, weights["embeddings.word_embeddings.weight"])
        places = weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        kind = weights["embeddings.token_type_embeddings.weight"][0]
        return self._norm(weights, "embeddings.LayerNorm", words + places + kind)

    def _layer(
        self, weights: Weights, prefix: str, hidden: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        attended = self._attention(weights, prefix + "attention.", hidden, mask)
        inner = functional.gelu(_linear(weights, prefix + "intermediate.dense", attended))
        outer = _linear(weights, prefix + "output.dense", inner)
        return self._norm(weights, prefix + "output.LayerNorm", outer + attended)

    def _attention(
        self, weights: Weights, prefix: str, hidden: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        rows, tokens, width = hidden.shape
        query, key, value = (
            _linear(weights, f"{prefix}self.{part}", hidden)
            .view(rows, tokens, self._heads, -1)
            .transpose(1, 2)
            for part in ("query", "key", "value")
        )
        visible = mask[:, None, None, :].bool()
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        joined = mixed.transpose(1, 2).reshape(rows, tokens, width)
        return self._norm(
            weights,
            prefix + "output.LayerNorm",
            _linear(weights, prefix + "output.dense", joined) + hidden,
        )

    def _norm(self, weights: Weights, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(
            hidden,
            hidden.shape[-1:],
            weights[name + ".weight"],
            weights[name + ".bias"],
            self._epsilon,
        )


def _linear(weights: Weights, name: str, hidden: torch.Tensor) -> torch.Tensor:
    return functional.linear(hidden, weights[name + ".weight"], weights[name + ".bias"])
