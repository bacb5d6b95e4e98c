"""A training from Python: what the command does, and the public names."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import trainer
import workbench
from tests.conftest import run
from trainer import Training, read_recipe, train
from workbench.errors import ConfigError, RunError

TINY = {"optim": {"steps": 2, "batch_size": 2}, "data": {"limit_train": 4, "limit_val": 2}}


@pytest.mark.slow
def test_a_training_from_python_is_that_of_the_command(tmp_path: Path) -> None:
    model = {"layers": 1, "width": 16, "ffn": 16}
    training = train("shapes_stage1", output_dir=tmp_path / "api", seed=3, model=model, **TINY)
    flags = ["--optim.steps", "2", "--optim.batch_size", "2", "--data.limit_train", "4", "--data.limit_val", "2"]
    flags += ["--model.layers", "1", "--model.width", "16", "--model.ffn", "16"]
    run("trainer", "shapes_stage1", "--seed", "3", "--output_dir", str(tmp_path / "command"), *flags)
    command = Training(tmp_path / "command")
    pd.testing.assert_frame_equal(training.evaluation, command.evaluation)
    pd.testing.assert_frame_equal(training.log, command.log)
    assert training.record["recipe"]["seed"] == 3
    assert training.model().n_layers == 1
    assert {"category", "accuracy", "low", "high", "chance", "n", "seed"} <= {*training.scores.columns}
    stored, other = (load_file(folder / "model.safetensors") for folder in (training.folder, command.folder))
    assert stored.keys() == other.keys()
    # the tests before this one have chosen other kernels in this process
    assert all(torch.allclose(stored[name], other[name], atol=1e-5) for name in stored)
    with pytest.raises(RunError, match="is not empty"):
        train("shapes_stage1", output_dir=tmp_path / "api", seed=3, model=model, **TINY)


def test_what_python_asks_of_a_training_is_checked_as_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*layer"):
        train("shapes_viral", alignment={"layr": 4}, output_dir=tmp_path / "a")
    with pytest.raises(ConfigError, match=r"optim.steps is 0: expected at least 1"):
        train("shapes_viral", optim={"steps": 0}, output_dir=tmp_path / "a")
    with pytest.raises(ConfigError, match="option 'seed' beside a Recipe"):
        train(read_recipe("shapes_viral"), seed=1)
    with pytest.raises(
        ConfigError, match="dry_run is True, and train returns a finished run: expected False, or python"
    ):
        train("shapes_viral", dry_run=True, output_dir=tmp_path / "a")
    assert read_recipe("shapes_viral", output_dir="~/runs/a").output_dir == Path.home() / "runs" / "a"
    assert read_recipe("shapes_viral", resume=True, alignment={"vfm": ("a", "b")}).alignment.vfm == ("a", "b")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("package", [workbench, trainer], ids=lambda package: package.__name__)
def test_every_public_name_is_imported_from_where_the_stub_says(package: ModuleType) -> None:
    assert package.__all__
    assert all(getattr(package, name) is not None for name in package.__all__)
