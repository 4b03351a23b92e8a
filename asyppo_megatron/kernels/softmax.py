"""The softmax of a vocabulary shard in Triton: statistics of every row, their merging, the gradient of the logits.

`logprob_entropy` and `linear_policy_loss` are made of this. Importing this module needs Triton; docs/kernels.md
derives the update and the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)

# Below every logit; finite, so that the difference of two empty maxima is 0 and not NaN.
EMPTY = tl.constexpr(-1.0e30)
# exp2 of anything below this is 0 in fp32: differences are held there, so that 0 x -inf never arises.
UNDERFLOW = tl.constexpr(-200.0)

# Columns of a tile, and those of one thread: 16 bytes, which is one load and one rescaling exponential.
TILE = 4096
LOAD_BYTES = 16
# Fewer rows than this leave a GPU idle: each row is then cut into several programs.
FULL_GRID = 256
# Rows of one program that merges partial statistics.
FINISH_ROWS = 256
NUM_WARPS = 8


@triton.jit
def _below(x, peak, scale):
    """x - peak, held where exp2(scale (x - peak)) has long been 0; NaN stays NaN."""
    return tl.maximum(x - peak, UNDERFLOW / scale, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _accumulate(x, m, s, w, scale):
    """Take a tile x [threads, columns of a thread] into the running maximum and sums [threads]."""
    peak = tl.maximum(m, tl.max(x, 1))
    d = _below(x, peak[:, None], scale)
    e = tl.exp2(d * scale)
    shift = m - peak
    a = tl.exp2(shift * scale)
    w = a * (w + s * shift) + tl.sum(e * d, 1)
    s = a * s + tl.sum(e, 1)
    return peak, s, w


@triton.jit(do_not_specialize=["num_rows", "vocab_start", "tiles_per_part"])
def statistics_kernel(
    logits,
    labels,
    statistics,
    num_rows,
    num_valid,
    row_stride,
    vocab_start,
    tiles_per_part,
    scale,
    THREADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(m, s, w, t) of one part of one row; grid (rows, parts), statistics f32 [parts, 4, rows]."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    WIDTH: tl.constexpr = THREADS * COLUMNS
    # The columns of one thread are contiguous: its maximum needs no other thread.
    offsets = tl.arange(0, THREADS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    start = logits + row * row_stride
    first = part * tiles_per_part * WIDTH
    last = tl.minimum(first + tiles_per_part * WIDTH, num_valid)
    # Whole tiles are read without a mask: 16-byte loads whatever the vocabulary is a multiple of.
    whole = first + tl.maximum(last - first, 0) // WIDTH * WIDTH
    m = tl.full([THREADS], EMPTY, tl.float32)
    s = tl.zeros([THREADS], tl.float32)
    w = tl.zeros([THREADS], tl.float32)
    for column in range(first, whole, WIDTH):
        x = tl.load(start + column + offsets).to(tl.float32)
        m, s, w = _accumulate(x, m, s, w, scale)
    if whole < last:
        x = tl.load(start + whole + offsets, mask=whole + offsets < last, other=-float("inf")).to(tl.float32)
        m, s, w = _accumulate(x, m, s, w, scale)
    peak = tl.max(m, 0)
    shift = m - peak
    a = tl.exp2(shift * scale)
    label = tl.load(labels + row) - vocab_start
    owned = (part == 0) & (label >= 0) & (label < num_valid)
    picked = tl.load(start + tl.where(owned, label, 0), mask=owned, other=0.0).to(tl.float32)
    out = statistics + part.to(tl.int64) * 4 * num_rows + row
    tl.store(out, peak)
    tl.store(out + num_rows, tl.sum(a * s, 0))
    tl.store(out + 2 * num_rows, tl.sum(a * (w + s * shift), 0))
    tl.store(out + 3 * num_rows, picked)


@triton.jit(do_not_specialize=["num_rows", "parts"])
def finish_kernel(statistics, results, saved, num_rows, parts, scale, inverse_temperature, ROWS: tl.constexpr):
    """Merge `parts` partial statistics; results f32 [2, rows]: logprob, H; saved f32 [3, rows]: m, log2 s, w / s."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    m = tl.full([ROWS], EMPTY, tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    w = tl.zeros([ROWS], tl.float32)
    t = tl.zeros([ROWS], tl.float32)
    read = statistics + row
    for _ in range(parts):
        m_part = tl.load(read, mask=inside, other=0.0)
        s_part = tl.load(read + num_rows, mask=inside, other=1.0)
        w_part = tl.load(read + 2 * num_rows, mask=inside, other=0.0)
        t += tl.load(read + 3 * num_rows, mask=inside, other=0.0)
        peak = tl.maximum(m, m_part)
        a = tl.exp2((m - peak) * scale)
        b = tl.exp2((m_part - peak) * scale)
        w = a * (w + s * (m - peak)) + b * (w_part + s_part * (m_part - peak))
        s = a * s + b * s_part
        m = peak
        read += 4 * num_rows
    log2_s = tl.log2(s)
    mean = w / s
    tl.store(results + row, (t - m) * inverse_temperature - log2_s * LN2, mask=inside)
    tl.store(results + num_rows + row, log2_s * LN2 - mean * inverse_temperature, mask=inside)
    tl.store(saved + row, m, mask=inside)
    tl.store(saved + num_rows + row, log2_s, mask=inside)
    tl.store(saved + 2 * num_rows + row, mean, mask=inside)


@triton.jit
def _gradient(x, columns, label, m, log2_s, mean, from_logprob, from_entropy, scale):
    """from_logprob (1[label] - p) + from_entropy p (mean - d), the factors 1 / T already in the two gradients."""
    d = _below(x, m, scale)
    p = tl.exp2(d * scale - log2_s)
    gradient = p * (from_entropy * (mean - d) - from_logprob)
    return tl.where(columns == label, gradient + from_logprob, gradient)


@triton.jit(do_not_specialize=["num_rows", "vocab_start"])
def gradient_kernel(
    logits,
    labels,
    saved,
    grad_logprobs,
    grad_entropies,
    grad_logits,
    num_rows,
    num_valid,
    num_columns,
    row_stride,
    grad_stride,
    vocab_start,
    scale,
    inverse_temperature,
    TILE: tl.constexpr,
):
    """One tile of one row; grid (rows, tiles). `grad_logits` may be `logits`: each element is read, then written."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TILE
    columns = start + tl.arange(0, TILE)
    from_logprob = tl.load(grad_logprobs + row) * inverse_temperature
    from_entropy = tl.load(grad_entropies + row) * inverse_temperature * inverse_temperature
    write = grad_logits + row * grad_stride + columns
    # A select instead of a mask on the load would read rows that nobody needs, and whatever they hold.
    if (from_logprob == 0.0) & (from_entropy == 0.0):
        tl.store(write, tl.zeros([TILE], grad_logits.dtype.element_ty), mask=columns < num_columns)
    else:
        m = tl.load(saved + row)
        log2_s = tl.load(saved + num_rows + row)
        mean = tl.load(saved + 2 * num_rows + row)
        label = tl.load(labels + row) - vocab_start
        label = tl.where((label >= 0) & (label < num_valid), label, -1).to(tl.int32)
        read = logits + row * row_stride + columns
        if start + TILE <= num_valid:
            x = tl.load(read).to(tl.float32)
            gradient = _gradient(x, columns, label, m, log2_s, mean, from_logprob, from_entropy, scale)
            tl.store(write, gradient.to(grad_logits.dtype.element_ty))
        else:
            x = tl.load(read, mask=columns < num_valid, other=-float("inf")).to(tl.float32)
            gradient = _gradient(x, columns, label, m, log2_s, mean, from_logprob, from_entropy, scale)
            gradient = tl.where(columns < num_valid, gradient, 0.0)
            tl.store(write, gradient.to(grad_logits.dtype.element_ty), mask=columns < num_columns)


def forward_rows(
    x: torch.Tensor, labels: torch.Tensor, temperature: float, vocab_start: int, num_valid: int, tp_group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprob and entropy of every row, and what `backward_rows` needs; one all-gather over `tp_group`.

    Args:
        x: [T, Vp], f32, bf16 or f16, columns contiguous.
        labels: i64 [T], contiguous.

    Returns:
        results: f32 [2, T], logprob and entropy.
        saved: f32 [3, T], m, log2 s and w / s.
    """
    rows = x.size(0)
    results = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    saved = torch.empty(3, rows, dtype=torch.float32, device=x.device)
    if rows:  # every rank of the group has the same rows
        statistics = _gathered(_statistics(x, labels, temperature, vocab_start, num_valid), tp_group)
        finish_kernel[(triton.cdiv(rows, FINISH_ROWS),)](
            statistics, results, saved, rows, statistics.size(0), LOG2E / temperature, 1.0 / temperature,
            ROWS=FINISH_ROWS, num_warps=4,
        )  # fmt: skip
    return results, saved


def backward_rows(
    x: torch.Tensor,
    labels: torch.Tensor,
    saved: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropies: torch.Tensor,
    out: torch.Tensor,
    temperature: float,
    vocab_start: int,
    num_valid: int,
) -> None:
    """Write the gradient of the logits to `out`, which may be `x`; the incoming gradients are [T]."""
    rows, width = x.shape
    if rows and width:
        gradient_kernel[(rows, triton.cdiv(width, TILE))](
            x, labels, saved, grad_logprobs.float().contiguous(), grad_entropies.float().contiguous(), out,
            rows, num_valid, width, x.stride(0), out.stride(0), vocab_start, LOG2E / temperature,
            1.0 / temperature, TILE=TILE, num_warps=NUM_WARPS,
        )  # fmt: skip


def _statistics(
    x: torch.Tensor, labels: torch.Tensor, temperature: float, vocab_start: int, num_valid: int
) -> torch.Tensor:
    """(m, s, w, t) of this shard, f32 [parts, 4, T]; the parts depend on the shape alone, so ranks agree on them."""
    rows, width = x.shape
    tiles = max(1, triton.cdiv(width, TILE))
    tiles_per_part = triton.cdiv(tiles, min(tiles, triton.cdiv(FULL_GRID, rows)))
    parts = triton.cdiv(tiles, tiles_per_part)
    statistics = torch.empty(parts, 4, rows, dtype=torch.float32, device=x.device)
    columns = LOAD_BYTES // x.element_size()
    statistics_kernel[(rows, parts)](
        x, labels, statistics, rows, num_valid, x.stride(0), vocab_start, tiles_per_part, LOG2E / temperature,
        THREADS=TILE // columns, COLUMNS=columns, num_warps=NUM_WARPS,
    )  # fmt: skip
    return statistics


def _gathered(statistics: torch.Tensor, tp_group: Any) -> torch.Tensor:
    """The statistics of all shards: one all-gather over `tp_group`, called by every rank of it."""
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    if size == 1:
        return statistics
    gathered = statistics.new_empty(size * statistics.size(0), *statistics.shape[1:])
    dist.all_gather_into_tensor(gathered, statistics, group=tp_group)
    return gathered
