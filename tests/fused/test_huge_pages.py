"""Weights in huge pages: which ranges, that contents and memory stay what they are, and who asks for it."""

import subprocess
import sys

import pytest
import torch

import lowtide
from lowtide.fused import engine, huge_pages

MIB = 2**20


@pytest.fixture(autouse=True)
def anew():
    huge_pages.page_bytes.cache_clear()
    yield
    huge_pages.page_bytes.cache_clear()


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ([], []),
        ([(0, 100)], [(0, 100)]),
        ([(1, 100)], [(10, 100)]),
        ([(1, 99)], [(10, 90)]),
        ([(11, 19)], []),
        ([(50, 99), (1, 49)], [(10, 90)]),
        ([(0, 25), (15, 41), (18, 20)], [(0, 40)]),
        ([(0, 25), (30_025, 30_061)], [(0, 20), (30_030, 30_060)]),
    ],
)
def test_whole_pages(places, wanted):
    assert huge_pages.whole_pages(places, 10) == wanted


def test_small_tensors_side_by_side_share_pages():
    """With the header of an allocator and the rest of a page in between, as glibc has it."""
    places = [(k * 1_773_568 + 64, k * 1_773_568 + 64 + 1_769_472) for k in range(20)]
    ((first, last),) = huge_pages.whole_pages(places, 2 * MIB)
    assert first == 2 * MIB and last == 20 * 1_773_568 // (2 * MIB) * 2 * MIB


REAL = """
import torch
from lowtide.fused import huge_pages
from lowtide.weights.home import resident_bytes

def in_huge_pages():
    line = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
    return int(line.split()[1]) * 1024

weights = [torch.arange(k, k + 16 * 2**20, dtype=torch.int32).to(torch.float32) for k in range(4)]
rounded = [weight.clone() for weight in weights]
places = [weight.data_ptr() for weight in weights]
before = resident_bytes()
moved = huge_pages.use_huge_pages([*weights, torch.empty(4, device="meta"), torch.empty(0), weights[0][5:]])
print(moved, in_huge_pages(), resident_bytes() - before)
assert all(torch.equal(one, two) for one, two in zip(weights, rounded, strict=True))
assert places == [weight.data_ptr() for weight in weights]
"""


@pytest.mark.skipif(huge_pages.page_bytes() is None, reason="needs Linux with huge pages that are not switched off")
def test_memory_is_moved_and_stays_what_it_is():
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    moved, huge, grown = map(int, done.stdout.split())
    if moved == 0:
        pytest.skip("this system moves nothing on demand (Linux before 6.1), or has no free huge page")
    assert huge >= moved >= 2 * MIB
    assert abs(grown) < 16 * MIB


def test_it_can_be_switched_off(monkeypatch, tmp_path):
    def system(text):
        (tmp_path / "enabled").write_text(text)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
        huge_pages.page_bytes.cache_clear()
        return huge_pages.page_bytes()

    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("LOWTIDE_HUGE_PAGES", raising=False)
    assert huge_pages.page_bytes() is None
    assert system("always [madvise] never\n") == 2 * MIB
    assert system("always madvise [never]\n") is None
    monkeypatch.setenv("LOWTIDE_HUGE_PAGES", "0")
    assert system("always [madvise] never\n") is None
    assert huge_pages.use_huge_pages([torch.ones(2**20)]) == 0
    monkeypatch.delenv("LOWTIDE_HUGE_PAGES")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert system("always [madvise] never\n") is None


@pytest.mark.parametrize("error", ["EINVAL", "EAGAIN"])
def test_a_system_that_refuses_is_no_error(monkeypatch, error):
    import errno

    asked = []

    class Libc:
        def madvise(self, first, num_bytes, advice):
            asked.append((first.value, num_bytes.value, advice))
            return -1

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda *args, **options: Libc())
    monkeypatch.setattr(huge_pages.ctypes, "get_errno", lambda: getattr(errno, error))
    monkeypatch.setattr(huge_pages, "page_bytes", lambda: 4096)
    weight = torch.ones(2**20)
    assert huge_pages.use_huge_pages([weight]) == 0
    assert [advice for _, _, advice in asked] == ([25, 14] if error == "EINVAL" else [25])
    first, num_bytes, _ = asked[0]
    assert weight.data_ptr() <= first and first + num_bytes <= weight.data_ptr() + weight.nbytes


def test_the_first_step_moves_weights_and_state(monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "use_huge_pages", lambda tensors: seen.append({t.data_ptr() for t in tensors}))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    optimizer = lowtide.PerParameter(torch.optim.AdamW, [p for p in model.parameters() if p.requires_grad], lr=1e-3)
    lowtide.fuse(model, optimizer)
    for step in range(3):
        assert len(seen) == min(step, 1)
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    (found,) = seen
    assert found >= {param.data_ptr() for param in model.parameters()}
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert len(moments) == 3 and found >= {moment.data_ptr() for moment in moments}
