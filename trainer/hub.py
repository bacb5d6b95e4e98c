"""Uploading a finished model to the hub."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from workbench.errors import ConfigError, RunError, one_line
from workbench.files import HEAD_FILE
from workbench.mllm.residual import FILE as RESIDUAL_FILE
from workbench.weights.pretrained import call

CARD_FILE = "README.md"
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
SENT = (
    *(
        CARD_FILE,
        "config.json",
        "generation_config.json",
        "*processor_config.json",
        "chat_template*",
        "accuracy.parquet",
    ),
    *("model*.safetensors", "model.safetensors.index.json", HEAD_FILE, RESIDUAL_FILE),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)


def check_hub(name: str) -> None:
    """See, before anything is trained, that a push can be tried.

    Raises:
        ConfigError: a name that no repository can have, a machine that is set offline, nobody logged in, or a hub that
            is out of reach or refuses the login.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"push_to_hub is '{name}': expected a name such as NAME/MODEL ({' '.join(str(error).split())})"
        ) from None
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(
            f"push_to_hub is {name}, and HF_HUB_OFFLINE is set: expected a machine that may reach the hub, or no"
            " push_to_hub"
        )
    if get_token() is None:
        raise ConfigError(
            f"push_to_hub is {name}: expected to be logged in, with `hf auth login` or the variable HF_TOKEN"
        )

    def failed(error: Exception) -> ConfigError:
        why = f"the hub is out of reach or refuses the login ({one_line(error, 120)})"
        return ConfigError(f"push_to_hub is {name}, and {why}: expected a hub that takes the model")

    call(lambda: HfApi().whoami(), failed)


def sent_files(folder: Path) -> list[str]:
    """The names of the files that go to the hub."""
    return sorted(
        file.name
        for file in folder.iterdir()
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in SENT)
    )


def push(folder: Path, name: str) -> str:
    """Send the finished model in `folder` to the hub and return its address; a repository that is not there yet becomes
    a private one.

    Raises:
        RunError: the hub cannot be reached or refuses; nothing is lost here.
    """
    api, files = HfApi(), sent_files(folder)

    def failed(error: Exception) -> RunError:
        again = f"`python -m trainer.card {folder} --push_to_hub {name}`"
        return RunError(f"cannot send the model to {name} ({one_line(error, 100)}); it is whole in {folder}: {again}")

    repository = call(lambda: api.create_repo(name, private=True, exist_ok=True), failed)
    call(
        lambda: api.upload_folder(
            folder_path=folder, repo_id=repository.repo_id, allow_patterns=files, commit_message="Upload model"
        ),
        failed,
    )
    return str(repository)
