"""Cut a batch into mini-batches, and a mini-batch into packed micro-batches balanced over data parallelism.

Pure arithmetic on the CPU from `cu_seqlens` and a seed, so every rank computes the same plan.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left, insort

import torch

from asyppo_megatron.types import MicroBatch, lengths


def mini_batches(
    num_trajectories: int, mini_batch_size: int, *, seed: int, step: int, epoch: int
) -> list[torch.Tensor]:
    """Shuffle a batch's trajectories into the mini-batches of one epoch, one optimizer step each.

    As few mini-batches as `mini_batch_size` allows, their sizes equal up to one trajectory (a short
    last one would get a full optimizer step for a noisy gradient). A single mini-batch keeps the natural order.

    Args:
        num_trajectories: N.
        mini_batch_size: trajectories of a mini-batch, at most.
        seed: of the run.
        step: training step.
        epoch: of the update within the step.

    Returns:
        i64 tensors of trajectory indices.
    """
    if mini_batch_size < 1:
        raise ValueError(f"mini_batch_size: got {mini_batch_size}, need at least 1")
    if num_trajectories <= mini_batch_size:
        return [torch.arange(num_trajectories)]
    key = hashlib.blake2b(f"mini-batches {seed} {step} {epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key) >> 1)
    order = torch.randperm(num_trajectories, generator=generator)
    return list(torch.tensor_split(order, -(-num_trajectories // mini_batch_size)))


def plan_micro_batches(
    cu_seqlens: torch.Tensor,
    indices: torch.Tensor,
    *,
    dp_size: int,
    max_tokens: int,
    multiple: int = 1,
    sequence_multiple: int = 1,
    fixed_size: bool = False,
) -> list[list[MicroBatch]]:
    """Pack the trajectories of one mini-batch into micro-batches, the same number on every data-parallel rank.

    As few packs a rank as fit, then balanced by tokens over packs and over ranks. A pack holds at most
    `max_tokens`, padding included, unless it is a single longer trajectory. Padding is dummy sequences
    after the real ones. A rank without a trajectory for a pack gets one of dummies only.

    Args:
        cu_seqlens: i32 [N + 1], of the batch, on the CPU.
        indices: i64 [n], trajectories of the mini-batch.
        dp_size: data-parallel ranks.
        max_tokens: of a pack.
        multiple: every pack's length is padded to a multiple of this (tp under sequence parallelism).
        sequence_multiple: so is every sequence's (2 cp under context parallelism); divides `multiple`.
        fixed_size: pad the packs of all ranks to one common size (pipelines).

    Returns:
        The micro-batches of each data-parallel rank, those of most tokens first.
    """
    if dp_size < 1 or multiple < 1:
        raise ValueError(f"packing: got dp_size {dp_size} and multiple {multiple}, need at least 1 of both")
    if multiple % sequence_multiple:
        raise ValueError(f"packing: got multiple {multiple}, need a multiple of {sequence_multiple}, as of a sequence")
    capacity = max_tokens // multiple * multiple
    if capacity < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, need at least {multiple}, the multiple packs are padded to")
    indices = indices.cpu().long()
    padded = -(-lengths(cu_seqlens)[indices] // sequence_multiple) * sequence_multiple
    sizes = padded.tolist()
    ranks = [_fullest_first(packs, sizes) for packs in _pack(sizes, capacity, dp_size)]
    common = max(sum(sizes[i] for i in packs[0]) for packs in ranks) if fixed_size else 0
    return _build(ranks, indices, sizes, cu_seqlens, multiple, sequence_multiple, common)


def _pack(sizes: list[int], capacity: int, dp_size: int) -> list[list[list[int]]]:
    """Bins of items within `capacity`, equally many on each rank: as few as best-fit finds, then balanced.

    Items are dealt to ranks first, then packed: ranks come out within one short item of each other.
    Where a rank so dealt would need a bin more than packing all ranks together, the bins are dealt instead.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    tight = _best_fit(order, sizes, capacity)
    each = max(1, -(-len(tight) // dp_size))
    dealt = _longest_first(order, sizes, dp_size)
    packed = [_best_fit(items, sizes, capacity) for items in dealt]
    if max(len(packs) for packs in packed) > each:
        return _spread(_split_to(tight, sizes, each * dp_size), sizes, dp_size)
    return [_level(items, packs, sizes, capacity, each) for items, packs in zip(dealt, packed, strict=True)]


def _level(order: list[int], tight: list[list[int]], sizes: list[int], capacity: int, count: int) -> list[list[int]]:
    """One rank's items in `count` bins of near-equal load where that fits, else its tight bins, split."""
    level = _longest_first(order, sizes, count)
    fits = all(len(pack) < 2 or sum(sizes[i] for i in pack) <= capacity for pack in level)
    return level if fits else _split_to(tight, sizes, count)


def _best_fit(order: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item into the fullest bin that still has room; O(n log n)."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for item in order:
        at = bisect_left(room, (sizes[item], -1))
        if at == len(room):
            left, pack = capacity, len(packs)
            packs.append([])
        else:
            left, pack = room.pop(at)
        packs[pack].append(item)
        if left > sizes[item]:
            insort(room, (left - sizes[item], pack))
    return packs


def _longest_first(order: list[int], sizes: list[int], count: int) -> list[list[int]]:
    """The longest remaining item into the bin of fewest tokens: `count` bins of near-equal load."""
    packs: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, pack) for pack in range(count)]
    for item in order:
        load, pack = loads[0]
        packs[pack].append(item)
        heapq.heapreplace(loads, (load + sizes[item], pack))
    return packs


def _split_to(packs: list[list[int]], sizes: list[int], count: int) -> list[list[int]]:
    """Halve the fullest bins that can be halved until there are `count`; empty ones make up the rest."""
    fullest = [(-sum(sizes[i] for i in pack), number) for number, pack in enumerate(packs) if len(pack) > 1]
    heapq.heapify(fullest)
    packs = list(packs)
    while len(packs) < count and fullest:
        _, number = heapq.heappop(fullest)
        halves = _longest_first(packs[number], sizes, 2)
        packs[number] = halves[0]
        packs.append(halves[1])
        for half in (number, len(packs) - 1):
            if len(packs[half]) > 1:
                heapq.heappush(fullest, (-sum(sizes[i] for i in packs[half]), half))
    return packs + [[] for _ in range(count - len(packs))]


def _spread(packs: list[list[int]], sizes: list[int], dp_size: int) -> list[list[list[int]]]:
    """Deal the packs out to the ranks, equally many to each: the fullest to the rank of fewest tokens."""
    each = len(packs) // dp_size
    loads = [sum(sizes[i] for i in pack) for pack in packs]
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    open_ranks = [(0, rank) for rank in range(dp_size)]
    for number in sorted(range(len(packs)), key=lambda n: (-loads[n], n)):
        load, rank = heapq.heappop(open_ranks)
        ranks[rank].append(packs[number])
        if len(ranks[rank]) < each:
            heapq.heappush(open_ranks, (load + loads[number], rank))
    return ranks


def _fullest_first(packs: list[list[int]], sizes: list[int]) -> list[list[int]]:
    """Bins by falling load, so that the peak of memory comes first; items in their own order inside."""
    packs = [sorted(pack) for pack in packs]
    return sorted(packs, key=lambda pack: (-sum(sizes[i] for i in pack), pack))


def _build(
    ranks: list[list[list[int]]],
    indices: torch.Tensor,
    sizes: list[int],
    cu_seqlens: torch.Tensor,
    multiple: int,
    sequence_multiple: int,
    common: int,
) -> list[list[MicroBatch]]:
    """Turn bins of positions in `indices` into micro-batches, padded to `multiple` and at least to `common`."""
    items = torch.tensor([i for rank in ranks for pack in rank for i in pack], dtype=torch.long)
    trajectories = indices[items]
    token_index = _token_index(cu_seqlens, trajectories)
    real_sizes = lengths(cu_seqlens)[trajectories]
    first_tokens = [0, *real_sizes.cumsum(0).tolist()]
    longest_of_all = max(sizes, default=sequence_multiple)
    result: list[list[MicroBatch]] = []
    first_item = 0
    for rank in ranks:
        result.append([])
        for pack in rank:
            padded_sizes = [sizes[i] for i in pack]
            total = sum(padded_sizes)
            padded = -(-max(total, common, 1) // multiple) * multiple
            dummies = _dummies(padded - total, max(padded_sizes, default=longest_of_all))
            cu = torch.tensor([0, *padded_sizes, *dummies], dtype=torch.long).cumsum(0).to(torch.int32)
            of_pack = slice(first_item, first_item + len(pack))
            first_token, end_token = first_tokens[of_pack.start], first_tokens[of_pack.stop]
            result[-1].append(
                MicroBatch(
                    trajectories=trajectories[of_pack],
                    token_index=token_index[first_token:end_token],
                    cu_seqlens=cu,
                    num_padding=padded - (end_token - first_token),
                    max_seqlen=max(padded_sizes + dummies),
                    slots=_slots(cu, real_sizes[of_pack]) if sequence_multiple > 1 else None,
                )
            )
            first_item = of_pack.stop
    return result


def _slots(cu_seqlens: torch.Tensor, real_sizes: torch.Tensor) -> torch.Tensor:
    """Positions in a pack of the real tokens of its sequences, which are padded at their ends, i64."""
    total = int(real_sizes.sum())
    shift = cu_seqlens[: len(real_sizes)].long() - (real_sizes.cumsum(0) - real_sizes)
    return torch.repeat_interleave(shift, real_sizes, output_size=total).add_(torch.arange(total))


def _dummies(padding: int, longest: int) -> list[int]:
    """Lengths of the dummy sequences that fill up a pack, none longer than `longest`."""
    whole, rest = divmod(padding, max(longest, 1))
    return [longest] * whole + [rest] * (rest > 0)


def _token_index(cu_seqlens: torch.Tensor, trajectories: torch.Tensor) -> torch.Tensor:
    """Positions in the batch of the tokens of `trajectories`, one after the other, i64."""
    starts = cu_seqlens.long()[trajectories]
    sizes = lengths(cu_seqlens)[trajectories]
    packed_starts = sizes.cumsum(0) - sizes
    total = int(sizes.sum())
    shift = torch.repeat_interleave(starts - packed_starts, sizes, output_size=total)
    return shift.add_(torch.arange(total))
