"""Claims and the rules that decide them, as `analyses/claims.yaml` writes them, and the hash of all that decides.

A rule is fixed before the runs that it judges: its hash must be in the file as it was at the commit that every run was
trained at. The hash covers the measure with its version and options, the trainings with what makes them comparable, the
options of the analysis' command, direction, null, seeds, level and weight; it does not cover words (`claim`, `paper`,
`note`), nor where runs lie.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from workbench.errors import ConfigError, UnknownNameError, one_line
from workbench.yaml_config import UniqueKeyLoader

FILE = "analyses/claims.yaml"  # within the repository
# of a command: which models, where, and in what batches
UNDECIDED = ("--model", "--output_dir", "--source", "--batch_size", "--device", "--dtype")
EXPECTED = ("more", "less")
NO_PAPER = "workbench"


@dataclass(frozen=True)
class Training:
    """Runs of one variant, one for each seed.

    Attributes:
        folder: name of a run's folder, with `{seed}`.
        recipe: values that its recipe must have, by dotted key.
        like: a training whose recipe, of the same seed, it has but for `but`; the training data must be the same too.
        but: keys, or beginnings of keys at a dot, that may differ from `like`.
        checkpoint: `last`, or `best` for the model of the highest validation score.
        sweep: the sweep that trains it.
        runs: where that sweep puts it.
    """

    folder: str
    sweep: str
    runs: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    like: str = ""
    but: tuple[str, ...] = ()
    checkpoint: str = "last"

    @property
    def decides(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "recipe": dict(self.recipe),
            "like": self.like,
            "but": sorted(self.but),
            "checkpoint": self.checkpoint,
        }


@dataclass(frozen=True)
class Claim:
    """A claim with its rule, or with the reason why there is none.

    Attributes:
        claim: the sentence, in our words.
        paper: the paper's figure, with its table or figure.
        origin: `paper`, or `workbench` for what only this experiment asks.
        measure: name of a measure, and `options` its options.
        of: weight of each training in the number of a seed.
        expect: the side that the claim says: `more` or `less` than `than`.
        weight: share of the error that the rule may make, relative to the other rules.
        not_testable: why there is no rule.
    """

    id: str
    claim: str
    paper: str
    origin: str = "paper"
    note: str = ""
    measure: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    of: Mapping[str, float] = field(default_factory=dict)
    expect: str = ""
    than: float = 0.0
    weight: float = 1.0
    not_testable: str = ""

    @property
    def tested(self) -> bool:
        return not self.not_testable


@dataclass(frozen=True)
class Ledger:
    """All claims, and what their rules refer to."""

    seeds: tuple[int, ...]
    level: float
    measures: Mapping[str, int]
    trainings: Mapping[str, Training]
    analyses: Mapping[str, str]
    claims: tuple[Claim, ...]

    def rules(self) -> dict[str, Claim]:
        """The claims that have a rule, by the rule's hash."""
        return {self.hash(claim): claim for claim in self.claims if claim.tested}

    def hash(self, claim: Claim) -> str:
        """Hash of all that decides a claim, 12 hex digits."""
        analysis = claim.options.get("analysis")
        content = {
            "measure": [claim.measure, self.measures[claim.measure]],
            "options": claim.options,
            "of": claim.of,
            "rule": [claim.expect, claim.than, claim.weight, self.level, sorted(self.seeds)],
            "trainings": {name: self.trainings[name].decides for name in self.needed(claim)},
            "analysis": [analysis, options_of(self.analyses[analysis])] if analysis else None,
        }
        return hashlib.sha256(json.dumps(_plain(content), sort_keys=True).encode()).hexdigest()[:12]

    def needed(self, claim: Claim) -> list[str]:
        """Every training that a claim refers to, and those that these are `like`."""
        found, waiting = list[str](), [*claim.of, *named_trainings(claim.options)]
        while waiting:
            name = waiting.pop(0)
            if name not in found:
                found.append(name)
                waiting += [self.trainings[name].like] if self.trainings[name].like else []
        return sorted(found)


def named_trainings(options: Mapping[str, Any]) -> list[str]:
    """The trainings that a measure's options name."""
    return [*options.get("source", {}).values(), *([options["final_of"]] if "final_of" in options else [])]


def options_of(command: str) -> dict[str, Any]:
    """What a command of an analysis asks, by option: a list of words, True, or False for `--no-x`; models, places and
    batches are left out."""
    found: dict[str, Any] = {}
    name = ""
    for word in shlex.split(command):
        if word.startswith("--no-"):
            name, found[word[5:]] = "", False
        elif word.startswith("--"):
            name = word
            if word not in UNDECIDED:
                found[word[2:]] = []
        elif name and name not in UNDECIDED:
            found[name[2:]].append(word)
    return {option: True if words == [] else words for option, words in found.items()}


def _plain(value: Any) -> Any:
    """Numbers alike however they are written, mappings and lists as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# --- reading --------------------------------------------------------------------------------------


def read_ledger(path: Path) -> Ledger:
    """Read a ledger's file.

    Raises:
        ConfigError, UnknownNameError: it is not there, or cannot be read; see `parse_ledger`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({one_line(error)}): expected a file of claims") from error
    return parse_ledger(text, str(path))


def parse_ledger(text: str, where: str) -> Ledger:
    """Read a ledger from YAML.

    Raises:
        ConfigError: not YAML, a key that is missing, of another type or twice, a rule that cannot decide.
        UnknownNameError: a key, a training, an analysis or a measure that is not there.
    """
    try:
        content = yaml.load(text, UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML ({one_line(error)})") from error
    _check_keys(content, Ledger, where)
    trainings = {
        name: _made(Training, own, f"training {name} in {where}") for name, own in content["trainings"].items()
    }
    claims = tuple(
        _made(Claim, own, f"claim {own.get('id') if isinstance(own, Mapping) else own} in {where}")
        for own in content["claims"]
    )
    ledger = Ledger(
        tuple(content["seeds"]), float(content["level"]), content["measures"], trainings, content["analyses"], claims
    )
    _check(ledger, where)
    return ledger


def _made(cls: type[Any], content: Any, where: str) -> Any:
    _check_keys(content, cls, where)
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})


def _check_keys(content: Any, cls: type[Any], where: str) -> None:
    """See that a mapping has the fields of a dataclass, of their types, and no others."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where} is {one_line(content, 60)}: expected a mapping of keys to values")
    known = {own.name: own for own in fields(cls)}
    for key, value in content.items():
        if key not in known:
            raise UnknownNameError(f"key of {where}", str(key), known)
        kinds = _KINDS[str(known[key].type).split("[")[0]]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{key} of {where} is {one_line(value, 60)}: expected {kinds[0].__name__}")
    for name, own in known.items():
        required = own.default is own.default_factory  # both are dataclasses.MISSING
        if required and name not in content:
            raise ConfigError(f"{where} has no {name}: expected one")


_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "float": (float, int), "tuple": (list,), "Mapping": (dict,)}


def _check(ledger: Ledger, where: str) -> None:
    ids = [claim.id for claim in ledger.claims]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ConfigError(f"two claims of {where} are called {twice[0]}: expected ids that differ")
    if len(set(ledger.seeds)) < 2 or not all(isinstance(seed, int) for seed in ledger.seeds):
        raise ConfigError(
            f"seeds of {where} are {list(ledger.seeds)}: expected two or more whole numbers, none of them twice"
        )
    if not 0 < ledger.level < 1:
        raise ConfigError(f"level of {where} is {ledger.level:g}: expected more than 0, below 1")
    for name, training in ledger.trainings.items():
        if "{seed}" not in training.folder:
            raise ConfigError(
                f"folder of training {name} in {where} is {training.folder}: expected a name with {{seed}}"
            )
        _check_name(training.checkpoint, ("last", "best"), f"checkpoint of training {name}")
        if training.like:
            _check_name(training.like, ledger.trainings, f"training that {name} is like")
        elif "data.train" not in training.recipe:
            raise ConfigError(
                f"training {name} in {where} is like no other and has no data.train in its recipe: expected what it"
                " learns from"
            )
    for name in ledger.trainings:
        chain = [name]
        while like := ledger.trainings[chain[-1]].like:
            if like in chain:
                raise ConfigError(
                    f"training {name} in {where} is like {' like '.join([*chain[1:], like])}: expected one at the end"
                    " that is like no other"
                )
            chain.append(like)
    for claim in ledger.claims:
        _check_claim(ledger, claim, where)
    rules = [ledger.hash(claim) for claim in ledger.claims if claim.tested]
    if len(set(rules)) < len(rules):
        same = [claim.id for claim in ledger.claims if claim.tested and rules.count(ledger.hash(claim)) > 1]
        raise ConfigError(
            f"the claims {', '.join(same)} of {where} have one rule: expected rules that differ, since each costs the"
            " others some of the level"
        )


def _check_claim(ledger: Ledger, claim: Claim, where: str) -> None:
    called = f"claim {claim.id} in {where}"
    if not re.fullmatch(r"[\w.-]+", claim.id):
        raise ConfigError(f"{called}: expected an id of letters, digits, '-', '_' and '.'")
    _check_name(claim.origin, ("paper", NO_PAPER), f"origin of {called}")
    if claim.not_testable:
        if claim.measure or claim.of or claim.expect:
            raise ConfigError(f"{called} has a rule and not_testable: expected one of the two")
        return
    _check_name(claim.measure, ledger.measures, f"measure of {called}")
    _check_name(claim.expect, EXPECTED, f"expectation of {called}")
    if not claim.weight > 0:
        raise ConfigError(f"weight of {called} is {claim.weight:g}: expected more than 0")
    if not claim.of or not all(isinstance(weight, int | float) and weight for weight in claim.of.values()):
        raise ConfigError(f"of of {called} is {dict(claim.of)}: expected trainings with weights other than 0")
    for name in (*claim.of, *named_trainings(claim.options)):
        _check_name(name, ledger.trainings, f"training of {called}")
    if "analysis" in claim.options:
        _check_name(claim.options["analysis"], ledger.analyses, f"analysis of {called}")


def _check_name(name: str, known: Iterable[str], what: str) -> None:
    if name not in known:
        raise UnknownNameError(what, name, known)
