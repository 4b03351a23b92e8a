"""What every generation engine looks like from outside, and the directory that hands it new weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

WEIGHTS_MANIFEST = "weights.json"


@dataclass(frozen=True)
class GenerationRequest:
    """One response to generate.

    Attributes:
        index: the caller's number of this request, returned with its completion.
        prompt_tokens: i32 [P].
        max_new_tokens: longest response, tokens; reaching it is finish_reason "length".
        temperature: divides the logits; 0 means greedy.
        top_p: nucleus mass, 1 switches it off.
        top_k: most probable tokens kept, 0 switches it off.
        stop_token_ids: a response ends with the first of these, which stays part of it.
        seed: of this request's random numbers, >= 0.
    """

    index: int
    prompt_tokens: np.ndarray
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One generated response.

    Attributes:
        index: of the request.
        tokens: i32 [R], the stop token included when one was generated.
        logprobs: f32 [R], nats, of the temperature-scaled softmax over the full vocabulary (temperature 1
            for greedy requests).
        finish_reason: "stop" or "length".
        kept_mass: mean probability mass that top_k / top_p kept, 1.0 when both are off; NaN where the engine was not
            asked for it.
        policy_version: version of the oldest weights that generated any of it.
        version_spans: ((first token, version), ...) where several versions did, the first at token 0; else ().
        attempts: how often it was begun; more than 1 where engines failed.
    """

    index: int
    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    kept_mass: float
    policy_version: int
    version_spans: tuple[tuple[int, int], ...] = ()
    attempts: int = 1


class Engine(Protocol):
    """A generator of responses; the driver knows no more about it than this.

    `load_weights`, `pause` and `resume` may be called while another thread generates: responses under way go on with
    the new weights, and their completions say which tokens came from which version.
    """

    @property
    def policy_version(self) -> int | None:
        """Version of the loaded weights; None when there are none."""

    @property
    def needs_weights(self) -> bool:
        """Whether servers have lost the weights that another transport had brought, and wait for them."""

    def load_weights(self, path: Path, policy_version: int) -> None:
        """Take the weights of a directory with a manifest (`write_weights_manifest`)."""

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]:
        """Completions as they finish, in any order."""

    def begin_update(self) -> list[str]:
        """Another transport is about to change the weights; where to."""

    def end_update(self, policy_version: int, path: Path | None = None) -> None:
        """It has brought weights of this version, which this directory has too."""

    def pause(self) -> None:
        """Stop generating where it is; on return nothing is computed any more."""

    def resume(self) -> None:
        """Go on; without effect where nothing was paused."""

    def statistics(self) -> dict[str, float]:
        """Counts since the last call: what went wrong and was mended."""

    def close(self) -> None:
        """Free everything."""


def write_weights_manifest(directory: Path, policy_version: int, files: Sequence[str]) -> None:
    """Mark a directory of safetensors files as complete; call it after the last of them is written."""
    part = directory / f"{WEIGHTS_MANIFEST}.part"
    part.write_text(json.dumps({"policy_version": policy_version, "files": list(files)}))
    os.replace(part, directory / WEIGHTS_MANIFEST)


def read_weights_manifest(directory: Path, policy_version: int) -> list[Path]:
    """Files of a complete weights directory.

    Raises:
        ValueError: no manifest, another version, or a listed file is missing.
    """
    path = directory / WEIGHTS_MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, files = manifest["policy_version"], [directory / name for name in manifest["files"]]
    except FileNotFoundError:
        raise ValueError(f"weights {directory}: got no {WEIGHTS_MANIFEST}, need one; write it last") from None
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"weights {path}: is not a manifest of policy_version and files: {e!r}") from e
    if version != policy_version:
        raise ValueError(f"weights {directory}: got policy_version {version}, need {policy_version}; push again")
    missing = [f.name for f in files if not f.is_file()]
    if missing or not files:
        raise ValueError(f"weights {directory}: got no file {missing or 'at all'}, need all listed; push again")
    return files
