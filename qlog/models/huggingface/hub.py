"""Where a model's folder is: here, in a bucket, among staged assets, or on the Hugging Face Hub."""

import fnmatch
import functools
import os
import pathlib

import huggingface_hub

from qlog.errors import ConfigError, PassingError, summary
from qlog.models.huggingface.tensors import tensor_files
from qlog.storage import assets, paths

_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def resolve(
    spec: str | os.PathLike, *, weights: bool = True, field: str = "config.model"
) -> pathlib.Path:
    """The local folder of a model.

    A Hub id is looked for in QLOG_ASSETS first (see qlog.storage.assets). Then it is downloaded
    from the Hub, on first use, into the cache of huggingface_hub (set HF_HOME to move it). An
    interrupted download is continued. Where there are several processes, call this within
    `distributed.once_per_host`.

    Args:
      spec: a folder here or in a bucket, or a Hub id 'owner/name' or 'owner/name@revision'.
      weights: False leaves out *.safetensors, where only the shape or the tokenizer is needed.
      field: the setting that named the model, for messages.

    Raises:
      ConfigError: the folder holds no model, or the Hub does not have it or refuses it.
      PassingError: a bucket or the Hub cannot be reached now.
    """
    wanted = functools.partial(is_wanted, weights=weights)
    folder = None if is_hub_id(spec) else assets.local(spec, field, wanted)
    if folder is not None and paths.is_folder(folder):
        return _whole(folder, field, spec, weights)
    if folder is not None:
        raise ConfigError(
            f"{field} = {str(spec)!r} is not a folder here and not a Hub id of the form "
            "'owner/name'."
        )
    staged = assets.find(f"models/{spec}", functools.partial(_is_complete, weights), wanted)
    found = staged or _from_hub(str(spec), weights)
    # Without weights it may be a repository of a tokenizer alone.
    return _whole(found, field, spec, weights) if weights else found


def _whole(
    folder: pathlib.Path, field: str, spec: str | os.PathLike, weights: bool
) -> pathlib.Path:
    """The folder, if all of a model is there: data are prepared only for a model that loads.

    A download that was cut off leaves links of a cache, or only some of the files; without a
    network the Hub's client takes it for the model.
    """
    if not paths.is_file(folder / "config.json"):
        hint = assets.why_missing(folder / "config.json")
        raise ConfigError(
            f"{field} = {os.fspath(spec)!r} is not a Hugging Face model, since {folder} holds no "
            f"config.json{hint}: correct the path, or download the model again."
        )
    if weights:
        tensor_files(folder)
    return folder


def is_hub_id(spec: str | os.PathLike) -> bool:
    """Whether `spec` has the form 'owner/name' and there is no local folder of that name."""
    # 'a/b' may be a folder as well as an id: a folder that is there counts first.
    text = os.fspath(spec)
    name = text.partition("@")[0]
    return (
        name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and not paths.is_folder(pathlib.Path(text))
    )


def is_wanted(name: str, weights: bool) -> bool:
    """Whether qlog reads a model's file of this name; with `weights`, safetensors too."""
    patterns = _HUB_PATTERNS if weights else _HUB_PATTERNS[1:]
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns) and "/" not in name


def _is_complete(weights: bool, names: set[str]) -> bool:
    return "config.json" in names and (
        not weights or any(n.endswith(".safetensors") for n in names)
    )


def _from_hub(spec: str, weights: bool) -> pathlib.Path:
    name, _, revision = spec.partition("@")
    try:
        patterns = _HUB_PATTERNS if weights else _HUB_PATTERNS[1:]
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=list(patterns)
            )
        )
    except Exception as error:  # the Hub's client raises what its layers below raise
        reason = f"{type(error).__name__}: {summary(error)}"
        command = f"{name} --revision {revision}" if revision else name
        message = (
            f"{name!r} is not a folder here, and the Hugging Face Hub does not give it ({reason}): "
            f"where there is a network, run `launch/stage --model={spec} --to=FOLDER` and set "
            f"{assets.ENVIRONMENT}=FOLDER (or gs://BUCKET/...) where every host of this run can "
            f"read it; or run `hf download {command} --local-dir FOLDER` and give FOLDER instead "
            f"of {name!r}."
        )
        raise (PassingError if _passes(error) else ConfigError)(message) from error


def _passes(error: BaseException | None) -> bool:
    """Whether asking the Hub again later may help: it did not answer, or its answer says so."""
    # The client wraps errors of the layers below, so the reason may be anywhere down the chain.
    while error is not None:
        # A setting of this machine, or an id that the client refuses: it stays so.
        if isinstance(error, huggingface_hub.errors.OfflineModeIsEnabled | ValueError):
            return False
        response = getattr(error, "response", None)
        if response is not None:
            # "Ask later" and faults of the server; the other codes are answers.
            return response.status_code in (408, 425, 429) or response.status_code >= 500
        if isinstance(error, TimeoutError | ConnectionError) or "Timeout" in type(error).__name__:
            return True
        if "Connect" in type(error).__name__ or "ProtocolError" in type(error).__name__:
            return True
        error = error.__cause__ or error.__context__
    return False
