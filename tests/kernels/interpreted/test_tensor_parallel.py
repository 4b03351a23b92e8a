"""Kernels and references with the vocabulary split over 1, 2 and 4 ranks (gloo), against float64; one spawn."""

from __future__ import annotations

import pytest
import test_linear_policy_loss
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from softmax_cases import check, figures, truth

from asyppo_megatron.kernels import linear_head
from asyppo_megatron.kernels.linear_policy_loss import linear_policy_loss
from asyppo_megatron.kernels.logprob_entropy import logprob_entropy

ROWS, PADDED = 6, 4096
# (type, temperature, true vocabulary): a ragged last shard, and one with nothing but padding behind a ragged one.
CASES = [(torch.float32, 0.9, 4001), (torch.float32, 1.0, 3000), (torch.bfloat16, 1.0, 4001)]

TOKENS = 28  # over 4 ranks 7 each: chunks of 10 leave rows over
# Implementation, and whether the hidden states are split over the ranks (sequence parallelism).
LINEAR = {
    "kernel": (linear_policy_loss, False),
    "kernel-sp": (linear_policy_loss, True),
    "reference": (linear_head.linear_policy_loss, False),
    "reference-sp": (linear_head.linear_policy_loss, True),
}


def _inputs(dtype, vocabulary):
    torch.manual_seed(7)
    logits = (torch.randn(ROWS, PADDED) * 4 + 20).to(dtype)
    labels = torch.tensor([0, 1500, vocabulary - 1, 2047, 2048, 5])
    a, b = torch.randn(ROWS), 3 * torch.randn(ROWS)
    a[1], b[1] = 0.0, 0.0
    return logits, labels, a, b


def _rank(rank, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    alone = [dist.new_group([r]) for r in range(4)]
    for index, (dtype, temperature, vocabulary) in enumerate(CASES):
        logits, labels, a, b = _inputs(dtype, vocabulary)
        for size, group in ((1, alone[rank]), (2, pairs[rank // 2]), (4, dist.group.WORLD)):
            width, place = PADDED // size, rank % size
            start = place * width
            valid = max(0, min(width, vocabulary - start))
            shard = logits[:, start : start + width].clone()
            shard[:, valid:] = float("nan")
            shard.requires_grad_()
            logprobs, entropies = logprob_entropy(
                shard, labels, temperature=temperature, vocab_start=start, num_valid=valid, tp_group=group
            )
            torch.autograd.backward([logprobs, entropies], [a, b])
            results = [x.detach().float().numpy() for x in (logprobs, entropies, shard.grad)]
            queue.put((index, size, rank, results))
    for size, group in ((1, alone[rank]), (2, pairs[rank // 2]), (4, dist.group.WORLD)):
        for case, (operator, is_sharded) in LINEAR.items():
            queue.put((case, size, rank, _linear_shard(rank % size, size, group, operator, is_sharded)))
    dist.barrier()
    dist.destroy_process_group()


def _linear_shard(place, size, group, operator, is_sharded):
    """[loss, logprobs, entropies, gradient of (its) hidden states, of this rank's rows of the weight]."""
    torch.manual_seed(3)
    tensors, cu_seqlens = test_linear_policy_loss.make("cpu", tokens=TOKENS)
    hidden, weight, *rest, advantage_mask, entropy_mask = tensors
    if is_sharded:
        hidden = hidden.chunk(size)[place].clone()
    width = test_linear_policy_loss.PADDED // size
    shard = weight[place * width : (place + 1) * width].clone()
    found = operator(
        hidden.requires_grad_(), shard.requires_grad_(), *rest, cu_seqlens, **test_linear_policy_loss.OPTIONS,
        advantage_mask=advantage_mask, entropy_mask=entropy_mask, temperature=0.9, vocab_start=place * width,
        num_valid=max(0, min(width, test_linear_policy_loss.VOCABULARY - place * width)), tp_group=group,
        chunk=10, sequence_parallel=is_sharded,
    )  # fmt: skip
    (found.sum / found.count).backward()
    return [x.detach().numpy() for x in (found.sum, found.logprobs, found.entropies, hidden.grad, shard.grad)]


@pytest.fixture(scope="module")
def results(device, tmp_path_factory):
    """{(case, tp, rank): [logprobs, entropies, gradient of the shard]}."""
    if device.type != "cpu":
        pytest.skip("ranks share no GPU here: tensor parallelism is tested in the interpreter")
    context = mp.get_context("fork")
    queue = context.Queue()
    store = tmp_path_factory.mktemp("tp") / "store"
    processes = [context.Process(target=_rank, args=(rank, store, queue), daemon=True) for rank in range(4)]
    for process in processes:
        process.start()
    found = {}
    for _ in range((len(CASES) + len(LINEAR)) * 3 * 4):
        index, size, rank, values = queue.get(timeout=120)
        found[index, size, rank] = [torch.as_tensor(x) for x in values]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_shards_agree_with_float64_forward_and_backward(case, size, results):
    dtype, temperature, vocabulary = CASES[case]
    logits, labels, a, b = _inputs(dtype, vocabulary)
    expected = truth(logits[:, :vocabulary], labels, temperature, a, b)
    for first in range(0, 4, size):
        ranks = [results[case, size, rank] for rank in range(first, first + size)]
        assert all(torch.equal(x[0], ranks[0][0]) and torch.equal(x[1], ranks[0][1]) for x in ranks)
        gradient = torch.cat([x[2] for x in ranks], 1)
        assert (gradient[:, vocabulary:] == 0).all() and (gradient[1] == 0).all()
        found = (ranks[0][0], ranks[0][1], gradient[:, :vocabulary])
        name = f"tp{size} {str(dtype)[6:]} T={temperature} V={vocabulary}"
        check(name, figures(found, expected), logits, temperature, False)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", LINEAR)
def test_the_head_without_logits_agrees_with_float64_on_any_number_of_shards(case, size, results):
    torch.manual_seed(3)
    tensors, cu_seqlens = test_linear_policy_loss.make("cpu", tokens=TOKENS)
    want = test_linear_policy_loss.expected(tensors, cu_seqlens, **test_linear_policy_loss.OPTIONS)
    mask, relative = tensors[5], test_linear_policy_loss.relative
    for first in range(0, 4, size):
        ranks = [results[case, size, rank] for rank in range(first, first + size)]
        for total, logprobs, entropies, by_hidden, _ in ranks:
            assert torch.equal(total, ranks[0][0])
            torch.testing.assert_close(total.double(), want[0].sum.detach(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(logprobs.double(), want[3] * mask, atol=5e-6, rtol=0)
            torch.testing.assert_close(entropies.double(), want[4] * mask, atol=5e-6, rtol=0)
            if not LINEAR[case][1]:
                assert relative(by_hidden, want[1]) <= 2e-6
        if LINEAR[case][1]:
            assert relative(torch.cat([x[3] for x in ranks]), want[1]) <= 2e-6
        by_weight = relative(torch.cat([x[4] for x in ranks]), want[2])
        print(f"FIGURE linear {case} tp{size} by_weight={by_weight:.1e}")
        assert by_weight <= 2e-6
