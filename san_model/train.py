"""Training of SAN, alone or under torchrun, resumable at any moment to the same weights."""

import dataclasses
import fcntl
import json
import math
import os
import resource
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

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
from .options import TrainOptions, flag
from .upscale import console, progress_bar, super_resolve

Tensors = list[Tensor] | tuple[Tensor, ...]
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What may differ between a run and its continuation, because it does not change the weights that come out.
# (Of copies and collages the list of images tells.)
FREE = {"out", "data", "val", "init", "resume", "workers", "cache", "bad_files", "validate_every", "checkpoint_every",
        "log_every", "device", "shrink", "collages"}  # fmt: skip
VALIDATED = 3  # the smallest side of an LR image: more must be left of HR than borders of ``scale`` pixels


class TrainingError(RuntimeError):
    """The training cannot go on."""


def train(options: TrainOptions) -> dict[str, Any]:
    """Runs the command; returns {"iteration", "best", "history"}, see :class:`Run`."""
    options.check()
    with (
        deterministic(options.deterministic),
        processes(options.device) as process,
        sole_writer(options.out, process),
    ):
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


@contextmanager
def sole_writer(folder: Path, process: Process) -> Iterator[None]:
    """Keeps the folder from other trainings: the process that writes holds a lock, which goes when it dies."""
    free = True
    with ExitStack() as stack:
        if process.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / ".lock").open("a"))
            try:
                # Not flock: forked workers, which outlive a kill for a while, would hold its lock, too.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                free = False
            except OSError:
                pass  # a file system without locks
            if free:
                for left in (*folder.glob(".unfinished-*.pt"), *folder.glob(".unfinished-*.safetensors")):
                    left.unlink()  # by a training that was killed
        if not process.gather(free)[0]:
            raise InputError(f"--out {folder}: another training writes to it")
        yield


class Run:
    """One training: what a checkpoint holds, and how it goes on.

    Attributes:
        iteration: batches done.
        history: of each validation the iteration, learning rate, mean loss since the last, PSNR per data set, seconds.
        best: the iteration and mean PSNR of the best validation and what it was on, or {}.
    """

    def __init__(self, options: TrainOptions, process: Process) -> None:
        self.options, self.process, self.device = options, process, process.device
        self.last = options.out / "last.pt"
        if self.last.exists() and not options.resume:
            raise InputError(f"--out {options.out}: holds a run already; --resume continues it")
        torch.manual_seed(options.seed)
        self.model = options.network()  # first: it names options that cannot be used, and images take a while
        self.pairs = self._load(options.data, "--data", options.patch, options.shrink)
        self.pairs += collages_of(self.pairs, options.scale, options.collages, options.seed, options.patch)
        self.validation = {
            key: self._load([root], "--val", VALIDATED) for key, root in by_name(options.val, "--val").items()
        }
        self.patches = Patches(self.pairs, options.scale, options.patch, options.seed, options.augment)

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
            loaded = SAN.from_checkpoint(path)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"--init {path}: {error}") from error
        white, own_white = loaded.config["rgb_range"], self.model.config["rgb_range"]
        if white != own_white:
            raise InputError(f"--init {path}: white is {white:g} for these weights, and {own_white:g} here")
        source, own = loaded.state_dict(), self.model.state_dict()
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
            self._weights().save(self.options.out / "last.safetensors")
            with replacing(self.options.out / "history.json") as path:
                path.write_text(json.dumps({"best": self.best, "history": self.history}, indent=1) + "\n")
            with replacing(self.last) as path:  # last: all else can be made from it
                torch.save(state, path)
        self.process.gather(None)  # nobody goes on before it is written

    def _restore(self) -> None:
        try:
            state = torch.load(self.last, map_location="cpu", weights_only=True)
            self._take(state)
        except InputError:
            raise
        except Exception as error:  # of many types, depending on what is wrong with the file
            said = textwrap.shorten(str(error), 500)  # one line
            raise InputError(f"--resume: {self.last} cannot be read as a checkpoint of a run ({said})") from error
        self.say(f"resumed {self.last} at iteration {self.iteration}")

    def _take(self, state: dict[str, Any]) -> None:
        """Goes on from the state; raises InputError for that of another run, and anything for what is no state."""
        then, now = state["options"], self._binding()
        for key, value in now.items():
            if then.get(key) != value and key == "images":
                given = " ".join(self.options.data)
                raise InputError(f"--data {given}, --shrink, --collages: not the images of {self.last}")
            if then.get(key) != value:
                raise InputError(f"{flag(key)} {value}: the run in {self.options.out} has {then.get(key)}")
        for name, value in self._state().items():
            if type(state.get(name)) is not type(value):
                raise ValueError(f"{name}: expected {type(value).__name__}, got {type(state.get(name)).__name__}")
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        if not 0 <= self.iteration <= self.options.iterations:
            raise InputError(f"--resume: {self.last} is at iteration {self.iteration} of {self.options.iterations}")
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.module.load_state_dict(state["ema"])
            self.average.n_averaged.fill_(self.iteration)
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("optimizer: not of the parameters' shapes")
        self.scaler.load_state_dict(state["scaler"])
        self.loss_sum, self.loss_count = state["loss"]
        self.history, self.best = state["history"], state["best"]
        if self.best.get("data", list(self.validation)) != list(self.validation):
            self.say(f"--val: best.safetensors is chosen anew, for it was by {', '.join(self.best['data'])}")
            self.best = {}
        if len(state["random"]) == self.process.world:
            random = state["random"][self.process.rank]
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], self.device)

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
                self.best = {"iteration": self.iteration, "psnr": overall, "data": list(means)}
                if self.process.rank == 0:
                    model.save(self.options.out / "best.safetensors")

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
