"""Linear probes of frozen features: the optimiser, and the choice of a rate."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simmim.data.labels import Labels
from simmim.data.splits import holdout
from simmim.downstream import probe
from simmim.downstream.probe import (
    Examples,
    Linear,
    Probed,
    Training,
    best_layer,
    probe_layers,
    score,
    train_linear,
)
from simmim_kernels.splitmix import fold, permutation

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("a", "b", "c")


def clusters(count: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Labels]:
    """Features [N, 6] around a place for each of three classes."""
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 3, count)
    values[:3] = [0, 1, 2]
    places = np.random.default_rng(7).normal(size=(3, 6)) * 2 + 5
    features = places[values] + spread * draw.normal(size=(count, 6))
    return torch.tensor(features, dtype=torch.float32), Labels(values.astype(np.int64), NAMES)


def examples(features: Tensor, labels: Labels) -> Examples:
    return Examples(features, torch.from_numpy(labels.values), torch.arange(len(features)))


def by_torch(
    features: Tensor, labels: Labels, rate: float, training: Training
) -> tuple[Tensor, Tensor]:
    """One probe by torch's layers: BatchNorm without gain and bias, SGD, CosineAnnealingLR."""
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6, momentum=None).double()
    norm(features.double())
    norm.eval()
    # torch's running variance is that of a sample, divided by N - 1
    norm.running_var *= (len(features) - 1) / len(features)
    linear = nn.Linear(features.shape[1], 3).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), rate, momentum=0.9)
    steps = training.epochs * -(-len(features) // training.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    y = torch.from_numpy(labels.values)
    for epoch in range(training.epochs):
        order = permutation(fold(probe.STREAM, training.seed, epoch), len(features))
        for part in torch.split(torch.from_numpy(order), training.batch_size):
            optimizer.zero_grad()
            logits = linear(norm(features[part].double()))
            nn.functional.cross_entropy(logits, y[part]).backward()
            optimizer.step()
            schedule.step()
    return linear.weight.detach().float(), linear.bias.detach().float()


def test_every_rate_trains_as_torch_would() -> None:
    features, labels = clusters(50, seed=1)
    training = Training(epochs=4, batch_size=16, seed=3)
    rates = (0.003, 0.1, 1.0)
    found = train_linear(examples(features, labels), 3, rates, training)
    for number, rate in enumerate(rates):
        weight, bias = by_torch(features, labels, rate, training)
        own = found.weight.view(6, 3, 3)[:, number].T
        torch.testing.assert_close(own, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.bias.view(3, 3)[number], bias, rtol=1e-4, atol=1e-5)


def test_standardised_features_have_mean_0_and_variance_1() -> None:
    features, labels = clusters(40, seed=2)
    some = examples(features, labels)._replace(members=torch.arange(5, 30))
    mean, scale = probe.standardisation(some)
    standard = (features[5:30] - mean) * scale
    torch.testing.assert_close(standard.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(standard.square().mean(0), torch.ones(6), rtol=1e-4, atol=0)


@pytest.mark.parametrize("chunk_values", [8, 2**24])
def test_scores_count_ties_for_the_lower_class(
    monkeypatch: pytest.MonkeyPatch, chunk_values: int
) -> None:
    monkeypatch.setattr(probe, "CHUNK_VALUES", chunk_values)
    K = 7
    bias = torch.zeros(2, K)
    bias[1, 2] = float("nan")
    classifiers = Linear(torch.zeros(1), torch.ones(1), torch.zeros(1, 2 * K), bias.view(-1), 2)
    labels = torch.tensor([0, 0, 4, 5, 6])
    found = score(classifiers, Examples(torch.zeros(5, 1), labels, torch.arange(5)))
    assert (found[0].top1, found[0].top5) == (0.4, 0.6)
    assert found[0].loss == pytest.approx(np.log(7))
    assert (found[1].top1, found[1].top5, found[1].loss) == (0.0, 0.0, float("inf"))


def test_the_rate_is_picked_without_the_validation_images() -> None:
    features, labels = clusters(60, seed=1, spread=3)
    val_features, val_labels = clusters(30, seed=2, spread=3)
    training = Training(rates=(1e-5, 0.03, 30.0), epochs=10, batch_size=8)
    (found,) = probe_layers({"x": features}, labels, {"x": val_features}, val_labels, training)
    # other validation labels change the score, never the rate
    other = Labels(np.roll(val_labels.values, 1), NAMES)
    (rolled,) = probe_layers({"x": features}, labels, {"x": val_features}, other, training)
    assert (rolled.rate, rolled.picked) == (found.rate, found.picked)
    assert rolled.score != found.score
    kept, held = holdout(labels, 6, training.seed)
    every = examples(features, labels)
    tried = score(
        train_linear(every._replace(members=torch.from_numpy(kept)), 3, training.rates, training),
        every._replace(members=torch.from_numpy(held)),
    )
    assert found.picked == tuple(one.top1 for one in tried)
    best = max(zip(tried, training.rates), key=lambda pair: (pair[0].top1, -pair[0].loss))
    assert found.rate == best[1]
    # with that rate, all training images are trained on
    (final,) = score(
        train_linear(every, 3, (found.rate,), training), examples(val_features, val_labels)
    )
    assert found.score == final


def test_equal_seeds_give_equal_results_and_others_do_not() -> None:
    train, val = clusters(60, seed=1, spread=4), clusters(40, seed=2, spread=4)

    def run(seed: int, features: Tensor = train[0]) -> list[Probed]:
        training = Training(rates=(0.01, 0.1), epochs=3, batch_size=8, seed=seed)
        return list(probe_layers({"x": features}, train[1], {"x": val[0]}, val[1], training))

    assert run(0) == run(0)
    assert run(0)[0].score.loss != run(1)[0].score.loss
    half = run(0, train[0].half())[0]
    assert half.score.loss == pytest.approx(run(0)[0].score.loss, rel=0.01)


def test_the_best_layer_is_found_and_separable_classes_are_separated() -> None:
    train, val = clusters(60, seed=1, spread=0.1), clusters(40, seed=2, spread=0.1)
    noise = torch.randn(60, 4), torch.randn(40, 4)
    found = list(
        probe_layers(
            {"noise": noise[0], "clusters": train[0], "again": train[0]},
            train[1],
            {"noise": noise[1], "clusters": val[0], "again": val[0]},
            val[1],
            Training(epochs=20),
        )
    )
    assert [result.layer for result in found] == ["noise", "clusters", "again"]
    assert found[0].score.top1 < 0.7
    assert found[1].score.top1 == 1.0
    assert best_layer(found).layer == "clusters"
    assert all(result.score.top5 == 1.0 for result in found)


def test_what_cannot_be_probed_is_refused() -> None:
    features = torch.randn(3, 4)
    labels = Labels(np.arange(3), NAMES)
    with pytest.raises(ValueError, match="3 training images, one of each class, are too few"):
        list(probe_layers({"x": features}, labels, {"x": features}, labels))
    (found,) = probe_layers(
        {"x": features}, labels, {"x": features}, labels, Training(rates=(0.1,))
    )
    assert (found.rate, found.picked, found.score.top1) == (0.1, (), 1.0)
    with pytest.raises(ValueError, match="classes differ"):
        list(probe_layers({"x": features}, labels, {"x": features}, Labels(np.arange(3), ())))
    with pytest.raises(ValueError, match="3 labels, but 2 features of x"):
        list(probe_layers({"x": features}, labels, {"x": features[:2]}, labels))
    unlabelled = Labels(np.array([0, 1, -1]), NAMES)
    with pytest.raises(ValueError, match="every image of a probe needs a label"):
        list(probe_layers({"x": features}, unlabelled, {"x": features}, labels))
    for wrong in ({"rates": ()}, {"rates": (0.1, float("nan"))}, {"epochs": 0}):
        with pytest.raises(ValueError, match=r"rates|epochs"):
            Training(**wrong)  # type: ignore[arg-type]


def test_what_is_not_told_is_as_published() -> None:
    # MAE's probe, with rates half a decade apart
    assert Training() == Training((0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 100, 256, 0)


def test_the_first_of_equally_good_rates_and_layers_is_taken() -> None:
    train, val = clusters(60, seed=1, spread=0.01), clusters(40, seed=2, spread=0.01)
    layers = {"a": train[0], "b": train[0]}
    found = list(
        probe_layers(layers, train[1], {"a": val[0], "b": val[0]}, val[1], Training((0.3, 0.3), 5))
    )
    assert found[0].picked == (1.0, 1.0)
    assert found[0].score == found[1].score
    assert best_layer(found) is found[0]


def test_rates_are_picked_on_a_tenth_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def noted(labels: Labels, count: int, seed: int) -> tuple[object, object]:
        asked.append((count, seed))
        return holdout(labels, count, seed)

    monkeypatch.setattr(probe, "holdout", noted)
    for count in (60, 4):
        features, labels = clusters(count, seed=1)
        training = Training((0.1, 1.0), 1, seed=5)
        list(probe_layers({"x": features}, labels, {"x": features}, labels, training))
    # of four images of three classes, one at least and one at most
    assert asked == [(6, 5), (1, 5)]
    empty = Labels(np.zeros(0, np.int64), NAMES)
    with pytest.raises(ValueError, match=r"every image of a probe needs a label; .* or none"):
        list(probe_layers({"x": features}, labels, {"x": features[:0]}, empty))


def test_a_probe_trains_where_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Noted(Tensor):
        def to(self, *arguments: object, **named: object) -> Tensor:  # type: ignore[override]
            asked.append(arguments[0])
            return self.as_subclass(Tensor)

    features, labels = clusters(20, seed=1)
    device, noted = torch.device("cpu"), features.as_subclass(Noted)
    training = Training((0.1,), 1)
    list(probe_layers({"x": noted}, labels, {"x": noted}, labels, training, device=device))
    assert asked == [device, device]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"epochs": 0}, {"rates": (0.1, 0.0)}])
def test_a_training_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        Training(**wrong)


def test_a_class_that_is_the_fifth_of_equals_is_among_five() -> None:
    classifiers = Linear(torch.zeros(1), torch.ones(1), torch.zeros(1, 9), torch.zeros(9), 1)
    for label, top5 in ((4, 1.0), (5, 0.0)):
        (found,) = score(
            classifiers, Examples(torch.zeros(1, 1), torch.tensor([label]), torch.arange(1))
        )
        assert found.top5 == top5


def test_of_equally_right_rates_that_of_the_lower_loss_is_picked() -> None:
    train, val = clusters(60, seed=1, spread=0.01), clusters(40, seed=2, spread=0.01)
    for rates in ((0.01, 0.3), (0.3, 0.01)):
        training = Training(rates, epochs=5)
        (found,) = probe_layers({"x": train[0]}, train[1], {"x": val[0]}, val[1], training)
        assert (found.picked, found.rate) == ((1.0, 1.0), 0.3)
