"""A small server of a reward model with one score a token: `python -m asyppo_megatron.rewards.serve_model MODEL`.

For machines without a larger one, and for checkpoints that this program trained: a mini-critic is such a model
(a decoder with score.weight and score.bias). It speaks `/pooling` as vLLM does for token-wise reward models:

    POST /pooling {"input": [[token ids], ...]}  ->  {"data": [{"index": 0, "data": [[score], ...]}, ...]}
    GET /health                                  ->  200
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForTokenClassification

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 28
MAX_PADDED_TOKENS = 1 << 18  # of one forward pass


class RewardModel:
    """Scores of every token of a sequence.

    Args:
        directory: Hugging Face directory of a model for token classification with one label.
        device: where it computes.
        dtype: in what.
    """

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype):
        model = AutoModelForTokenClassification.from_pretrained(
            directory, dtype=dtype, num_labels=1, trust_remote_code=False, local_files_only=True
        )
        self._model, self._device = model.to(device).eval(), device
        self._vocabulary = int(model.config.vocab_size)
        self._longest = int(model.config.max_position_embeddings)
        self._lock = threading.Lock()

    @torch.inference_mode()
    def scores(self, sequences: list[list[int]]) -> list[list[float]]:
        """One number a token; the score of token t reads tokens 0..t.

        Raises:
            ValueError: a sequence that the model cannot read.
        """
        for sequence in sequences:
            ids_ok = all(isinstance(t, int) and 0 <= t < self._vocabulary for t in sequence)
            if not ids_ok or not 0 < len(sequence) <= self._longest:
                raise ValueError(
                    f"input: got {len(sequence)} ids, need 1..{self._longest}, each within 0..{self._vocabulary - 1}"
                )
        found: list[list[float]] = []
        longest = max(map(len, sequences), default=1)
        rows = max(1, MAX_PADDED_TOKENS // longest)
        with self._lock:
            for first in range(0, len(sequences), rows):
                found += self._forward(sequences[first : first + rows])
        return found

    def _forward(self, sequences: list[list[int]]) -> list[list[float]]:
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        # Causal attention: padding on the right reaches no token before it.
        scores = self._model(input_ids=ids.to(self._device), use_cache=False).logits[..., 0].float().cpu()
        return [row[: len(sequence)].tolist() for row, sequence in zip(scores, sequences, strict=True)]


def build_server(model: RewardModel, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is not serving yet; `port` 0 lets the kernel choose."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # a client that stops in the middle

        def do_GET(self) -> None:
            self._answer(200 if self.path == "/health" else 404, {})

        def do_POST(self) -> None:
            if self.path != "/pooling":
                self._answer(404, {"error": f"path: got {self.path}, need /pooling"})
                return
            try:
                self._answer(200, self._scores())
            except (ValueError, KeyError, TypeError) as e:
                self._answer(400, {"error": f"{type(e).__name__}: {e}"})

        def _scores(self) -> dict[str, Any]:
            size = int(self.headers.get("Content-Length", 0))
            if not 0 < size <= MAX_BODY_BYTES:
                raise ValueError(f"body: got {size} bytes, need 1..{MAX_BODY_BYTES}")
            sequences = json.loads(self.rfile.read(size))["input"]
            if not isinstance(sequences, list) or not all(isinstance(s, list) for s in sequences):
                raise ValueError("input: need a list of lists of token ids")
            scores = model.scores(sequences)
            return {"data": [{"index": i, "data": [[v] for v in row]} for i, row in enumerate(scores)]}

        def _answer(self, code: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    return ThreadingHTTPServer((host, port), Handler)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m asyppo_megatron.rewards.serve_model", description=__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face directory, for token classification with one label")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8300, help="0: the kernel chooses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
    model = RewardModel(args.model, torch.device(args.device), getattr(torch, args.dtype))
    with build_server(model, args.host, args.port) as server:
        log.info("serving %s at http://%s:%d", args.model, args.host, server.server_address[1])
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("interrupted")


if __name__ == "__main__":
    main()
