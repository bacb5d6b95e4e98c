from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WRITE = """
import sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from workbench.files import atomic_file, atomic_folder
folder = Path(sys.argv[1])
with atomic_file(folder / "one.safetensors") as partial:
    save_file({"x": np.zeros(1)}, partial)
with atomic_folder(folder / "several") as partial:
    (partial / "below").mkdir()
    save_file({"x": np.zeros(1)}, partial / "below" / "two.safetensors")
"""


@pytest.mark.parametrize(
    ("umask", "file", "below"), [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)]
)
def test_what_is_written_may_be_read_by_those_whom_the_umask_lets(
    umask: int, file: int, below: int, tmp_path: Path
) -> None:
    """safetensors writes files that their owner alone may read, which a cache or a model folder that a group shares
    must not be."""
    subprocess.run([sys.executable, "-c", WRITE, tmp_path], check=True, umask=umask)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {
        "one.safetensors": file,
        "several": below,
        "several/below": below,
        "several/below/two.safetensors": file,
    }
