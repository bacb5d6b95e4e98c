"""Upload of a finished model to the Hugging Face hub."""

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
UPLOADED = (
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
    """Check, before anything is trained, that an upload to the repository `name` can be tried.

    Raises:
        ConfigError: no repository can have this name, HF_HUB_OFFLINE is set, nobody is logged in, or the hub cannot be
            reached or refuses the login.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"push_to_hub is '{name}': expected a name such as NAME/MODEL ({' '.join(str(error).split())})"
        ) from None
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(
            f"push_to_hub is {name}, but HF_HUB_OFFLINE is set: unset it on a machine that can reach the hub, or leave"
            " push_to_hub out"
        )
    if get_token() is None:
        raise ConfigError(
            f"push_to_hub is {name}, but nobody is logged in: run `hf auth login`, or set the variable HF_TOKEN"
        )

    def failed(error: Exception) -> ConfigError:
        return ConfigError(
            f"push_to_hub is {name}, but the hub cannot be reached or refuses the login ({one_line(error, 120)}): check"
            " network and login, or leave push_to_hub out"
        )

    call(lambda: HfApi().whoami(), failed)


def uploaded_files(folder: Path) -> list[str]:
    """Return the names of the files in `folder` that an upload includes."""
    return sorted(
        file.name
        for file in folder.iterdir()
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in UPLOADED)
    )


def push(folder: Path, name: str) -> str:
    """Upload the finished model in `folder` to the hub and return its address; a new repository is private.

    Raises:
        RunError: the hub cannot be reached or refuses the upload; `folder` is unchanged.
    """
    api, files = HfApi(), uploaded_files(folder)

    def failed(error: Exception) -> RunError:
        again = f"`python -m trainer.card {folder} --push_to_hub {name}`"
        return RunError(
            f"cannot upload the model to {name} ({one_line(error, 100)}); it is complete in {folder}: try again with"
            f" {again}"
        )

    repository = call(lambda: api.create_repo(name, private=True, exist_ok=True), failed)
    call(
        lambda: api.upload_folder(
            folder_path=folder, repo_id=repository.repo_id, allow_patterns=files, commit_message="Upload model"
        ),
        failed,
    )
    return str(repository)
