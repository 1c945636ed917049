#!/usr/bin/env python3
"""A small classifier of handwritten digits, with average pooling and with MPNCOV in its place.

    python benchmarks/classifier.py                                         minutes on one CPU core
    python benchmarks/classifier.py --json result.json --plot result.png

Three convolutions, the pooling, one linear layer; scikit-learn's 8 x 8 digits, which lie in its package. Both get the
same convolutions, images, batches, steps and schedule. Each seed divides the 1797 images into test and training
images. The learning rate is chosen for each by its accuracy on a quarter of the training images, held back, with seeds
of their own; the smallest of the best. Then five other seeds train on all of theirs, and look at their test images
once; some of these were among the images that the learning rate was chosen by, the same for both. The same bits on each
run of one machine.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this file, also when it is imported

import torch  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.model_selection import train_test_split  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import report  # noqa: E402
from isqrt_cov.mpncov import MPNCOV  # noqa: E402

CHANNELS, CLASSES = 32, 10
TEST_IMAGES = 500
TRAINING_IMAGES = (100, 400, 1297)  # the last is all that there are
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS, TUNING_SEEDS = range(5), range(100, 106)
STEPS, BATCH = 400, 64
EXPLANATION = {
    "accuracy": "share of the 500 test images of each seed that are classified correctly",
    "rate": "learning rate, that with the best mean ``validation`` accuracy",
    "parameters": "numbers that are trained, the convolutions included",
}


class Average(nn.Module):
    """The mean over the positions: first-order pooling."""

    output_dim = CHANNELS

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


POOLINGS = {"average": Average, "MPNCOV": lambda: MPNCOV(input_dim=CHANNELS)}


def make_network(pooling: str) -> nn.Sequential:
    pool = POOLINGS[pooling]()
    layers: list[nn.Module] = []
    for before in (1, CHANNELS, CHANNELS):
        layers += [nn.Conv2d(before, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(pool.output_dim, CLASSES))


Images = tuple[Tensor, Tensor]


def split(images: Images, second: int, seed: int) -> tuple[Images, Images]:
    """All but ``second`` of the images, and those, each class with its share."""
    x, y = images
    rest, taken = train_test_split(torch.arange(len(y)), test_size=second, stratify=y, random_state=seed)
    return (x[rest], y[rest]), (x[taken], y[taken])


def accuracy(pooling: str, training: Images, others: Images, rate: float, seed: int) -> float:
    """Trains a network and returns the share of the ``others`` that it gets right."""
    torch.manual_seed(seed)
    x, y = training
    network = make_network(pooling)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(y), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.inference_mode():
        return (network(others[0]).argmax(1) == others[1]).float().mean().item()


def run(images: Images, size: int, pooling: str) -> dict[str, Any]:
    def training_and_test(seed: int) -> tuple[Images, Images]:
        rest, test = split(images, TEST_IMAGES, seed)
        return (split(rest, size, seed)[1] if size < len(rest[1]) else rest), test

    validation = {rate: [] for rate in RATES}
    for seed in TUNING_SEEDS:
        training, held_back = split(training_and_test(seed)[0], size // 4, seed)
        for rate in RATES:
            validation[rate].append(accuracy(pooling, training, held_back, rate, seed))
    rate = max(RATES, key=lambda rate: statistics.mean(validation[rate]))
    found = [accuracy(pooling, *training_and_test(seed), rate, seed) for seed in SEEDS]
    return {
        "training_images": size,
        "pooling": pooling,
        "parameters": sum(p.numel() for p in make_network(pooling).parameters()),
        "validation": [{"rate": rate, "accuracy": values} for rate, values in validation.items()],
        "rate": rate,
        "accuracy": found,
        "mean": statistics.mean(found),
        "deviation": statistics.stdev(found),
    }


# ---- What is said


def text(runs: list[dict[str, Any]]) -> str:
    rows = [["training images, pooling", "parameters", "learning rate", "accuracy %, mean", "deviation", "each seed"]]
    for about in runs:
        each = " ".join(f"{100 * value:.1f}" for value in about["accuracy"])
        numbers = [f"{about['parameters']}", f"{about['rate']:g}", f"{100 * about['mean']:.2f}"]
        name = f"{about['training_images']}, {about['pooling']}"
        rows.append([name, *numbers, f"{100 * about['deviation']:.2f}", each])
    return report.table(rows)


def plot(result: dict[str, Any], path: str | Path) -> None:
    """The accuracy of each seed and the means, for each number of training images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    sizes = sorted({about["training_images"] for about in result["runs"]})
    for pooling, colour, shift in (("average", "#6b7280", -0.08), ("MPNCOV", "#c2410c", 0.08)):
        runs = [about for about in result["runs"] if about["pooling"] == pooling]
        places = [sizes.index(about["training_images"]) + shift for about in runs]
        for place, about in zip(places, runs, strict=True):
            axis.scatter([place] * len(about["accuracy"]), [100 * v for v in about["accuracy"]], s=14, color=colour)
        means = [100 * about["mean"] for about in runs]
        axis.scatter(places, means, s=500, color=colour, marker="_", label=pooling)
    axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axis.set_xlabel("training images")
    axis.set_ylabel("test accuracy, %")
    axis.grid(axis="y", linewidth=0.4, alpha=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right", markerscale=0.5)
    axis.set_title(f"8 x 8 digits, {len(SEEDS)} seeds and their mean; {result['date'][:10]}", loc="left", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=report.writable, metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", type=report.writable, metavar="FILE", help="draw it (PNG, or what the ending says)")
    arguments = report.parse(parser, argv)
    torch.set_num_threads(1)  # sums of floats depend on the number of threads
    torch.use_deterministic_algorithms(True)
    result = report.record("classifier", arguments, EXPLANATION)
    result |= {"steps": STEPS, "batch": BATCH, "test_images": TEST_IMAGES, "runs": []}
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    progress = report.Progress()
    for size in TRAINING_IMAGES:
        for pooling in POOLINGS:
            progress.stage(f"{size} training images, {pooling}")
            result["runs"].append(run(images, size, pooling))
    progress.clear()
    print(text(result["runs"]))
    if arguments.json:
        report.write_json(arguments.json, result)
    if arguments.plot:
        plot(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
