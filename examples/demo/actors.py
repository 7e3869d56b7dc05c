"""The three actors of the demo: one trainer, two encoders. They know nothing about transports."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from encoder import SentenceEncoder, Weights, load_weights, train_step

import ray


@ray.remote(enable_tensor_transport=True)
class Trainer:
    """Owns the weights and changes them in place.

    Args:
        model_dir: The folder of the model.
    """

    def __init__(self, model_dir: Path) -> None:
        torch.set_num_threads(1)
        self._weights = load_weights(model_dir)

    def train(self, step: int) -> None:
        """Does one step."""
        train_step(self._weights, step)

    def weights(self) -> Weights:
        """Returns the weights: plain or through RDT, as the caller's options say."""
        return self._weights


@ray.remote(enable_tensor_transport=True)
class Encoder:
    """Embeds its share of the text with the weights that it was last given.

    Args:
        model_dir: The folder of the model.
        sentences: This actor's share.
    """

    def __init__(self, model_dir: Path, sentences: list[str]) -> None:
        torch.set_num_threads(1)
        self._encoder = SentenceEncoder(model_dir)
        self._sentences = sentences
        self._weights: Weights = {}

    def load(self, weights: Weights) -> int:
        """Takes new weights; returns how many bytes they have."""
        self._weights = weights
        return sum(weight.nbytes for weight in weights.values())

    def embed(self) -> torch.Tensor:
        """Returns the embeddings of this actor's sentences."""
        return self._encoder.embed(self._weights, self._sentences)


class Team:
    """The actors together, as the driver uses them.

    Args:
        model_dir: The folder of the model.
        shares: One list of sentences per encoder.
    """

    def __init__(self, model_dir: Path, shares: list[list[str]]) -> None:
        self.trainer = Trainer.remote(model_dir)
        self.encoders = [Encoder.remote(model_dir, share) for share in shares]

    def train(self, step: int) -> None:
        """Lets the trainer do one step."""
        ray.get(self.trainer.train.remote(step))

    def sync(self, transport: str | None) -> tuple[float, int]:
        """Brings the trainer's weights to every encoder.

        Args:
            transport: The transport's name, or None for a plain Ray object.

        Returns:
            Seconds until every encoder has them, and how many bytes came in, all encoders together.
        """
        weights = self.trainer.weights
        if transport is not None:
            weights = weights.options(tensor_transport=transport)
        start = time.perf_counter()
        ref = weights.remote()
        nbytes = sum(ray.get([encoder.load.remote(ref) for encoder in self.encoders]))
        return time.perf_counter() - start, nbytes

    def embed(self) -> torch.Tensor:
        """Returns the embeddings of the whole text, made by the encoders at the same time."""
        return torch.cat(ray.get([encoder.embed.remote() for encoder in self.encoders]))
