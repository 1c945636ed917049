"""Training of SAN, alone or under torchrun, resumable at any moment to the same weights."""

import dataclasses
import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from . import SAN
from .checkpoint import replacing
from .data import Batches, Pair, Patches, by_name, collages_of, load_pairs
from .distributed import Process, processes
from .images import InputError, to_uint8
from .metrics import psnr_y
from .upscale import console, progress_bar, super_resolve

Tensors = list[Tensor] | tuple[Tensor, ...]
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
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
# What may differ between a run and its continuation, because it does not change the weights that come out.
# (Of copies and collages the list of images tells.)
FREE = {"out", "data", "val", "init", "resume", "workers", "cache", "bad_files", "validate_every", "checkpoint_every",
        "log_every", "device", "shrink", "collages"}  # fmt: skip


@dataclass
class TrainOptions:
    """Trains a network on a folder of images.

    Each folder of --data and --val holds HR images, or a folder HR of them; LR images are taken from LR_bicubic/X2
    beside HR (X3, ... by scale) where that exists and else made exactly as MATLAB makes them. --out receives last.pt,
    from which --resume continues (also after a kill) to the same weights bit for bit, the weights last.safetensors and
    best.safetensors (by --val), history.json, and TensorBoard's event files. Under torchrun the processes share each
    batch. --preset paper (the default) is the paper's network and recipe, small one that trains in hours, light that
    of the package's own weights, whose model card tells what it took.

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


class TrainingError(RuntimeError):
    """The training cannot go on."""


def train(options: TrainOptions) -> dict[str, Any]:
    """Runs the command; returns {"iteration", "best", "history"}, see :class:`Run`."""
    options.check()
    with deterministic(options.deterministic), processes(options.device) as process:
        return Run(options, process).run()


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """The same bits in every run, as far as torch can."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic  # a module whose attributes are properties
    filled = switches.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    switches.fill_uninitialized_memory = False  # costs time and only shows up faults
    try:
        with warnings.catch_warnings():
            # Max pooling over disjoint windows is on torch's list, though no two windows add to one gradient.
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = filled


class Run:
    """One training: what a checkpoint holds, and how it goes on.

    Attributes:
        iteration: batches done.
        history: of each validation the iteration, learning rate, mean loss since the last, PSNR per data set, seconds.
        best: the iteration and mean PSNR of the best validation, or {}.
    """

    def __init__(self, options: TrainOptions, process: Process) -> None:
        self.options, self.process, self.device = options, process, process.device
        self.last = options.out / "last.pt"
        if self.last.exists() and not options.resume:
            raise InputError(f"--out {options.out}: holds a run already; --resume continues it")
        self.pairs = self._load(options.data, "--data", options.patch, options.shrink)
        self.pairs += collages_of(self.pairs, options.scale, options.collages, options.seed, options.patch)
        self.validation = {key: self._load([root], "--val", 1) for key, root in by_name(options.val, "--val").items()}
        self.patches = Patches(self.pairs, options.scale, options.patch, options.seed, options.augment)

        torch.manual_seed(options.seed)
        self.model = options.network()
        if options.init is not None and not self.last.exists():
            self._initialise(options.init)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout)  # type: ignore[call-overload]  # torch lists no such overload
        self.average = AveragedModel(self.model, multi_avg_fn=self._average) if options.ema else None
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr, betas=(0.9, 0.99))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.iteration, self.seconds, self.loss_sum, self.loss_count = 0, 0.0, 0.0, 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        if self.last.exists():
            self._restore()
        if options.compile:
            self.model.compile()
        self.parallel: nn.Module = self.model
        if process.world > 1:
            self.parallel = nn.parallel.DistributedDataParallel(
                self.model, device_ids=[self.device] if self.device.type == "cuda" else None
            )

    def say(self, line: str) -> None:
        if self.process.rank == 0:
            console.print(line)

    def _load(self, roots: Sequence[str | Path], argument: str, least: int, shrink: Sequence[float] = ()) -> list[Pair]:
        options = self.options
        return load_pairs(
            roots, options.scale, argument=argument, least=least, bad_files=options.bad_files, cache=options.cache,
            shrink=shrink, report=self.say,
        )  # fmt: skip

    def _average(self, means: Tensors, values: Tensors, _: Tensor | int) -> None:
        """Exponential, with a shorter memory at first, or the initial weights would stay in a short run's mean."""
        decay = min(self.options.ema, (1 + self.iteration) / (10 + self.iteration))
        torch._foreach_lerp_(means, values, 1 - decay)

    def _weights(self) -> SAN:
        """What is evaluated and kept: the average where there is one."""
        return cast(SAN, self.average.module) if self.average else self.model

    def _initialise(self, path: Path) -> None:
        try:
            source = SAN.from_checkpoint(path).state_dict()
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"--init {path}: {error}") from error
        own = self.model.state_dict()
        fitting = {key: value for key, value in source.items() if key in own and own[key].shape == value.shape}
        self.model.load_state_dict(own | fitting)
        self.say(f"{len(fitting)} of {len(own)} tensors start from {path}")

    # --- checkpoints

    def _state(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return ({"ema": self.average.module.state_dict()} if self.average else {}) | {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.process.gather(random),
            "iteration": self.iteration,  # the position in the data and in the schedule, for both are functions of it
            "seconds": self.seconds,
            "loss": [self.loss_sum, self.loss_count],
            "history": self.history,
            "best": self.best,
            "options": self._binding(),
        }

    def _binding(self) -> dict[str, Any]:
        """What has to be the same for a continuation to lead to the same weights."""
        values = {key: value for key, value in dataclasses.asdict(self.options).items() if key not in FREE}
        if self.options.schedule == "step":
            values.pop("iterations")  # only the cosine depends on where the end is
        return values | {"images": [[pair.path.name, *pair.hr.shape[1:]] for pair in self.pairs]}

    def _save(self) -> None:
        state = self._state()
        if self.process.rank == 0:
            weights = self._weights()
            with replacing(self.options.out / "last.safetensors") as path:
                weights.save(path)
            with replacing(self.options.out / "history.json") as path:
                path.write_text(json.dumps({"best": self.best, "history": self.history}, indent=1) + "\n")
            with replacing(self.last) as path:  # last: all else can be made from it
                torch.save(state, path)
        self.process.gather(None)  # nobody goes on before it is written

    def _restore(self) -> None:
        try:
            state = torch.load(self.last, map_location="cpu", weights_only=True)
            then, now = state["options"], self._binding()
        except Exception as error:  # of many types, depending on what is wrong with the file
            raise InputError(f"--resume: {self.last} cannot be read as a checkpoint of a run ({error})") from error
        for key, value in now.items():
            if then.get(key) != value and key == "images":
                raise InputError(
                    f"--data {' '.join(self.options.data)}: not the images that {self.last} was trained on"
                )
            if then.get(key) != value:
                raise InputError(f"{flag(key)} {value}: the run in {self.options.out} has {then.get(key)}")
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.module.load_state_dict(state["ema"])
            self.average.n_averaged.fill_(state["iteration"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.loss_sum, self.loss_count = state["loss"]
        self.history, self.best = state["history"], state["best"]
        if len(state["random"]) == self.process.world:
            random = state["random"][self.process.rank]
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], self.device)
        self.say(f"resumed {self.last} at iteration {self.iteration}")

    # --- training

    def run(self) -> dict[str, Any]:
        options, process = self.options, self.process
        loader = DataLoader(
            self.patches,
            batch_sampler=Batches(self.iteration, options.iterations, options.batch, process.rank, process.world),
            num_workers=options.workers,
            # Forked workers share the decoded images with this process.
            multiprocessing_context="fork" if options.workers and sys.platform == "linux" else None,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader would draw from the generator that checkpoints hold
        )
        parameters = sum(p.numel() for p in self.model.parameters())
        self.say(
            f"SAN x{options.scale}, {parameters:,} parameters; {len(self.pairs)} images; "
            f"{process.world} x {self.device}; iterations {self.iteration} to {options.iterations}"
        )
        writer = None
        if process.rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # here: it takes a second to import

            options.out.mkdir(parents=True, exist_ok=True)
            writer = SummaryWriter(str(options.out), purge_step=self.iteration + 1)
        bar = progress_bar("loss {task.fields[loss]:.3f}", "{task.fields[psnr]}", "{task.fields[speed]}",
                           "{task.fields[memory]}")  # fmt: skip
        bar.disable = process.rank != 0 or not console.is_terminal
        with bar, closing(writer) if writer is not None else nullcontext():
            task = bar.add_task("train", total=options.iterations, completed=self.iteration, loss=float("nan"), psnr="",
                                speed="", memory="")  # fmt: skip
            start = logged = time.monotonic()
            start -= self.seconds
            since = self.iteration
            self.parallel.train()
            for lr, hr, indices in loader:
                loss = self._step(lr, hr, indices)
                self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
                self.iteration += 1
                bar.update(task, completed=self.iteration, loss=loss)
                final = self.iteration == options.iterations
                if self.iteration % options.log_every == 0 or final:
                    now = time.monotonic()
                    speed, logged, since = (self.iteration - since) / (now - logged), now, self.iteration
                    shown: dict[str, Any] = {"psnr": self._latest(), "speed": f"{speed:.2f} it/s"}
                    shown["memory"] = self._memory()
                    bar.update(task, **shown)
                    if writer is not None:
                        writer.add_scalar("train/loss", loss, self.iteration)
                        writer.add_scalar("train/lr", self.options.learning_rate(self.iteration - 1), self.iteration)
                        writer.add_scalar("train/iterations_per_second", speed, self.iteration)
                    if not console.is_terminal:
                        texts = [
                            f"{self.iteration}/{options.iterations}",
                            f"loss {loss:.3f}",
                            *filter(None, shown.values()),
                        ]
                        self.say("  ".join(texts))
                validated = self.iteration % options.validate_every == 0 or final
                self.seconds = time.monotonic() - start
                if validated:
                    self._validate(writer)
                if validated or self.iteration % options.checkpoint_every == 0:
                    self._save()
                    if writer is not None:
                        writer.flush()
        return {"iteration": self.iteration, "best": self.best, "history": self.history}

    def _step(self, lr: Tensor, hr: Tensor, indices: Tensor) -> float:
        """One update of the weights; returns the loss, the mean over all processes."""
        options, device = self.options, self.device
        lr, hr = (images.to(device, non_blocking=True).float() for images in (lr, hr))
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate(self.iteration)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=AMP[options.amp] or torch.bfloat16, enabled=options.amp != "none"):
            output = self.parallel(lr)
        loss = F.l1_loss(output.float(), hr)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip or float("inf"))
        mean = self.process.sum(torch.stack([loss.detach(), norm])) / self.process.world
        value, norm_value = mean.tolist()
        # With fp16 an overflowing gradient is the scaler's business: it leaves out the step.
        if not math.isfinite(value) or (options.amp != "fp16" and not math.isfinite(norm_value)):
            self._refuse(output.detach(), hr, indices, value)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update_parameters(self.model)
        return value

    def _refuse(self, output: Tensor, hr: Tensor, indices: Tensor, loss: float) -> None:
        """Raises TrainingError that names the patches of the batch, in every process the same."""
        finite = (output.float() - hr).abs().flatten(1).mean(1).isfinite().tolist()
        lines = [
            f"  {self.patches.describe(int(index))}" + ("" if good else "  <- not finite")
            for index, good in zip(indices, finite, strict=True)
        ]
        everything = [line for part in self.process.gather(lines) for line in part]
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        raise TrainingError(
            f"iteration {self.iteration + 1}: {what}; the weights are as they were before it. The batch:\n"
            + "\n".join(everything)
        )

    def _validate(self, writer: Any) -> None:
        """PSNR of each validation set, the images shared among the processes; keeps the best weights."""
        model, scale = self._weights(), self.options.scale
        model.eval()
        means = {}
        for name, pairs in self.validation.items():
            sums = torch.zeros(1, device=self.device, dtype=torch.float64)
            for pair in pairs[self.process.rank :: self.process.world]:
                with torch.compiler.set_stance("force_eager") if self.options.compile else nullcontext():  # many sizes
                    image = super_resolve(model, pair.lr.float())
                sums += psnr_y(to_uint8(image), pair.hr, scale)
            means[name] = self.process.sum(sums).item() / len(pairs)
        model.train()
        self.history.append({
            "iteration": self.iteration,
            "epoch": self.iteration * self.options.batch / len(self.pairs),
            "lr": self.options.learning_rate(self.iteration - 1),
            "loss": self.loss_sum / self.loss_count,
            "psnr": means,
            "seconds": self.seconds,
        })  # fmt: skip
        self.loss_sum, self.loss_count = 0.0, 0
        if writer is not None:
            for name, value in means.items():
                writer.add_scalar(f"psnr/{name}", value, self.iteration)
        if means:
            overall = sum(means.values()) / len(means)
            self.say(
                f"{self.iteration}: PSNR-Y " + ", ".join(f"{name} {value:.3f} dB" for name, value in means.items())
            )
            if overall > self.best.get("psnr", -float("inf")):
                self.best = {"iteration": self.iteration, "psnr": overall}
                if self.process.rank == 0:
                    with replacing(self.options.out / "best.safetensors") as path:
                        model.save(path)

    def _latest(self) -> str:
        """The PSNR of the latest validation."""
        psnr = self.history[-1]["psnr"] if self.history else {}
        return " ".join(f"{name} {value:.2f} dB" for name, value in psnr.items())

    def _memory(self) -> str:
        """The peak so far: of the device, or of this process on the CPU."""
        if self.device.type == "cuda":
            return f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.2f} GiB"
        unit = 1 if sys.platform == "darwin" else 2**10
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"
