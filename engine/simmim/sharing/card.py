"""Writes the card of an exported model: a README.md for people and for the Hugging Face Hub.

Nothing in it says where files lay on the machine that it was made on.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simmim.backbone.build import PRESETS, spec_to_dict
from simmim.config.values import toml_value
from simmim.files import write_text
from simmim.method.build import methods
from simmim.method.method import Method
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.model.image_model import ImageModel, MaskedImageModel
from simmim.sharing.run_facts import LOSS_STEPS, RunFacts
from simmim.version import __version__

CARD_FILE = "README.md"
PICTURE_FILE = "reconstruction.png"

# The Hub's word for "nobody said so far".
NO_LICENSE = "unknown"

# Classes that are listed by name; config.json has all.
LISTED_CLASSES = 20


def write_card(
    folder: Path,
    model: ImageModel,
    facts: RunFacts | None = None,
    *,
    mask: Mapping[str, Any] | None = None,
    picture: bool = False,
    license: str = NO_LICENSE,
) -> Path:
    """Write README.md: what the model is, how to load it, and what is known of its training.

    Args:
        folder: where the model's other files lie.
        model: tells its architecture.
        facts: what the run folder tells, if the model is of a run.
        mask: unit and ratio of the mask that it was trained with.
        picture: whether PICTURE_FILE lies in the folder too.
        license: the Hub's identifier of a license.

    Raises:
        OSError: it cannot be written; an older card stays as it was.
    """
    parts = [
        _front_matter(model, facts, license),
        f"# {_title(model, facts)}",
        _summary(model, facts),
        f"![original, masked, reconstruction]({PICTURE_FILE})" if picture else "",
        "## Use",
        _use(model),
        "## Model",
        _table(_model_rows(model, mask)),
        *(_about_training(facts) if facts is not None else []),
        "## License",
        (
            "Not stated yet: put its identifier after `license:` at the top of this file."
            if license == NO_LICENSE
            else f"`{license}`"
        ),
    ]
    path = folder / CARD_FILE
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _front_matter(model: ImageModel, facts: RunFacts | None, license: str) -> str:
    """The part that the Hub reads, in YAML. Strings are written as in JSON, which YAML includes."""
    classifies = isinstance(model, Classifier)
    task = "image-classification" if classifies else "image-feature-extraction"
    arch = spec_to_dict(model.encoder.spec)["arch"]
    tags = ["simmim", arch, "pytorch"]
    if not _is_from_scratch(facts):
        masked = isinstance(model, MaskedImageModel | Classifier) or model.kind == "encoder"
        tags += ["masked-image-modeling"] if masked else []
        tags += ["self-supervised-learning"]
    lines = [
        "library_name: simmim",
        f"pipeline_tag: {task}",
        f"license: {license}",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    if classifies and facts is not None and facts.evaluation:
        results = [("Top-1", "top1"), ("Top-5", "top5")]
        lines += [
            "model-index:",
            f"- name: {_quoted(facts.name)}",
            "  results:",
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            "      type: imagefolder",
            f"      name: {_quoted(_validated_on(facts))}",
            "    metrics:",
        ]
        for name, key in results:
            lines += [
                "    - type: accuracy",
                f"      name: {name} accuracy",
                f"      value: {round(facts.evaluation[key], 6)}",
            ]
    return "\n".join(["---", *lines, "---"])


def _title(model: ImageModel, facts: RunFacts | None) -> str:
    name = _architecture(model)
    if not isinstance(model, Classifier):
        return f"{name}, pre-trained with {_method(model).title or model.kind}"
    data = facts and facts.recipe.get("data", {}).get("path")
    on = f" on {_plain(data)}" if data else ""
    return f"{name}, {'trained' if _is_from_scratch(facts) else 'fine-tuned'}{on}"


def _architecture(model: ImageModel) -> str:
    """The preset with the widths and depths of the encoder; if there is none, its family."""
    own = spec_to_dict(model.encoder.spec)
    if own["arch"] == "timm":
        return f"timm:{own['name']}"
    keys = ("arch", "embed_dim", "depth", "depths", "num_heads", "width", "widths", "bottleneck")
    for name, preset in PRESETS.items():
        values = spec_to_dict(preset)
        if all(values.get(key) == own.get(key) for key in keys):
            return name
    return type(model.encoder).__name__


def _is_from_scratch(facts: RunFacts | None) -> bool:
    """Whether a fine-tuning run says that it began without pre-trained weights."""
    return facts is not None and facts.recipe.get("pretrained") == ""


def _summary(model: ImageModel, facts: RunFacts | None) -> str:
    method = _method(model)
    named = f"[{method.title}]({method.paper})" if method.paper else method.title or model.kind
    if isinstance(model, Classifier):
        origin = f"Its encoder comes from {named} pre-training."
        if _is_from_scratch(facts):
            origin = "It was trained from scratch."
        return f"Classifies images into {len(model.classes):,} classes. {origin}"
    if isinstance(model, SimMIM):
        return (
            f"An image encoder that learned from images without labels by {named}: part of "
            "each was hidden, and a linear head had to tell the hidden pixels. It gives features; "
            "for classes, fine-tune it (`simmim finetune`)."
        )
    if model.kind == "encoder":
        return f"An image encoder of {named} pre-training."
    return (
        f"An image encoder that learned from images without labels by {named}: {method.purpose}. "
        "It gives features; for classes, fine-tune it (`simmim finetune`)."
    )


def _method(model: ImageModel) -> type[Method]:
    """The method of a model; SimMIM for a classifier or an encoder."""
    return methods().get(model.kind, methods()["simmim"])


def _use(model: ImageModel) -> str:
    load = "load_encoder" if model.kind == "encoder" else "load_model"
    line = f'model = simmim.{load}(".")  # this folder, or its name on the Hub'
    if isinstance(model, Classifier):
        code = [
            "import simmim",
            "",
            line,
            'for answer in simmim.predict(model, "photo.jpg")[0]:',
            '    print(f"{answer.probability:.1%} {answer.label}")',
        ]
    else:
        height, width = model.encoder.spec.image_size
        stride = model.encoder.spec.stride
        C, D = model.channels, model.encoder.num_features
        code = [
            "import simmim",
            "import torch",
            "",
            line,
            f"images = torch.zeros(1, {C}, {height}, {width}, dtype=torch.uint8)  # or normalised",
            f"features = model.encode(images)  # [1, {D}, {height // stride}, {width // stride}]",
        ]
    return "\n".join(["```python", *code, "```"])


def _model_rows(model: ImageModel, mask: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    spec = spec_to_dict(model.encoder.spec)
    height, width = spec["image_size"]
    rows = [
        ("architecture", _architecture(model)),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("image", f"{height} × {width} pixels, {model.channels} channels"),
        ("cell of the mask grid", f"{model.encoder.spec.patch_size} pixels"),
    ]
    rows += [
        (key.replace("_", " "), _value(spec[key]))
        for key in ("embed_dim", "depths", "depth", "num_heads", "window_size")
        if key in spec
    ]
    rows += [
        ("mean", _value([round(value, 6) for value in model.mean.tolist()])),
        ("std", _value([round(value, 6) for value in model.std.tolist()])),
    ]
    if isinstance(model, MaskedImageModel):
        if mask:
            rows.append(("mask", f"{mask['ratio']:.0%} of units of {mask['unit']} pixels"))
        if model.norm_target:
            rows.append(("target", f"normalised over {model.norm_target} × {model.norm_target}"))
    if isinstance(model, Classifier):
        some = ", ".join(_plain(name) for name in model.classes[:LISTED_CLASSES])
        more = ", … (config.json has all)" if len(model.classes) > LISTED_CLASSES else ""
        rows.append(("classes", f"{len(model.classes):,}: {some}{more}"))
    return rows


def _about_training(facts: RunFacts) -> list[str]:
    """The sections on data, length, results, recipe and versions."""
    train, data = facts.recipe.get("train", {}), facts.recipe.get("data", {})
    length = [] if facts.step is None else [f"{facts.step:,} steps"]
    length += [] if facts.epochs is None else [f"{facts.epochs:.4g} epochs"]
    rows = [
        ("length", ", ".join(length)),
        ("batch", _value(train.get("batch_size", ""))),
        ("precision", train.get("precision", "")),
        ("data", _plain(data.get("path", ""))),
        ("images", f"{facts.data['images']:,}" if "images" in facts.data else ""),
        ("digest of their names", f"`{facts.data['digest']}`" if "digest" in facts.data else ""),
        ("unreadable", f"{facts.data['unreadable']:,}" if facts.data.get("unreadable") else ""),
        ("pre-trained weights", _plain(facts.recipe.get("pretrained", ""))),
        *_environment_rows(facts.environment),
    ]
    parts = ["## Training", _table(rows)]
    results = _result_rows(facts)
    if results:
        parts += ["## Results", _table(results)]
    if facts.recipe:
        toml = "\n".join(_toml_lines(facts.recipe))
        parts += ["## Recipe", f"Every setting; folders are cut.\n\n```toml\n{toml}\n```"]
    return parts


def _environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = environment.get("versions") or {}
    named = [
        f"{name} {versions[name]}" for name in ("simmim", "torch", "python") if name in versions
    ]
    device = _plain(environment.get("device_name") or "")
    processes = environment.get("processes") or 1
    return [
        ("device", f"{device} × {processes}" if device and processes > 1 else device),
        ("versions", ", ".join(named)),
        ("commit", f"`{environment['git_commit']}`" if environment.get("git_commit") else ""),
    ]


def _result_rows(facts: RunFacts) -> list[tuple[str, str]]:
    rows = []
    if facts.evaluation:
        evaluation = facts.evaluation
        rows += [
            ("top-1", f"{evaluation['top1']:.2%}"),
            ("top-5", f"{evaluation['top5']:.2%}"),
            ("validation loss", f"{evaluation['loss']:.4f}"),
            ("validated on", f"{evaluation['images']:,} images of {_plain(_validated_on(facts))}"),
        ]
    if facts.loss is not None:
        rows.append((f"training loss, last {LOSS_STEPS} steps", f"{facts.loss:.4f}"))
    return rows


def _validated_on(facts: RunFacts) -> str:
    data = facts.recipe.get("data", {})
    return data.get("val_path") or f"{data.get('path') or 'the training data'} (held out)"


def _toml_lines(values: Mapping[str, Any]) -> list[str]:
    top = [key for key, value in values.items() if not isinstance(value, Mapping)]
    lines = [f"{key} = {toml_value(values[key])}" for key in top]
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{key}]", *_toml_lines(value)]
    return lines


def _table(rows: list[tuple[str, str]]) -> str:
    cells = [f"| {name} | {value} |" for name, value in rows if value]
    return "\n".join(["| | |", "|---|---|", *cells])


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _plain(text: str) -> str:
    """A name escaped so that Markdown shows every character of it."""
    kept = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!" else c for c in kept)


def _quoted(text: str) -> str:
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return json.dumps(printable, ensure_ascii=False)


def describe(model: ImageModel, mask: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The contents of config.json, in plain values; the weights file holds the same facts."""
    values: dict[str, Any] = {
        "library_name": "simmim",
        "simmim_version": __version__,
        "model_class": type(model).__name__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "encoder": spec_to_dict(model.encoder.spec),
        "mean": model.mean.tolist(),
        "std": model.std.tolist(),
    }
    if isinstance(model, SimMIM):
        values |= {"norm_target": model.norm_target, "mask": None if mask is None else dict(mask)}
    if isinstance(model, Classifier):
        values |= {
            "num_classes": len(model.classes),
            "classes": list(model.classes),
            "margin": model.margin,
        }
    return values
