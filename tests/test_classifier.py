"""Both poolings get the same training; the split keeps test images out of it."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the classifier needs the extra [bench]")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import classifier


@pytest.fixture
def images():
    """Two classes of 4 x 4 images that differ in what goes together, not in the mean."""
    labels = torch.arange(200) % 2
    rows = torch.randn(200, 4, 1)
    return torch.where(labels[:, None, None] == 1, rows.expand(-1, 4, 4), rows.mT.expand(-1, 4, 4))[:, None], labels


def test_split_keeps_classes_and_shares_nothing():
    x, y = torch.arange(100), torch.arange(100) % 4
    (rest, _), (taken, labels) = classifier.split((x, y), 20, seed=3)
    assert sorted([*rest.tolist(), *taken.tolist()]) == x.tolist()
    assert labels.bincount().tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("pooling", classifier.POOLINGS)
def test_network(pooling):
    network = classifier.make_network(pooling)
    assert network(torch.randn(3, 1, 8, 8)).shape == (3, classifier.CLASSES)
    features = 32 if pooling == "average" else 32 * 33 // 2
    assert network[-1].in_features == features


@pytest.mark.parametrize("pooling", classifier.POOLINGS)
def test_learns_and_repeats(pooling, images, monkeypatch, one_thread):
    monkeypatch.setattr(classifier, "STEPS", 30)
    training, test = classifier.split(images, 80, seed=0)
    reached = [classifier.accuracy(pooling, training, test, 1e-2, seed=0) for _ in range(2)]
    assert reached[0] == reached[1] > 0.8


def test_run_chooses_the_best_rate_without_the_test_images(monkeypatch):
    asked = []

    def accuracy(pooling, training, others, rate, seed):
        asked.append((len(training[1]), len(others[1]), rate, seed))
        return 0.9 if rate == classifier.RATES[1] else 0.5

    monkeypatch.setattr(classifier, "accuracy", accuracy)
    about = classifier.run((torch.zeros(800, 1, 2, 2), torch.arange(800) % 10), 100, "average")
    assert about["rate"] == classifier.RATES[1]
    tuning = [call for call in asked if call[3] in classifier.TUNING_SEEDS]
    assert {call[:2] for call in tuning} == {(75, 25)}
    final = [call for call in asked if call[3] in classifier.SEEDS]
    assert [call[0:3] for call in final] == [(100, classifier.TEST_IMAGES, classifier.RATES[1])] * len(classifier.SEEDS)
