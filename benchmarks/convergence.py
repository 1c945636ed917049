#!/usr/bin/env python3
"""Convergence of SAN's four variants: PSNR on a validation set against epoch, as Fig. 1 of Dai et al. shows it.

    python benchmarks/convergence.py --data PHOTOS --val Set5 --out runs
    python benchmarks/convergence.py --data PHOTOS --val Set5 --out runs --json result.json --plot result.png
    python benchmarks/convergence.py --preset gpu --data DIV2K_train_HR --val Set5 --out runs --device cuda

base (NLRG_Base), ssc (adds share-source skips), foca (adds first-order attention) and soca (second-order attention in
its place) are trained by san_model's own train command on the same patches in the same order, from weights of the same
seed. Each run keeps its checkpoints in --out; the same command line continues wherever it was killed, and with more
--seeds it trains only what is new. Preset cpu takes minutes to an hour on two cores, preset gpu is the paper's network
of 20 groups of 10 blocks over 50 epochs.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this file, also when it is imported

import torch  # noqa: E402

import report  # noqa: E402
from san_model.data import dataset_name, load_pairs  # noqa: E402
from san_model.images import InputError, bicubic  # noqa: E402
from san_model.metrics import psnr_y  # noqa: E402
from san_model.model import SCALES, VARIANTS  # noqa: E402
from san_model.options import TrainOptions  # noqa: E402
from san_model.train import TrainingError, train  # noqa: E402

# An epoch is so many iterations, as in the paper, not one look at each image. The rest goes to the train command.
SCHEDULES = {"cpu": {"epochs": 20, "epoch": 75}, "gpu": {"epochs": 50, "epoch": 1000}}
RECIPES: dict[str, dict[str, Any]] = {
    "cpu": {
        "n_resgroups": 4, "n_resblocks": 2, "n_feats": 16, "reduction": 4, "patch": 24, "batch": 8, "lr": 1e-3,
        "schedule": "cosine", "warmup": 75, "clip": 1.0,
    },
    "gpu": {
        "n_resgroups": 20, "n_resblocks": 10, "n_feats": 64, "reduction": 16, "patch": 48, "batch": 16, "lr": 1e-4,
        "schedule": "step", "warmup": 0, "clip": 0.0,
    },
}  # fmt: skip
COLOURS = {"base": "#6b7280", "ssc": "#3b82f6", "foca": "#0f766e", "soca": "#c2410c"}
EXPLANATION = {
    "epoch": "so many iterations as the argument of this name says, of one batch each",
    "psnr": "mean PSNR of luma over the validation set in dB, after each epoch",
    "loss": "mean L1 loss of the epoch's batches, 0..255",
    "seconds": "training time to the end of the epoch, validations included; where others share the machine it means "
    "little",
    "bicubic": "PSNR of bicubic interpolation on the validation set",
    "mean_last": "mean PSNR of the last quarter of the epochs, over the seeds",
    "range_last": "smallest and largest such mean of one seed",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="FOLDER", help="training images")
    add("--val", required=True, metavar="FOLDER", help="images to validate on, such as Set5")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the runs and their checkpoints")
    add("--preset", choices=tuple(RECIPES), default="cpu", help="network and schedule (default: cpu)")
    add("--scale", type=int, choices=SCALES, default=2, help="upscaling factor (default: 2)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all four")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="a run of each variant for each (default: 0)")
    for name in ("epochs", "epoch", "n_resgroups", "n_resblocks", "n_feats", "reduction", "patch", "batch"):
        what = {"epochs": "epochs in all", "epoch": "iterations in an epoch"}.get(name, "as in san train")
        add(f"--{name.replace('_', '-')}", type=report.positive, metavar="N", help=f"{what} (default: by preset)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    add("--amp", choices=("none", "bf16", "fp16"), default="none", help="half precision (default: none)")
    add("--threads", type=report.positive, metavar="N", help="CPU threads (default: torch's choice)")
    add("--json", type=report.writable, metavar="FILE", help="write every curve")
    add("--plot", type=report.writable, metavar="FILE", help="draw the curves (PNG, or what the name's ending says)")
    arguments = report.parse(parser, argv)
    for name, value in (SCHEDULES[arguments.preset] | RECIPES[arguments.preset]).items():
        setattr(arguments, name, getattr(arguments, name, None) or value)
    arguments.seeds, arguments.variants = (list(dict.fromkeys(x)) for x in (arguments.seeds, arguments.variants))
    return arguments


def options(arguments: argparse.Namespace, variant: str, seed: int) -> TrainOptions:
    """What the train command does for one curve."""
    same = (*RECIPES[arguments.preset], "scale", "device", "amp", "data")
    return TrainOptions(
        out=arguments.out / f"{variant}-{seed}",
        val=[arguments.val],
        variant=variant,
        seed=seed,
        iterations=arguments.epochs * arguments.epoch,
        validate_every=arguments.epoch,
        checkpoint_every=arguments.epoch,
        log_every=arguments.epoch,
        resume=True,
        **{name: getattr(arguments, name) for name in same},
    )


def curve(arguments: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """Trains, or goes on training, one variant."""
    settings = options(arguments, variant, seed)
    history = train(settings)["history"]
    return {
        "variant": variant,
        "seed": seed,
        "parameters": sum(p.numel() for p in settings.network().parameters()),
        "epochs": [entry["iteration"] // arguments.epoch for entry in history],
        "psnr": [mean(entry["psnr"].values()) for entry in history],
        "loss": [entry["loss"] for entry in history],
        "seconds": [entry["seconds"] for entry in history],
    }


def bicubic_psnr(folder: str, scale: int) -> float:
    pairs = load_pairs([folder], scale, argument="--val")
    return mean(psnr_y(bicubic(pair.lr, scale), pair.hr, scale) for pair in pairs)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each variant the level reached, and how far the seeds differ in it."""
    levels: dict[str, list[float]] = {}
    for run in runs:
        last = run["psnr"][-max(len(run["psnr"]) // 4, 1) :]
        levels.setdefault(run["variant"], []).append(mean(last))
    return {name: {"mean_last": mean(each), "range_last": [min(each), max(each)]} for name, each in levels.items()}


def text(result: dict[str, Any]) -> str:
    rows = [["", "parameters", "seeds", "last epochs dB", "from", "to"]]
    for name, about in result["summary"].items():
        runs = [run for run in result["runs"] if run["variant"] == name]
        low, high = about["range_last"]
        cells = (f"{value:.3f}" for value in (about["mean_last"], low, high))
        rows.append([name, f"{runs[0]['parameters']:,}", str(len(runs)), *cells])
    return report.table(rows) + f"\nbicubic: {result['bicubic']:.3f} dB"


def plot(result: dict[str, Any], path: Path) -> None:
    """A thick line for the mean of each variant over the seeds, thin ones for the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.add_subplot()
    for name in result["summary"]:
        runs = [run for run in result["runs"] if run["variant"] == name]
        for run in runs if len(runs) > 1 else ():
            axis.plot(run["epochs"], run["psnr"], color=COLOURS[name], linewidth=0.6, alpha=0.6)
        means = [mean(values) for values in zip(*(run["psnr"] for run in runs), strict=True)]
        axis.plot(runs[0]["epochs"], means, color=COLOURS[name], linewidth=1.8, label=f"NLRG_{_title(name)}")
    axis.axhline(result["bicubic"], color="black", linewidth=0.8, linestyle=":", label="bicubic")
    arguments, machine = result["arguments"], result["machine"]
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(f"epoch of {arguments['epoch']} iterations")
    axis.set_ylabel(f"PSNR [dB] on {arguments['val']}, x{arguments['scale']}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(linewidth=0.4, alpha=0.5)
    axis.legend(frameon=False, loc="lower right")
    where = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]
    seeds = f"{len(arguments['seeds'])} seed" + "s" * (len(arguments["seeds"]) > 1)
    figure.suptitle(
        f"SAN, {arguments['n_resgroups']} groups of {arguments['n_resblocks']} blocks, {arguments['n_feats']} channels,"
        f" {seeds}\n{where}; torch {result['software']['torch']}; {result['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def _title(variant: str) -> str:
    """As in the paper: Base, SSC, FOCA, SOCA."""
    return variant.title() if variant == "base" else variant.upper()


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = report.record("convergence", arguments, EXPLANATION) | {"runs": []}
    result["arguments"] |= {
        "data": [dataset_name(folder) for folder in arguments.data],
        "val": dataset_name(arguments.val),
    }
    progress = report.Progress()
    try:
        result["bicubic"] = bicubic_psnr(arguments.val, arguments.scale)
        for seed in arguments.seeds:
            for variant in arguments.variants:
                done = len(result["runs"])
                total = len(arguments.seeds) * len(arguments.variants)
                progress.stage(f"run {done + 1} of {total}: {variant}, seed {seed}\n")
                result["runs"].append(curve(arguments, variant, seed))
                result["summary"] = summary(result["runs"])
                if arguments.json:  # after each run: what was trained is not lost with the next
                    report.write_json(arguments.json, result)
    except (InputError, TrainingError, OSError) as error:
        print(f"convergence.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convergence.py: interrupted; the same command line goes on from here", file=sys.stderr)
        return 130
    print(text(result))
    if arguments.plot:
        plot(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
