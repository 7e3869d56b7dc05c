"""Actors of the demo: one trainer and two encoders. None of them names a transport."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from encoder import SentenceEncoder, Weights, load_weights, train_step

import ray


@ray.remote(enable_tensor_transport=True)
class Trainer:
    """Holds the weights and changes them in place."""

    def __init__(self, model_dir: Path) -> None:
        torch.set_num_threads(1)
        self._weights = load_weights(model_dir)

    def train(self, step: int) -> None:
        """Run one training step."""
        train_step(self._weights, step)

    def weights(self) -> Weights:
        """Return the weights. The options of the caller select plain objects or RDT."""
        return self._weights


@ray.remote(enable_tensor_transport=True)
class Encoder:
    """Embeds its share of the text with the latest weights that it received."""

    def __init__(self, model_dir: Path, sentences: list[str]) -> None:
        torch.set_num_threads(1)
        self._encoder = SentenceEncoder(model_dir)
        self._sentences = sentences
        self._weights: Weights = {}

    def load(self, weights: Weights) -> int:
        """Load new weights and return their size in bytes."""
        self._weights = weights
        return sum(weight.nbytes for weight in weights.values())

    def embed(self) -> torch.Tensor:
        """Return the embeddings of the sentences of this actor."""
        return self._encoder.embed(self._weights, self._sentences)


class Team:
    """The actors as a group, for the driver; each encoder gets one of the shares of the text."""

    def __init__(self, model_dir: Path, shares: list[list[str]]) -> None:
        self.trainer = Trainer.remote(model_dir)
        self.encoders = [Encoder.remote(model_dir, share) for share in shares]

    def train(self, step: int) -> None:
        """Run one training step."""
        ray.get(self.trainer.train.remote(step))

    def sync(self, transport: str | None) -> tuple[float, int]:
        """Send the weights of the trainer to every encoder.

        Args:
            transport: The name of the transport, or None for a plain Ray object.

        Returns:
            The seconds until every encoder has the weights, and the bytes received by all encoders.
        """
        weights = self.trainer.weights
        if transport is not None:
            weights = weights.options(tensor_transport=transport)
        start = time.perf_counter()
        ref = weights.remote()
        nbytes = sum(ray.get([encoder.load.remote(ref) for encoder in self.encoders]))
        return time.perf_counter() - start, nbytes

    def embed(self) -> torch.Tensor:
        """Return the embeddings of the whole text, computed by the encoders in parallel."""
        return torch.cat(ray.get([encoder.embed.remote() for encoder in self.encoders]))
