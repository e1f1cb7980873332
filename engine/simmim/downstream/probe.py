"""Linear probes: trains and scores a linear classifier of frozen features, for every layer.

N images, D width, K classes, R learning rates, b images of a step.
The probe is that of MAE (He et al. 2021, appendix A.1) and MoCo v3. Features are standardised by
their mean and variance over the training images (a BatchNorm without gain and bias); the classifier
trains by SGD with momentum and a cosine schedule, without weight decay. As features are computed
once and kept, training images are not augmented.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simmim.data.labels import Labels
from simmim.data.splits import holdout
from simmim_kernels.splitmix import fold, permutation

# Half a decade apart. They are not scaled by the number of images of a step.
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

# Share of the training images that the rate is picked on.
PICK_SHARE = 0.1

MOMENTUM = 0.9

# Epsilon of the BatchNorm in MAE's probe.
NORM_EPS = 1e-6

# Keeps the order of the images apart from other uses of the same seed.
STREAM = 0x70726F62  # "prob"

# Values of features or of logits that are held at a time.
CHUNK_VALUES = 2**24


@dataclass(frozen=True)
class Training:
    """How a linear classifier is trained.

    Attributes:
        rates: learning rates to choose from.
        epochs: passes over the training images.
        batch_size: images of an SGD step.
        seed: for the order of the images, and for the choice of those that the rate is picked on.
    """

    rates: tuple[float, ...] = RATES
    epochs: int = 100
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"rates={self.rates}: choose learning rates above 0")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs={self.epochs}, batch_size={self.batch_size}: at least 1")


class Examples(NamedTuple):
    """Features and labels of images, and which of these images are meant.

    Attributes:
        features: [N, D], of any floating type.
        labels: int64 [N].
        members: int64 [n], the rows that are meant, on the same device.
    """

    features: Tensor
    labels: Tensor
    members: Tensor


class Linear(NamedTuple):
    """R classifiers of standardised features.

    Attributes:
        mean: float32 [D], which is subtracted from the features.
        scale: float32 [D], which they are then multiplied by.
        weight: float32 [D, R·K].
        bias: float32 [R·K].
        num_rates: R.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    num_rates: int

    def standardise(self, features: Tensor) -> Tensor:
        """Standardised features, float32 [b, D]."""
        return (features.float() - self.mean) * self.scale

    def logits(self, standardised: Tensor) -> Tensor:
        """Logits of standardised features, float32 [b, R, K]."""
        flat = torch.addmm(self.bias, standardised, self.weight)
        return flat.view(len(standardised), self.num_rates, -1)


@dataclass(frozen=True)
class Score:
    """How well a classifier does on some images.

    Attributes:
        top1: share whose best class is right.
        top5: share with the right class among the best five.
        loss: mean cross-entropy; infinite if a logit is not finite.
    """

    top1: float
    top5: float
    loss: float


@dataclass(frozen=True)
class Probed:
    """The probe of one layer.

    Attributes:
        layer: its name.
        rate: the learning rate.
        score: of the validation images.
        picked: top-1 of every rate on the training images that were held out for picking one;
            empty if there was only one rate.
    """

    layer: str
    rate: float
    score: Score
    picked: tuple[float, ...]


def probe_layers(
    train: Mapping[str, Tensor],
    train_labels: Labels,
    val: Mapping[str, Tensor],
    val_labels: Labels,
    training: Training | None = None,
    *,
    device: torch.device | None = None,
) -> Iterator[Probed]:
    """Probe one layer after the other.

    The rate is picked on a tenth of the training images. The classifier then trains on all of them
    with that rate, and is scored on the validation images, which have decided nothing.

    Args:
        train: name → features [N, D].
        train_labels: N classes, none of them -1.
        val: the same layers of other images.
        val_labels: numbered as `train_labels`.
        training: how to train; None takes the defaults.
        device: where to train; None takes the device of the features.

    Raises:
        ValueError: too few images to pick a rate on, or labels that do not fit.
    """
    training = training or Training()
    if train_labels.classes != val_labels.classes:
        raise ValueError("the training and validation classes differ; see labels.match_classes")
    for labels, layers in ((train_labels, train), (val_labels, val)):
        count = len(labels.values)
        if not count or labels.values.min() < 0:
            raise ValueError(
                "every image of a probe needs a label; there are some without, or none"
            )
        if wrong := [name for name in train if len(layers[name]) != count]:
            raise ValueError(f"{count} labels, but {len(layers[wrong[0]])} features of {wrong[0]}")
    fit, pick = _split(train_labels, training)
    num_classes = len(train_labels.classes)
    for name in train:
        known = _examples(train[name].to(device), train_labels)
        unknown = _examples(val[name].to(device), val_labels)
        chosen = training.rates[0]
        picked: tuple[float, ...] = ()
        if len(training.rates) > 1:
            classifiers = train_linear(_some(known, fit), num_classes, training.rates, training)
            scores = score(classifiers, _some(known, pick))
            # between rates that are equally often right, the lower loss
            best = max(range(len(scores)), key=lambda r: (scores[r].top1, -scores[r].loss))
            chosen, picked = training.rates[best], tuple(one.top1 for one in scores)
        (final,) = score(train_linear(known, num_classes, (chosen,), training), unknown)
        yield Probed(name, chosen, final, picked)


def best_layer(probed: Sequence[Probed]) -> Probed:
    """The layer with the highest top-1 accuracy; the first of equal ones."""
    return max(probed, key=lambda result: result.score.top1)


def _split(labels: Labels, training: Training) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    total = len(labels.values)
    if len(training.rates) == 1:
        return np.arange(total), np.arange(0)
    spare = total - len(np.unique(labels.values))
    if not spare:
        raise ValueError(
            f"{total} training images, one of each class, are too few to pick a learning rate on; "
            "give more images, or one rate"
        )
    return holdout(labels, min(spare, max(1, round(PICK_SHARE * total))), training.seed)


def _examples(features: Tensor, labels: Labels) -> Examples:
    y = torch.from_numpy(labels.values).to(features.device)
    return Examples(features, y, torch.arange(len(y), device=features.device))


def _some(examples: Examples, members: NDArray[np.int64]) -> Examples:
    return examples._replace(members=torch.from_numpy(members).to(examples.labels.device))


def standardisation(examples: Examples) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of the members' features, float32 [D], summed in float64."""
    features, _, members = examples
    parts = torch.split(members, max(1, CHUNK_VALUES // features.shape[1]))
    mean = torch.stack([features[part].double().sum(0) for part in parts]).sum(0) / len(members)
    squares = [(features[part].double() - mean).square().sum(0) for part in parts]
    variance = torch.stack(squares).sum(0) / len(members)
    return mean.float(), (variance + NORM_EPS).rsqrt().float()


def train_linear(
    examples: Examples, num_classes: int, rates: Sequence[float], training: Training
) -> Linear:
    """Train a softmax regression of standardised features for all rates at once, from zero weights.

    Args:
        examples: what to train on.
        num_classes: K.
        rates: R learning rates at the start, from which a cosine leads to 0.
        training: epochs, images of a step and seed; its rates are not used.
    """
    features, labels, members = examples
    R, device = len(rates), features.device
    weight = torch.zeros(features.shape[1], R * num_classes, device=device)
    classifiers = Linear(*standardisation(examples), weight, torch.zeros_like(weight[0]), R)
    momentum = torch.zeros_like(classifiers.weight), torch.zeros_like(classifiers.bias)
    rate_of = torch.tensor(rates, device=device).repeat_interleave(num_classes)  # [R·K]
    size = min(training.batch_size, len(members))
    step, num_steps = 0, training.epochs * -(-len(members) // size)
    for epoch in range(training.epochs):
        order = permutation(fold(STREAM, training.seed, epoch), len(members))
        for part in torch.split(members[torch.from_numpy(order).to(device)], size):
            row = classifiers.standardise(features[part])
            # the gradient of the mean cross-entropy: softmax, less 1 at the label, by image
            gradient = classifiers.logits(row).softmax(2)
            gradient[torch.arange(len(part), device=device), :, labels[part]] -= 1
            gradient = gradient.view(len(part), -1) / len(part)
            momentum[0].mul_(MOMENTUM).addmm_(row.T, gradient)
            momentum[1].mul_(MOMENTUM).add_(gradient.sum(0))
            rate = rate_of * (0.5 * (1 + math.cos(math.pi * step / num_steps)))
            classifiers.weight.sub_(momentum[0] * rate)
            classifiers.bias.sub_(momentum[1] * rate)
            step += 1
    return classifiers


def score(classifiers: Linear, examples: Examples) -> list[Score]:
    """The score of every rate's classifier; of equal logits, that of the lower class wins."""
    features, labels, members = examples
    R, device = classifiers.num_rates, features.device
    right = torch.zeros(2, R, dtype=torch.int64, device=device)
    loss = torch.zeros(R, dtype=torch.float64, device=device)
    # the same pieces for any number of rates: a product's last bits may depend on its rows
    num_classes = len(classifiers.bias) // R
    for part in torch.split(members, max(1, CHUNK_VALUES // (8 * num_classes))):
        label = labels[part].view(-1, 1, 1).expand(-1, R, 1)
        logits = classifiers.logits(classifiers.standardise(features[part]))  # [b, R, K]
        own = logits.gather(2, label)
        number = torch.arange(num_classes, device=device)
        better = (logits > own) | ((logits == own) & (number < label))
        finite = logits.isfinite().all(2)
        rank = better.sum(2)
        right += torch.stack([((rank < n) & finite).sum(0) for n in (1, 5)])
        cost = (logits.logsumexp(2) - own.squeeze(2)).double()
        loss += torch.where(finite, cost, math.inf).sum(0)
    shares = (right.double() / len(members)).tolist()
    return [Score(*values) for values in zip(*shares, (loss / len(members)).tolist())]
