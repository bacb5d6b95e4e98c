"""Options of the dynamics analysis, and the names of its scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from workbench.benchmarks.asking import QuestionOptions
from workbench.data import Dataset, load_data
from workbench.errors import ConfigError
from workbench.options import refuse_unused

ACCURACY, CKNNA, DROP, BENCHMARK = "accuracy", "CKNNA", "drop in accuracy", "benchmark"
MEAN_OF_BENCHMARKS = "mean of benchmarks"


@dataclass(frozen=True)
class Config(QuestionOptions):
    """Options of the evaluation of every checkpoint."""

    ADDED: ClassVar[tuple[str, ...]] = (
        *QuestionOptions.ADDED,
        *("benchmarks", "benchmark_limit", "scorer", "decoding", "max_new_tokens", "only_benchmarks"),
    )

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models (VFMs) that the visual tokens are compared with; own is the model's own encoder."""
    layers: tuple[int, ...] = ()
    """Layers for CKNNA, 0 to L; by default 1, the aligned layer (the middle one without alignment) and the last."""
    k: Annotated[int, Ge(1)] = 10
    """Nearest neighbors in CKNNA."""
    null: Annotated[int, Ge(10)] = 20
    """Permutations for CKNNA's null."""
    permutations: Annotated[int, Ge(1)] = 2
    """Random permutations of each image's tokens; the accuracy drop is averaged over them."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks to ask at every checkpoint, such as pope:PATH; the mean of several is measured, too."""
    benchmark_limit: Annotated[int, Ge(1)] = 100_000
    """Number of images of each benchmark; by default all."""
    scorer: Literal["own", "official", "lmms", "adaptvis", "paper", "sum", "mean"] = "own"
    """Scorer of the benchmarks' answers; sum or mean with likelihood."""
    decoding: Literal["greedy", "likelihood"] = "greedy"
    """How the answers to the benchmarks come about: generated, or the likeliest of the options."""
    max_new_tokens: Annotated[int, Ge(1)] = 16
    """Tokens at which a generated answer is cut."""
    only_benchmarks: bool = False
    """Ask the benchmarks and leave out the questions about --data, permutation and alignment."""

    @cached_property
    def benchmark_data(self) -> dict[str, Dataset]:
        """{spec: data set} of the benchmarks, loaded once for the key of a run and for all models."""
        return {spec: load_data(spec, limit=self.benchmark_limit, seed=self.data_seed) for spec in self.benchmarks}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vfm:
            raise ConfigError("vfm is empty: expected at least one VFM, as --vfm NAME ...")
        if twice := next((spec for spec in self.benchmarks if self.benchmarks.count(spec) > 1), None):
            raise ConfigError(f"benchmarks names {twice} more than once: expected each data set once")
        if self.only_benchmarks and not self.benchmarks:
            raise ConfigError("only_benchmarks is set, but no benchmark is named: expected --benchmarks pope:PATH ...")
        if not self.benchmarks:
            names = "benchmark_limit", "scorer", "decoding"
            refuse_unused(self, *names, because="no benchmark is named", expected="--benchmarks pope:PATH ...")
