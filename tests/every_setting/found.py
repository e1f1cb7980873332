"""Every setting that there is, by reflection; the lists in settings/ must have each of them."""

from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path

from every_setting.calls import actions_of, parser_of
from every_setting.case import LISTS, mismatches, read_sections
from every_setting.models import keys_of
from simmim.backbone.build import SPEC_TYPES
from simmim.cli import COMMANDS
from simmim.config.finetune import FinetuneConfig
from simmim.config.sections import Config, MethodConfig
from simmim.config.values import config_class, leaf_types
from simmim.method.build import methods

ROOT = Path(__file__).parents[2]

# The commands that train: their flags are the keys of a configuration, and any other is refused.
TRAIN = ("pretrain", "finetune")

# The method whose runs try the keys that all methods have.
MAIN = "simmim"


def problems_of_pretraining(settings: Mapping[str, type[MethodConfig]] | None = None) -> list[str]:
    """A line for every key of pre-training that has no case, and for every case without a key.

    The keys of [model] are in model.txt.

    Args:
        settings: the table [method] of every method; None takes those that there are.
    """
    settings = settings or {name: method.Settings for name, method in methods().items()}
    sections, problems = read_sections("pretrain.txt"), list[str]()
    shared = {"method.name", *leaf_types(Config)}
    for method, table in settings.items():
        keys = {k for k in leaf_types(config_class(table)) if not k.startswith("model.")}
        wanted = keys if method == MAIN else keys - shared
        listed = {
            setting
            for title, section in sections.items()
            if title.split(",")[0] == method
            for setting in section.settings
        }
        problems += mismatches(wanted, listed, f"[{method}] of pretrain.txt", keys)
    return problems + _sections_of_nothing(sections, settings, "pretrain.txt")


def problems_of_models() -> list[str]:
    """The same of the keys of [model], for every family of backbones."""
    sections, problems = read_sections("model.txt"), list[str]()
    for family in SPEC_TYPES:
        listed = sections[family].settings if family in sections else set()
        # a key that the family shares with its architecture's base may still be refused
        others = {key for key in leaf_types() if key.startswith("model.")}
        problems += mismatches(keys_of(family), listed, f"[{family}] of model.txt", others)
    return problems + _sections_of_nothing(sections, SPEC_TYPES, "model.txt")


def problems_of_finetuning(config: type[FinetuneConfig] = FinetuneConfig) -> list[str]:
    """The same of the keys of fine-tuning."""
    listed = {s for section in read_sections("finetune.txt").values() for s in section.settings}
    return mismatches(set(leaf_types(config)), listed, "finetune.txt", set())


def problems_of_flags(parsers: Mapping[str, ArgumentParser] | None = None) -> list[str]:
    """The same of the arguments of every command that does not train.

    Args:
        parsers: of the commands that do not train; None takes those that there are.
    """
    parsers = parsers or {
        command: parser_of(command) for command in COMMANDS if command not in TRAIN
    }
    sections, problems = read_sections("flags.txt"), list[str]()
    for command, parser in parsers.items():
        listed = sections[command].settings if command in sections else set()
        wanted = set(actions_of(parser))
        problems += mismatches(wanted, listed, f"[{command}] of flags.txt", set())
    return problems + _sections_of_nothing(sections, parsers, "flags.txt")


def _sections_of_nothing(
    sections: Mapping[str, object], known: Mapping[str, object], file: str
) -> list[str]:
    return [
        f"[{title}] is in {file}, and there is nothing of this name"
        for title in sections
        if title.split(",")[0] not in known
    ]


def problems_of_reasons() -> list[str]:
    """A line for every setting without a case whose reason or test is missing, or that has both."""
    problems = []
    for path in sorted(LISTS.glob("*.txt")):
        for title, section in read_sections(path.name).items():
            cases = {case.setting for case in section.cases}
            for entry in section.untried:
                where = f"{entry.setting} of [{title}] of {path.name}"
                file, _, test = entry.test.partition("::")
                if not entry.reason or not (ROOT / file).is_file():
                    problems.append(f"{where} needs a reason, and a test that there is")
                elif test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8"):
                    problems.append(f"{where}: {file} has no {test}")
                if entry.setting in cases:
                    problems.append(f"{where} has a case and a reason for none")
    return problems
