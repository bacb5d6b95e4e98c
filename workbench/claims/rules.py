"""Claims and the rules that decide them, as `analyses/claims.yaml` states them, and the hash of each rule.

A rule is fixed before the runs that it judges: its hash must be that of a rule in the file at the commit at which every
run was trained. The hash covers all that decides: the measure with its version and options, the trainings and what
makes them comparable, the options of the analysis's command, direction, null, seeds, level and weight. It does not
cover the wording (`claim`, `paper`, `note`), nor the folders of the runs.
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

FILE = "analyses/claims.yaml"  # path within the repository
# options of a command that are not part of a rule: which models, where, and in what batches
NOT_HASHED = ("--model", "--output_dir", "--source", "--batch_size", "--device", "--dtype")
EXPECTED = ("more", "less")
NO_PAPER = "workbench"


@dataclass(frozen=True)
class Training:
    """Runs of one variant, one for each seed.

    Attributes:
        folder: name of a run's folder, with `{seed}` in it.
        recipe: values that the recipe must have, by dotted key.
        like: another training; with the same seed, its recipe must be the same except for `but`, and so must the
            training data.
        but: keys, or sections of keys (`alignment`), that may differ from `like`.
        checkpoint: `last`, or `best` for the model with the highest validation score.
        sweep: file of the sweep that trains it.
        runs: output folder of that sweep.
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
        """The part of the training that rules depend on."""
        return {
            "folder": self.folder,
            "recipe": dict(self.recipe),
            "like": self.like,
            "but": sorted(self.but),
            "checkpoint": self.checkpoint,
        }


@dataclass(frozen=True)
class Claim:
    """A claim with its rule, or with the reason why it has none.

    Attributes:
        claim: the claim in our words.
        paper: the paper's number, with its table or figure.
        origin: `paper`, or `workbench` if only this experiment asks.
        note: a remark for readers.
        measure: name of a measure.
        options: options of the measure.
        of: weight of each training in the number of a seed.
        expect: whether the claim expects `more` or `less` than `than`.
        than: value under the null hypothesis.
        weight: the rule's share of the error level, relative to the other rules.
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
        """Whether the claim has a rule."""
        return not self.not_testable


@dataclass(frozen=True)
class Ledger:
    """All claims, and what their rules refer to.

    Attributes:
        seeds: training seeds that every rule is tested over.
        level: error level of Holm's correction over all rules.
        measures: version of each measure.
        trainings: by name.
        analyses: command of each analysis.
    """

    seeds: tuple[int, ...]
    level: float
    measures: Mapping[str, int]
    trainings: Mapping[str, Training]
    analyses: Mapping[str, str]
    claims: tuple[Claim, ...]

    def rules(self) -> dict[str, Claim]:
        """Return the claims that have a rule, by the rule's hash."""
        return {self.hash(claim): claim for claim in self.claims if claim.tested}

    def hash(self, claim: Claim) -> str:
        """Return the hash of a claim's rule, 12 hexadecimal digits."""
        analysis = claim.options.get("analysis")
        content = {
            "measure": [claim.measure, self.measures[claim.measure]],
            "options": claim.options,
            "of": claim.of,
            "rule": [claim.expect, claim.than, claim.weight, self.level, sorted(self.seeds)],
            "trainings": {name: self.trainings[name].decides for name in self.needed(claim)},
            "analysis": [analysis, options_of(self.analyses[analysis])] if analysis else None,
        }
        return hashlib.sha256(json.dumps(_normalized(content), sort_keys=True).encode()).hexdigest()[:12]

    def needed(self, claim: Claim) -> list[str]:
        """Return the names of all trainings that a claim refers to, and of those that they are `like`."""
        names, waiting = list[str](), [*claim.of, *named_trainings(claim.options)]
        while waiting:
            name = waiting.pop(0)
            if name not in names:
                names.append(name)
                waiting += [self.trainings[name].like] if self.trainings[name].like else []
        return sorted(names)


def named_trainings(options: Mapping[str, Any]) -> list[str]:
    """Return the trainings that a measure's options name."""
    return [*options.get("source", {}).values(), *([options["final_of"]] if "final_of" in options else [])]


def options_of(command: str) -> dict[str, Any]:
    """Return the options in an analysis's command that change its numbers.

    Returns:
        {option: list of words; True for an option without words; False for `--no-option`}.
    """
    options: dict[str, Any] = {}
    name = ""
    for word in shlex.split(command):
        if word.startswith("--no-"):
            name, options[word[5:]] = "", False
        elif word.startswith("--"):
            name = word
            if word not in NOT_HASHED:
                options[word[2:]] = []
        elif name and name not in NOT_HASHED:
            options[name[2:]].append(word)
    return {option: True if words == [] else words for option, words in options.items()}


def _normalized(value: Any) -> Any:
    """Return a value for hashing: equal numbers are equal however they were written, tuples become lists."""
    if isinstance(value, Mapping):
        return {str(key): _normalized(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normalized(item) for item in value]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# --- reading --------------------------------------------------------------------------------------


def read_ledger(path: Path) -> Ledger:
    """Read a ledger from its file.

    Raises:
        ConfigError, UnknownNameError: the file cannot be read, or see `parse_ledger`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({one_line(error)}): expected a YAML file of claims") from error
    return parse_ledger(text, str(path))


def parse_ledger(text: str, where: str) -> Ledger:
    """Read a ledger from YAML, and check that every rule in it can decide.

    Args:
        where: name of the file, for errors.

    Raises:
        ConfigError: not YAML; a key is missing, twice or of another type; a rule cannot decide.
        UnknownNameError: a key, a training, an analysis or a measure does not exist.
    """
    try:
        content = yaml.load(text, UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML ({one_line(error)})") from error
    _check_keys(content, Ledger, where)
    trainings = {
        name: _build(Training, entry, f"training {name} in {where}") for name, entry in content["trainings"].items()
    }
    claims = tuple(
        _build(Claim, entry, f"claim {entry.get('id') if isinstance(entry, Mapping) else entry} in {where}")
        for entry in content["claims"]
    )
    ledger = Ledger(
        tuple(content["seeds"]), float(content["level"]), content["measures"], trainings, content["analyses"], claims
    )
    _check(ledger, where)
    return ledger


def _build(cls: type[Any], content: Any, where: str) -> Any:
    """Return a dataclass with the values of a YAML mapping, after checking its keys."""
    _check_keys(content, cls, where)
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})


def _check_keys(content: Any, cls: type[Any], where: str) -> None:
    """Check that a mapping has the fields of a dataclass, with values of their types, and no other keys."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where} is {one_line(content, 60)}: expected a mapping of keys to values")
    known = {each.name: each for each in fields(cls)}
    for key, value in content.items():
        if key not in known:
            raise UnknownNameError(f"key of {where}", str(key), known)
        types = _YAML_TYPES[str(known[key].type).split("[")[0]]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ConfigError(
                f"{key} of {where} is {one_line(value, 60)}: expected a value of type {types[0].__name__}"
            )
    for name, each in known.items():
        required = each.default is each.default_factory  # both are dataclasses.MISSING
        if required and name not in content:
            raise ConfigError(f"{where} has no {name}: expected a value for this key")


_YAML_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "float": (float, int), "tuple": (list,), "Mapping": (dict,)}


def _check(ledger: Ledger, where: str) -> None:
    """Check that the parts of a ledger fit together, and that its rules can decide.

    Raises:
        ConfigError, UnknownNameError: for the first problem.
    """
    ids = [claim.id for claim in ledger.claims]
    if duplicates := sorted({name for name in ids if ids.count(name) > 1}):
        raise ConfigError(f"two claims of {where} have the id {duplicates[0]}: expected a different id for each")
    different = len(set(ledger.seeds)) == len(ledger.seeds) > 1
    if not different or not all(isinstance(seed, int) for seed in ledger.seeds):
        raise ConfigError(
            f"seeds of {where} are {list(ledger.seeds)}: expected at least two whole numbers, none of them twice"
        )
    if not 0 < ledger.level < 1:
        raise ConfigError(f"level of {where} is {ledger.level:g}: expected more than 0, below 1")
    for name, training in ledger.trainings.items():
        if "{seed}" not in training.folder:
            raise ConfigError(
                f"folder of training {name} in {where} is {training.folder}: expected a name with {{seed}} in it"
            )
        _check_name(training.checkpoint, ("last", "best"), f"checkpoint of training {name}")
        if training.like:
            _check_name(training.like, ledger.trainings, f"training that {name} is like")
        elif "data.train" not in training.recipe:
            raise ConfigError(
                f"training {name} in {where} has neither `like` nor data.train in its recipe: expected one of them, to"
                " know its training data"
            )
    for name in ledger.trainings:
        chain = [name]
        while like := ledger.trainings[chain[-1]].like:
            if like in chain:
                raise ConfigError(
                    f"training {name} in {where} is like {' like '.join([*chain[1:], like])}, a circle: expected a"
                    " training without `like` at the end"
                )
            chain.append(like)
    for claim in ledger.claims:
        _check_claim(ledger, claim, where)
    rules = [ledger.hash(claim) for claim in ledger.claims if claim.tested]
    if len(set(rules)) < len(rules):
        same = [claim.id for claim in ledger.claims if claim.tested and rules.count(ledger.hash(claim)) > 1]
        raise ConfigError(
            f"the claims {', '.join(same)} of {where} have the same rule: expected a different rule for each, since"
            " every rule makes the correction stricter for the others"
        )


def _check_claim(ledger: Ledger, claim: Claim, where: str) -> None:
    """Check that a claim has either a rule that can decide or `not_testable`."""
    name_of_claim = f"claim {claim.id} in {where}"
    if not re.fullmatch(r"[\w.-]+", claim.id):
        raise ConfigError(f"{name_of_claim}: expected an id of letters, digits, '-', '_' and '.'")
    _check_name(claim.origin, ("paper", NO_PAPER), f"origin of {name_of_claim}")
    if claim.not_testable:
        if claim.measure or claim.of or claim.expect:
            raise ConfigError(f"{name_of_claim} has both a rule and not_testable: expected only one of them")
        return
    _check_name(claim.measure, ledger.measures, f"measure of {name_of_claim}")
    _check_name(claim.expect, EXPECTED, f"expectation of {name_of_claim}")
    if not claim.weight > 0:
        raise ConfigError(f"weight of {name_of_claim} is {claim.weight:g}: expected more than 0")
    if not claim.of or not all(isinstance(weight, int | float) and weight for weight in claim.of.values()):
        raise ConfigError(
            f"`of` in {name_of_claim} is {dict(claim.of)}: expected names of trainings with weights other than 0"
        )
    for name in (*claim.of, *named_trainings(claim.options)):
        _check_name(name, ledger.trainings, f"training of {name_of_claim}")
    if "analysis" in claim.options:
        _check_name(claim.options["analysis"], ledger.analyses, f"analysis of {name_of_claim}")


def _check_name(name: str, known: Iterable[str], what: str) -> None:
    if name not in known:
        raise UnknownNameError(what, name, known)
