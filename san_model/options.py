"""What a training can be told, and the presets."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import SAN
from .images import InputError

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},  # the defaults below
    "small": {
        "n_resgroups": 3, "n_resblocks": 3, "n_feats": 32, "reduction": 8, "iterations": 60_000, "lr": 5e-4,
        "schedule": "cosine", "warmup": 500, "ema": 0.999, "clip": 1.0,
    },
    # The package's own weights: wide rather than deep, and in bfloat16, for the sake of a CPU's convolutions.
    "light": {
        "n_resgroups": 2, "n_resblocks": 2, "n_feats": 48, "reduction": 8, "patch": 32, "batch": 8,
        "iterations": 15_000, "lr": 1e-3, "schedule": "cosine", "warmup": 500, "ema": 0.999, "clip": 1.0,
        "amp": "bf16", "channels_last": True,
    },
}  # fmt: skip


@dataclass
class TrainOptions:
    """Trains a network on a folder of images.

    Each folder of --data and --val holds HR images, or a folder HR of them; LR images are taken from LR_bicubic/X2
    beside HR (X3, ... by scale) where that exists and else made exactly as MATLAB makes them. --out receives last.pt,
    from which --resume continues (also after a kill) to the same weights bit for bit, the weights last.safetensors and
    best.safetensors (by --val), history.json, and TensorBoard's event files; one training at a time holds its .lock.
    Under torchrun the processes share each batch. --preset paper (the default) is the paper's network and recipe, small
    one that trains in hours, light that of the package's own weights, whose model card tells what it took.

    Args:
        data: folders of training images
        out: folder of the run
        val: folders of images to validate on; the best weights are those with the highest mean PSNR on them
        scale: factor between LR and HR
        n_resgroups: residual groups
        n_resblocks: residual blocks in a group
        n_feats: channels, a multiple of 8
        reduction: what the channel attention divides the channels by
        variant: base (no attention in the groups), ssc (share-source skips), foca (first-order attention), soca (SAN)
        root_iterations: Newton-Schulz iterations of the covariance's square root
        normalization: newton_schulz, or eig for the exact root by eigen-decomposition
        init: weights to start from, as far as they fit (a network of another scale, say)
        patch: side of the LR patches
        batch: patches in a batch, over all processes
        iterations: batches in all
        lr: learning rate of Adam
        schedule: step halves the learning rate every --lr-step iterations, cosine lowers it to 0 at the end
        lr_step: iterations until the learning rate is halved
        warmup: iterations over which the learning rate rises from 0
        ema: decay of the running mean of the weights, which is validated and written in their place; 0 for none
        amp: half precision where torch.autocast allows it
        clip: largest norm of the gradient, 0 for any
        augment: flips and rotations
        shrink: fractions of its size (0.75 0.5, say) of which each image is trained on as a copy, too: few photographs
            then show more kinds of detail
        collages: images of 1024 x 1024 pixels to train on, too, in which shapes filled with pieces of the others cover
            each other: few photographs then show more edges
        seed: of the initial weights, the collages and the patches
        resume: continue the run in --out, or start it where there is none yet
        workers: processes that cut patches
        cache: folder for decoded images, shared by processes and runs; by default they are held in memory
        bad_files: refuse stops at a broken or too small image, skip names it and goes on
        validate_every: iterations between validations
        checkpoint_every: iterations between checkpoints
        log_every: iterations between lines of TensorBoard and, without a terminal, of output
        device: cpu, cuda, cuda:1, ...; auto is cuda where there is one
        deterministic: the same bits in every run, at some cost in speed on CUDA
        channels_last: memory layout of the network, often the faster one with --amp on CUDA
        compile: run the network through torch.compile
    """

    data: list[str]
    out: Path
    val: list[str] = field(default_factory=list)
    scale: Literal[2, 3, 4, 8] = 2
    n_resgroups: int = 20
    n_resblocks: int = 10
    n_feats: int = 64
    reduction: int = 16
    variant: Literal["base", "ssc", "foca", "soca"] = "soca"
    root_iterations: int = 5
    normalization: Literal["newton_schulz", "eig"] = "newton_schulz"
    init: Path | None = None
    patch: int = 48
    batch: int = 16
    iterations: int = 1_000_000
    lr: float = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    lr_step: int = 200_000
    warmup: int = 0
    ema: float = 0.0
    amp: Literal["none", "bf16", "fp16"] = "none"
    clip: float = 0.0
    augment: bool = True
    shrink: list[float] = field(default_factory=list)
    collages: int = 0
    seed: int = 0
    resume: bool = False
    workers: int = 2
    cache: Path | None = None
    bad_files: Literal["refuse", "skip"] = "refuse"
    validate_every: int = 1000
    checkpoint_every: int = 500
    log_every: int = 100
    device: str = "auto"
    deterministic: bool = True
    channels_last: bool = False
    compile: bool = False

    def check(self) -> None:
        """Raises InputError that names the first option which cannot be used, and its value."""
        for name in ("patch", "batch", "iterations", "lr_step", "validate_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{flag(name)} {getattr(self, name)}: expected 1 or more")
        for name in ("warmup", "clip", "collages", "workers", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{flag(name)} {getattr(self, name)}: expected 0 or more")
        if self.seed >= 2**63:
            raise InputError(f"--seed {self.seed}: expected less than 2**63")
        if not self.lr > 0:
            raise InputError(f"--lr {self.lr}: expected a positive number")
        if not 0 <= self.ema < 1:
            raise InputError(f"--ema {self.ema}: expected at least 0 and less than 1")
        for factor in self.shrink:
            if not 0 < factor < 1:
                raise InputError(f"--shrink {factor}: expected more than 0 and less than 1")

    def network(self) -> SAN:
        """A new network."""
        names = ("scale", "n_resgroups", "n_resblocks", "n_feats", "reduction", "variant", "normalization")
        try:
            return SAN(**{name: getattr(self, name) for name in names}, iterations=self.root_iterations)
        except ValueError as error:
            name, _, said = str(error).partition(":")
            raise InputError(f"{flag('root_iterations' if name == 'iterations' else name)}:{said}") from error

    def learning_rate(self, iteration: int) -> float:
        """Of a batch, counted from 0."""
        risen = self.lr * (min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0)
        if self.schedule == "cosine":
            return risen * 0.5 * (1 + math.cos(math.pi * min(iteration / self.iterations, 1.0)))
        return risen * 0.5 ** (iteration // self.lr_step)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
