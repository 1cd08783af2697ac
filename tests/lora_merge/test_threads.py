"""Worker threads compute on one core each, and nobody else notices: not the caller, not a thread that starts meanwhile."""

import threading
import time

import pytest
import torch

from lcm_kit.lora_merge import Lora, merge, save
from lcm_kit.lora_merge.algebra.threads import in_order, on_one_core
from lcm_kit.tests.lora_merge.make import factors, kohya

MODULES = [f"lora_unet_down_blocks_{block}_attentions_0_proj_in" for block in range(3)]


@pytest.fixture(autouse=True)
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def lora(seed):
    parts = [kohya(module, *factors(16, 4, 12, seed=seed + n)) for n, module in enumerate(MODULES)]
    return Lora.from_state_dict({key: value for part in parts for key, value in part.items()})


def number_in_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_workers_compute_on_one_core_and_nobody_else_does(workers):
    seen = []
    list(in_order(abs, range(3), workers))
    for number in in_order(lambda item: torch.get_num_threads(), range(20), workers):
        seen.append((number, torch.get_num_threads(), number_in_a_new_thread()))
    assert seen == [(1, 3, 3)] * 20
    assert on_one_core(torch.get_num_threads) == 1
    assert (torch.get_num_threads(), number_in_a_new_thread()) == (3, 3)


@pytest.mark.parametrize(("workers", "at_once"), [(0, 1), (1, 1), (2, 2), (5, 5), (None, 3)])
def test_as_many_work_at_a_time_as_were_asked_for(workers, at_once):
    """None is torch's number, three here. Each waits for all the others: fewer would wait for ever, and more are seen."""
    barrier, running, most = threading.Barrier(at_once), set(), []

    def work(item):
        running.add(item)
        barrier.wait(timeout=30)
        time.sleep(0.002)
        most.append(len(running))
        running.discard(item)

    list(in_order(work, range(4 * at_once), workers))
    assert max(most) <= at_once


def test_threads_that_start_while_others_merge_begin_as_ever(tmp_path):
    """Merges that begin and end at different times, as two prompts would."""
    a, b, seen, trouble = lora(1), lora(2), [], []

    def merges(number):
        try:
            for turn in range(4):
                merged = merge([(a, 0.8), (b, 1.0)], rank=2, progress=lambda done, total: time.sleep(0.002 * number))
                save(merged, tmp_path / f"{number}_{turn}.safetensors")
                seen.append(torch.get_num_threads())
        except Exception as error:
            trouble.append(error)

    merges(0)
    threads = [threading.Thread(target=merges, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(number_in_a_new_thread())
    assert trouble == []
    assert set(seen) == {3}
    assert (torch.get_num_threads(), number_in_a_new_thread()) == (3, 3)


@pytest.mark.parametrize("choices", [{}, {"rank": 3}, {"keep": 0.9}, {"method": "dare_ties", "density": 0.5}])
def test_any_number_of_torchs_threads_gives_the_same_bits(choices):
    states = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        states.append(merge([(lora(1), 0.8), (lora(2), 1.0)], **choices).to_state_dict())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(tensor, states[0][key]) for key, tensor in state.items())


def test_results_come_in_order_and_few_wait():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.001 * (item % 3))
        return item * item

    results = in_order(work, range(30), 2)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(begun) <= 6
    assert [0, *results] == [item * item for item in range(30)]


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_stops_the_rest_and_leaves_the_workers_fit(workers):
    begun = []

    def work(item):
        begun.append(item)
        if item == 2:
            raise ValueError("no such module")
        return item

    with pytest.raises(ValueError, match="no such module"):
        list(in_order(work, range(100), workers))
    count = len(begun)
    assert count <= 3 + 2 * workers
    assert list(in_order(str, range(5), workers)) == list("01234")
    assert len(begun) == count


def test_work_within_work_does_not_wait_for_itself():
    assert list(in_order(lambda n: sum(in_order(abs, range(n), 2)), range(6), 2)) == [0, 0, 1, 3, 6, 10]
    assert on_one_core(lambda: on_one_core(lambda: 5)) == 5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_is_done_on_one_core_however_many_the_process_has(threads):
    torch.set_num_threads(threads)
    assert on_one_core(torch.get_num_threads) == 1
    assert list(in_order(lambda _: torch.get_num_threads(), range(3), 1)) == [1, 1, 1]


def test_several_workers_leave_the_calling_thread_alone():
    torch.set_num_threads(1)
    assert threading.get_ident() not in set(in_order(lambda _: threading.get_ident(), range(8), 2))
