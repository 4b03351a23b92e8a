"""The embedded engine: Hugging Face models in this process, for machines without a server; CPU and GPU alike."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from asyppo_megatron.rollout.engine import Completion, GenerationRequest, read_weights_manifest
from asyppo_megatron.rollout.gate import Gate
from asyppo_megatron.rollout.sampling import request_uniforms, sample

CHECK_EVERY = 4  # tokens between looks at which rows are done; each look waits for the device


@dataclass
class _Rows:
    """Rows that are generated together; row order is the same in every field.

    Attributes:
        requests: of each row.
        cache: keys and values of the tokens so far.
        mask: bool [B, S + L], true at cache slots that hold a token of the row (or will); S prompt slots.
        uniforms: f64 [B, L], one a generated token.
        prompt_lengths, limits: i64 [B], tokens.
        tokens, logprobs, kept: i32, f32, f32 [B, L], what was generated.
        first_version: of the weights that read the prompts.
        switches: (token, version) of every later change of weights; all rows are at the same token.
        lengths: i64 [B], tokens generated.
        done: bool [B].
    """

    requests: list[GenerationRequest]
    cache: Any
    mask: torch.Tensor
    uniforms: torch.Tensor
    prompt_lengths: torch.Tensor
    limits: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor
    kept: torch.Tensor
    lengths: torch.Tensor
    done: torch.Tensor
    first_version: int
    switches: list[tuple[int, int]] = field(default_factory=list)

    def note_version(self, token: int, version: int) -> None:
        """Token number `token` of every row will come from weights of this version."""
        if version != (self.switches[-1][1] if self.switches else self.first_version):
            self.switches.append((token, version))

    def spans(self, length: int) -> tuple[tuple[int, int], ...]:
        """Stretches of equal version of a response of that length; () where there is one."""
        switches = [(token, version) for token, version in self.switches if token < length]
        return ((0, self.first_version), *switches) if switches else ()

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these (i64)."""
        self.requests = [self.requests[i] for i in rows.tolist()]
        self.cache.batch_select_indices(rows)
        names = ("mask", "uniforms", "prompt_lengths", "limits", "tokens", "logprobs", "kept", "lengths", "done")
        for name in names:
            setattr(self, name, getattr(self, name)[rows])


class EmbeddedEngine:
    """Batched generation with a key-value cache.

    New weights may come between two tokens: the responses under way go on with them and the keys and values that
    the old ones left.

    A response depends on its request and the weights alone, not on the batch it happened to be in (but for the
    rounding of floating-point sums): its random numbers come from its own seed.
    """

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device, max_batch: int):
        """Build the model of `model_dir`'s config.json; weights come by `load_weights` or `load_pretrained`."""
        self._model_dir, self._device, self._max_batch = model_dir, device, max_batch
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self._model = model.eval().requires_grad_(False)
        self._config = config.get_text_config(decoder=True)
        self._version: int | None = None
        self._gate = Gate()
        self._one = threading.Lock()  # one generation at a time
        self._is_paused = False

    @property
    def policy_version(self) -> int | None:
        return self._version

    @property
    def needs_weights(self) -> bool:
        return False

    def pause(self) -> None:
        if not self._is_paused:
            self._gate.hold()
            self._is_paused = True

    def resume(self) -> None:
        if self._is_paused:
            self._gate.release()
            self._is_paused = False

    def statistics(self) -> dict[str, float]:
        return {}

    def begin_update(self) -> list[str]:
        raise RuntimeError("embedded engine: takes weights from a directory only; call load_weights")

    def end_update(self, policy_version: int, path: Path | None = None) -> None:
        self.begin_update()

    def load_pretrained(self, policy_version: int = 0) -> None:
        """Take the weights that lie beside the config, which need no manifest."""
        files = sorted(self._model_dir.glob("*.safetensors"))
        if not files:
            raise ValueError(f"model {self._model_dir}: got no *.safetensors, need the weights; export the model first")
        self._copy_weights(files, policy_version)

    def load_weights(self, path: Path, policy_version: int) -> None:
        """Take the weights of a directory with a manifest of this version, in place.

        Raises:
            ValueError: the directory is incomplete, of another version, or does not fit the model; the old
                weights stay in that case.
        """
        self._copy_weights(read_weights_manifest(path, policy_version), policy_version)

    def _copy_weights(self, files: Sequence[Path], policy_version: int) -> None:
        targets = self._model.state_dict()
        self._check_weights(files, targets)
        self._gate.hold()
        try:
            self._version = None  # a failure between two tensors leaves no usable weights
            for file in files:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                        targets[name].copy_(tensors.get_tensor(name))
            self._version = policy_version
        finally:
            self._gate.release()

    def _check_weights(self, files: Sequence[Path], targets: dict[str, torch.Tensor]) -> None:
        errors: list[str] = []
        seen: set[str] = set()
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    shape = tuple(tensors.get_slice(name).get_shape())
                    if name not in targets:
                        errors.append(f"{name}: unknown to the model")
                    elif name in seen:
                        errors.append(f"{name}: given twice")
                    elif shape != tuple(targets[name].shape):
                        errors.append(f"{name}: got shape {shape}, need {tuple(targets[name].shape)}")
                    seen.add(name)
        optional = {"lm_head.weight"} if self._config.tie_word_embeddings else set()
        errors.extend(f"{name}: missing" for name in sorted(set(targets) - seen - optional))
        if errors:
            shown = "; ".join(errors[:5]) + (f"; and {len(errors) - 5} more" if len(errors) > 5 else "")
            raise ValueError(f"weights {files[0].parent}: do not fit the model of {self._model_dir}: {shown}")

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]:
        """Completions as they finish, in any order."""
        if self._version is None:
            raise RuntimeError("embedded engine: got a request before any weights; call load_weights first")
        self._check_requests(requests)
        with self._one:
            for rows in _batches(requests, self._max_batch):
                yield from self._generate_batch(rows)

    def close(self) -> None:
        self._model = None
        self._version = None

    def _check_requests(self, requests: Sequence[GenerationRequest]) -> None:
        longest = self._config.max_position_embeddings
        for r in requests:
            if len(r.prompt_tokens) == 0 or r.max_new_tokens < 1:
                raise ValueError(f"request {r.index}: got an empty prompt or no room for a response, need >= 1 token")
            if len(r.prompt_tokens) + r.max_new_tokens > longest:
                raise ValueError(
                    f"request {r.index}: got {len(r.prompt_tokens)} prompt + {r.max_new_tokens} response tokens, need "
                    f"<= {longest} (max_position_embeddings); lower rollout.max_response_tokens"
                )
            if r.prompt_tokens.min() < 0 or r.prompt_tokens.max() >= self._config.vocab_size:
                raise ValueError(f"request {r.index}: got token ids outside the model's {self._config.vocab_size}")

    @torch.inference_mode()
    def _generate_batch(self, requests: list[GenerationRequest]) -> Iterator[Completion]:
        """All rows share temperature, filters and stop tokens."""
        first = requests[0]
        stops = torch.tensor(first.stop_token_ids, dtype=torch.long, device=self._device)
        rows, logits = self._prefill(requests)
        version = rows.first_version
        slots = rows.mask.size(1) - rows.tokens.size(1)
        for t in range(rows.tokens.size(1)):
            token, logprob, kept = sample(logits, rows.uniforms[:, t], first.temperature, first.top_p, first.top_k)
            rows.tokens[:, t], rows.logprobs[:, t] = token, logprob
            if kept is not None:
                rows.kept[:, t] = kept
            rows.note_version(t, version)
            rows.lengths += ~rows.done
            rows.done |= torch.isin(token, stops) | (rows.limits == t + 1)
            if (t + 1) % CHECK_EVERY == 0 or t + 1 == rows.tokens.size(1):
                done = rows.done.cpu()
                if done.any():
                    yield from self._completions(rows, done)
                    if done.all():
                        return
                    active = (~done).nonzero()[:, 0].to(self._device)
                    rows.keep(active)
                    token = token[active]
            logits, version = self._forward(
                token[:, None],
                rows.mask[:, None, None, : slots + t + 1],
                rows.prompt_lengths[:, None] + t,
                rows.cache,
            )

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, int]:
        """Logits of the last slot, [B, V], and the version of the weights; mask bool [B, 1, queries, keys]."""
        self._gate.enter()
        try:
            if self._version is None:
                raise RuntimeError("embedded engine: new weights could not be taken in whole; push them again")
            out = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return out.logits[:, -1], self._version
        finally:
            self._gate.leave()

    def _prefill(self, requests: list[GenerationRequest]) -> tuple[_Rows, torch.Tensor]:
        """Run each distinct prompt once, then give every row its copy of the cache."""
        unique: dict[bytes, int] = {}
        prompt_of = [unique.setdefault(r.prompt_tokens.astype(np.int64).tobytes(), len(unique)) for r in requests]
        prompts = [np.frombuffer(key, dtype=np.int64) for key in unique]
        width = max(map(len, prompts))
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        valid = np.zeros((len(prompts), width), dtype=bool)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = prompt
            valid[i, width - len(prompt) :] = True
        # A padding slot sees itself: a query without any key would become NaN and spread through its value.
        seen = torch.from_numpy(valid).to(self._device)
        causal = torch.ones(width, width, dtype=torch.bool, device=self._device).tril_()
        eye = torch.eye(width, dtype=torch.bool, device=self._device)
        mask = (causal & seen[:, None, None, :]) | eye
        positions = (seen.long().cumsum(1) - 1).clamp_(min=0)
        cache = DynamicCache(config=self._model.config)
        logits, version = self._forward(torch.from_numpy(ids).to(self._device), mask, positions, cache)
        chosen = torch.tensor(prompt_of, device=self._device)
        cache.batch_select_indices(chosen)
        return self._rows(requests, cache, seen[chosen], version), logits[chosen]

    def _rows(self, requests: list[GenerationRequest], cache: Any, seen: torch.Tensor, version: int) -> _Rows:
        count, longest, device = len(requests), max(r.max_new_tokens for r in requests), self._device
        uniforms = np.zeros((count, longest))
        for i, r in enumerate(requests):
            if r.temperature > 0:
                uniforms[i, : r.max_new_tokens] = request_uniforms(r.seed, r.max_new_tokens)
        return _Rows(
            requests=requests,
            cache=cache,
            mask=torch.cat([seen, seen.new_ones(count, longest)], 1),
            uniforms=torch.from_numpy(uniforms).to(device),
            prompt_lengths=seen.sum(1),
            limits=torch.tensor([r.max_new_tokens for r in requests], device=device),
            tokens=torch.zeros(count, longest, dtype=torch.int32, device=device),
            logprobs=torch.zeros(count, longest, device=device),
            kept=torch.ones(count, longest, device=device),
            lengths=torch.zeros(count, dtype=torch.long, device=device),
            done=torch.zeros(count, dtype=torch.bool, device=device),
            first_version=version,
        )

    def _completions(self, rows: _Rows, done: torch.Tensor) -> Iterator[Completion]:
        """Completions of the finished rows; `done` on the CPU."""
        which = done.nonzero()[:, 0]
        on_device = which.to(self._device)
        lengths = rows.lengths[on_device].cpu().numpy()
        longest = int(lengths.max())
        tokens, logprobs, kept = (x[on_device, :longest].cpu().numpy() for x in (rows.tokens, rows.logprobs, rows.kept))
        if not all(np.isfinite(logprobs[i, :n]).all() for i, n in enumerate(lengths)):
            raise RuntimeError(
                f"embedded engine: got logprobs that are not finite under policy_version {rows.first_version}, need "
                "finite weights; resume from an earlier checkpoint, with a lower learning rate"
            )
        for i, (row, n) in enumerate(zip(which.tolist(), lengths.tolist(), strict=True)):
            request = rows.requests[row]
            stopped = int(tokens[i, n - 1]) in request.stop_token_ids
            yield Completion(
                index=request.index,
                tokens=tokens[i, :n].copy(),
                logprobs=logprobs[i, :n].copy(),
                finish_reason="stop" if stopped else "length",
                kept_mass=float(kept[i, :n].mean()),
                policy_version=rows.first_version,
                version_spans=rows.spans(n),
            )


def _batches(requests: Sequence[GenerationRequest], max_batch: int) -> Iterator[list[GenerationRequest]]:
    """Requests that can run together: the same sampling settings, similar prompt lengths."""

    def settings(r: GenerationRequest) -> tuple[Any, ...]:
        return r.temperature, r.top_p, r.top_k, r.stop_token_ids

    ordered = sorted(requests, key=lambda r: (settings(r), len(r.prompt_tokens), r.index))
    for _, group in groupby(ordered, key=settings):
        same = list(group)
        for start in range(0, len(same), max_batch):
            yield same[start : start + max_batch]
