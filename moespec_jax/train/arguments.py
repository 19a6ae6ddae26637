"""Flags of the training command: settings of the draft head, and of the training."""

import argparse

from moespec_jax.cli.arguments import DTYPES
from moespec_jax.cli.command import count
from moespec_jax.train.objective import LOSSES
from moespec_jax.train.optimizer import OptimizerConfig
from moespec_jax.train.run import Pace
from moespec_jax.train.trainer import BlockRecipe, Recipe, SparkRecipe

# Fields of `DraftConfig` that have a flag, with its help text.
VARIANTS = {
    "fc_norm": "RMS norm of each auxiliary hidden state of the target (EAGLE-3.1)",
    "norm_before_fc": "one RMS norm over all auxiliary hidden states together",
    "norm_before_residual": "start the residual stream from the normed features",
    "norm_output": "pass the normed output to the next draft step (EAGLE-3.1)",
}
# Choices for the parts of a DSpark head, and the rank of published heads.
SPARK = {"markov": ["none", "vanilla", "gated", "rnn"], "confidence": ["none", "hidden", "hidden+markov"]}
MARKOV_RANK = 256
# Flags that only a DSpark head has.
SPARK_FLAGS = ("markov", "markov_rank", "confidence", "confidence_weight")


def add_head_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags for the kind and the settings of the draft head."""
    group.add_argument(
        "--head",
        choices=["eagle3", "dflash", "dspark"],
        default="eagle3",
        help="kind of the head; dflash drafts a block in one pass, and dspark is dflash with a Markov and a confidence"
        " part (default: %(default)s)",
    )
    group.add_argument(
        "--draft-vocab-size",
        type=count,
        metavar="N",
        help="number of tokens that the head can draft, the most frequent of the data (default: 32000, or all of a"
        " smaller vocabulary)",
    )
    group.add_argument(
        "--boundaries",
        metavar="2,24,45",
        help="hidden states of the target that the head reads: b is the one that enters layer b, L that after the last"
        " of L layers (default: 2, L/2, L - 3, or their nearest increasing ones where L is below 7; of a DFlash or"
        " DSpark head the outputs of as many layers as it has, evenly from 1 to L - 3)",
    )
    group.add_argument(
        "--intermediate-size",
        type=count,
        metavar="N",
        help="width of the head's MLP (default: that of the target's dense MLPs, else 3 times the hidden size)",
    )
    group.add_argument(
        "--layers", type=count, metavar="N", help="layers of the head (default: 1, of a DFlash or DSpark head 5)"
    )
    for name, meaning in VARIANTS.items():
        group.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=f"{meaning}; EAGLE-3 heads only")
    group.add_argument(
        "--qk-norm", action="store_true", help="RMS norm of each query and key, as in Qwen3; EAGLE-3 heads only"
    )


def add_block_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags for the settings of a DFlash or DSpark head."""
    group.add_argument(
        "--block-size",
        type=count,
        default=8,
        metavar="N",
        help="rows of a block: the newest token, and mask tokens behind it; each drafts a token, but for the first of"
        " a dflash head (default: %(default)s)",
    )
    group.add_argument(
        "--anchors",
        type=count,
        default=BlockRecipe.anchors,
        metavar="N",
        help="blocks a row, at random positions (default: %(default)s)",
    )
    group.add_argument(
        "--mask-token-id",
        type=int,
        metavar="ID",
        help="token that stands for those not yet known (default: the last of the vocabulary)",
    )


def add_spark_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags for the parts of a DSpark head. They are None where they are not given."""
    group.add_argument(
        "--markov",
        choices=SPARK["markov"],
        help="form of the bias by the token drafted last (default: vanilla)",
    )
    group.add_argument("--markov-rank", type=count, metavar="N", help=f"rank of that bias (default: {MARKOV_RANK})")
    group.add_argument(
        "--confidence",
        choices=SPARK["confidence"],
        help="what the estimate of acceptance reads: the hidden state, and the Markov part's vector of the token before"
        " (default: hidden+markov, without a Markov part hidden)",
    )
    group.add_argument(
        "--confidence-weight",
        type=float,
        metavar="X",
        help=f"weight of the estimate's loss (default: {SparkRecipe.confidence_weight})",
    )


def add_training_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags for the settings of the training."""
    group.add_argument(
        "--steps",
        type=count,
        default=10_000,
        metavar="N",
        help="optimizer steps; a larger number than that of an existing run extends it (default: %(default)s)",
    )
    group.add_argument(
        "--batch", type=count, default=Recipe.batch, metavar="N", help="rows a step (default: %(default)s)"
    )
    group.add_argument(
        "--length", type=count, metavar="N", help="tokens a row (default: 2048, or the target's shorter context)"
    )
    group.add_argument(
        "--unroll",
        type=count,
        default=Recipe.unroll,
        metavar="N",
        help="draft steps that the head is unrolled over (default: %(default)s)",
    )
    group.add_argument(
        "--decay",
        type=float,
        default=Recipe.decay,
        metavar="X",
        help="the loss of draft step j has the weight X^j (default: %(default)s)",
    )
    group.add_argument(
        "--loss", choices=list(LOSSES), default=Recipe.loss, help="loss of a draft step (default: %(default)s)"
    )
    group.add_argument(
        "--seed", type=int, default=Recipe.seed, help="seed of all random numbers (default: %(default)s)"
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the target and of arithmetic (default: float32 on CPU, bfloat16 elsewhere)",
    )
    group.add_argument(
        "--save-every",
        type=count,
        default=Pace.save_every,
        metavar="N",
        help="steps between checkpoints (default: %(default)s)",
    )
    group.add_argument(
        "--evaluate-every",
        type=count,
        default=Pace.evaluate_every,
        metavar="N",
        help="steps between measurements of held-out accuracy (default: %(default)s)",
    )
    group.add_argument(
        "--no-recompute",
        action="store_true",
        help="keep the activations of all draft steps for the backward pass: faster, needs more memory",
    )


def add_optimizer_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags for optimizer and learning-rate schedule."""
    defaults = OptimizerConfig(steps=1)
    group.add_argument(
        "--optimizer",
        choices=["adamw", "muon"],
        default=defaults.name,
        help="adamw, or muon for matrices and adamw for the rest (default: %(default)s)",
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        default=defaults.learning_rate,
        metavar="X",
        help="peak learning rate; with muon, that of matrices (default: %(default)s)",
    )
    group.add_argument(
        "--adam-learning-rate",
        type=float,
        default=defaults.adam_learning_rate,
        metavar="X",
        help="with muon: peak learning rate of all other parameters, which AdamW updates (default: %(default)s)",
    )
    group.add_argument(
        "--warmup-steps",
        type=int,
        default=defaults.warmup_steps,
        metavar="N",
        help="steps of linear warm-up (default: %(default)s)",
    )
    group.add_argument(
        "--schedule",
        choices=["linear", "cosine"],
        default=defaults.schedule,
        help="decay of the learning rate to 0 (default: %(default)s)",
    )
