"""Times decode and prefill over paged caches: nsa_compress_infer and nsa_compress_append against what people would use
instead, and against the limit, an op with the same signature that does nothing.

Decode: a step adds a row to each sequence, and some of these rows fill a window. Calls differ in lengths, tables and
slots, which are made before the clock starts, as an engine makes them once for all layers. They rotate over several
places of memory, so many that the rows of their windows take at least 4 MiB: what a call reads is not in a core's
caches from the call before. In "warm" cases it is, since all calls are alike.

Prefill: the rows of one sequence arrive in chunks, alone or beside 63 sequences that decode; all calls together are
timed, and so is one forward of nsa_compress over the whole packed sequence.

Results are compared with sums in fp64 before the clock starts. Then implementations take turns, round by round, so that
other work on the machine slows all of them alike. All of it runs under torch.inference_mode(), as engines do. The clock
is that of the host, up to the end of the last kernel: what the host does is most of a decode step.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from grid import DTYPES, K
from measure import header, quantiles, wall_seconds
from report_decode import write_report
from tqdm import tqdm

import nsa
from nsa import reference
from nsa.contract import GRANULE
from nsa.files import write_aside

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tolerance import assert_close

RESULTS = Path(__file__).parent / "results"
PAGE, N, D = 128, 8, 128
PLACES = 64  # windows that the places of a rotation have together, at least; one of 32 rows in bf16 has 64 KiB
DECODES = 63  # sequences beside one that is prefilled
SENTINEL = 7  # in the cache before a call, to see that nothing else is written
KEYS = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}


@dataclass(frozen=True)
class Step:
    """A decode step of `batch` sequences of about `length` rows, in which `due` of them fill a window."""

    batch: int
    length: int
    due: int
    block: int = 32
    stride: int = 16
    dtype_name: str = "bf16"
    memory: str = "rotating"  # or "warm"


@dataclass(frozen=True)
class Prefill:
    """A sequence of `rows` rows that arrive `chunk` at a time, beside `decodes` sequences that get a row each time."""

    rows: int
    chunk: int
    decodes: int
    block: int = 32
    stride: int = 16
    dtype_name: str = "bf16"


@dataclass(frozen=True)
class Place:
    """What calls are given besides the pages: index tensors on the device, and the lengths on the host."""

    table: torch.Tensor  # (batch, pages of a sequence)
    before: torch.Tensor  # (batch,)
    after: torch.Tensor  # (batch,)
    lengths: list  # `after`
    slots: torch.Tensor  # (batch,): rows of a cache (slots, N, D), -1 where nothing is due
    cache_table: torch.Tensor  # (batch, pages of a sequence in a cache (pages, PAGE, N, D))


def main():
    args = arguments()
    device = torch.device(args.device)
    kept = os.environ.get("MALLOC_MMAP_MAX_") == "0"
    memory = {"freed_memory": "kept by the process" if kept else "given back to the operating system where large"}
    results = {"header": header(device) | memory, "decode": [], "prefill": []}
    stem = "-".join(["decode", *[args.device] * (args.device != "cpu"), *["quick"] * args.quick])
    path = (args.out or RESULTS / stem).with_suffix(".json")
    steps, prefills = cases(args.quick, args.device)
    jobs = [("decode", case, measure_step) for case in steps]
    jobs += [("prefill", case, measure_prefill) for case in prefills]
    times = [defaultdict(list) for _ in jobs]
    passes, rounds = (1, 5) if args.quick else (3, 60)
    # in several passes, so that a minute in which other work slows the machine is not that of one case alone
    with tqdm(total=passes * len(jobs), unit="case", dynamic_ncols=True) as bar, torch.inference_mode():
        for (_, case, measure), of_case in passes * list(zip(jobs, times)):
            bar.set_description(str(case))
            for name, found in measure(case, device, rounds).items():
                of_case[name] += found
            bar.update()
    for (part, case, _), of_case in zip(jobs, times):
        found = {name: quantiles(of_name) for name, of_name in of_case.items()}
        results[part].append({**asdict(case), "results": found})
    write_aside(path, json.dumps(results, indent=1))
    print(write_report(path))


def cases(quick, device_name):
    """The `Step`s and the `Prefill`s."""
    if quick:
        steps = [Step(batch, K, due) for batch in (1, 16) for due in (0, batch)]
        return steps, [Prefill(4 * K, 512, 0), Prefill(4 * K, 2048, DECODES)]
    steps = [
        Step(batch, length, due, memory=memory)
        for length, batch, memory in product((K, 16 * K, 128 * K), (1, 4, 16, 64, 256), ("rotating", "warm"))
        for due in dues(batch)
    ]
    steps += [Step(batch, 16 * K, due, block=128) for batch in (1, 4, 16, 64, 256) for due in dues(batch)]
    if device_name != "npu":
        steps += [Step(64, 16 * K, due, dtype_name="fp32") for due in dues(64)]
    prefills = [Prefill(32 * K, chunk, decodes) for decodes in (0, DECODES) for chunk in (512, 2048, 8192)]
    return steps, [*prefills, Prefill(32 * K, 32 * K, 0)]


def dues(batch):
    """No sequence, 1 of 16 as on average with stride 16, all."""
    return dict.fromkeys((0, -(-batch // 16), batch))


def measure_step(case, device, rounds):
    """By name of the implementation: seconds of each round."""
    places, n_pages = step_places(case, device)
    pages, weight = inputs(case, n_pages, device)
    functions = step_functions(case, pages, weight, len(places))
    for name in ("infer", "append", "gather"):
        check_step(functions[name], case, pages, weight, places[0])
    times = defaultdict(list)
    for i in range(len(functions) * (rounds + 1)):  # a call meets the place that was left alone longest
        name = list(functions)[i % len(functions)]
        call, place = functions[name], places[i % len(places)]
        times[name].append(wall_seconds(lambda call=call, place=place: call(place), device))
    return {name: of_name[1:] for name, of_name in times.items()}  # the first is the warm-up


def step_places(case, device):
    """The `Place`s and how many pages they need. Only pages that due windows read are a sequence's own. All other
    entries of the tables name page 0: nobody reads it, so that tables of any width need no more memory."""
    generator = torch.Generator().manual_seed(0)
    n_places = max(4, PLACES // max(case.due, 1)) if case.memory == "rotating" else 1
    batch, block, stride = case.batch, case.block, case.stride
    sequences, places = torch.arange(batch), []
    for i_place in range(n_places):
        due = torch.randperm(batch, generator=generator)[: case.due]
        # the last length that fills a window, and up to three strides less
        after = (case.length - block) // stride * stride + block
        after = after - stride * torch.randint(0, 4, (batch,), generator=generator)
        is_due = torch.zeros(batch, dtype=torch.bool).index_fill(0, due, True)
        after -= torch.randint(1, stride, (batch,), generator=generator).where(~is_due, 0)
        table = torch.zeros((batch, case.length // PAGE), dtype=torch.int32)
        own = 1 + 2 * (i_place * case.due + torch.arange(case.due, dtype=torch.int32))
        table[due, (after[due] - block) // PAGE] = own
        table[due, (after[due] - 1) // PAGE] = own + 1
        slots = (i_place * batch + sequences).where(is_due, -1)
        cache_table = torch.zeros((batch, case.length // stride // PAGE + 1), dtype=torch.int32)
        cache_table[due, (after[due] - block) // stride // PAGE] = i_place * case.due + torch.arange(
            case.due, dtype=torch.int32
        )
        tensors = (table, (after - 1).int(), after.int())
        place = Place(*(t.to(device) for t in tensors), after.tolist(), slots.to(device), cache_table.to(device))
        places.append(place)
    return places, 1 + 2 * n_places * case.due


def inputs(case, n_pages, device):
    """Pages and weight. The numbers of the pages repeat, which no clock notices, since making them takes long."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn((min(n_pages, 64), PAGE, N, D), generator=generator)
    pages = some.to(device, DTYPES[case.dtype_name]).repeat(-(-n_pages // 64), 1, 1, 1)[:n_pages]
    return pages, torch.randn((case.block, N), generator=generator).to(pages)


def step_functions(case, pages, weight, n_places):
    """By name: functions of a `Place` that return what they wrote, (batch, N, D) or for "append" pages of a cache."""
    slots = pages.new_full((n_places * case.batch, N, D), SENTINEL)
    cache_pages = pages.new_full((max(n_places * case.due, 1), PAGE, N, D), SENTINEL)
    sizes = case.block, case.stride, PAGE

    def infer(op):
        return lambda place: op(
            pages, weight, place.slots, *sizes, block_table=place.table, actual_seq_len=place.lengths, cache=slots
        )

    def append(op):
        return lambda place: op(
            pages, weight, place.cache_table, *sizes, block_table=place.table, seq_len_before=place.before,
            seq_len_after=place.after, cache=cache_pages, max_new_rows=1,
        )  # fmt: skip

    return {
        "infer": infer(nsa.nsa_compress_infer),
        "append": append(nsa.nsa_compress_append),
        "gather": lambda place: gather(pages, weight, place, case.block, case.stride, slots),
        "empty infer": infer(empty(torch.ops.nsa.nsa_compress_infer.default, pages.device)),
        "empty append": append(empty(torch.ops.nsa.nsa_compress_append.default, pages.device)),
    }


def gather(pages, weight, place, block, stride, cache):
    """What people would use instead: due windows are copied 16 rows at a time, which lie in one page, and multiplied
    and summed in fp32. The pages are contiguous."""
    after = place.after
    due = ((after >= block) & ((after - block) % stride == 0)).nonzero().squeeze(1)
    if not len(due):
        return cache
    row = (after[due] - block)[:, None] + torch.arange(0, block, GRANULE, device=after.device)  # [due, block / 16]
    group = (place.table[due[:, None], row // PAGE] * PAGE + row % PAGE) // GRANULE
    x = pages.view(-1, GRANULE, N, D).index_select(0, group.flatten()).view(-1, block, N, D)
    y = torch.einsum("jn,bjnd->bnd", weight.float(), x.float())
    return cache.index_copy_(0, place.slots[due], y.to(cache.dtype))


_libraries = []  # an op lives as long as its library


def empty(op, device):
    """An op with the same signature that does nothing but return the cache."""
    library = torch.library.Library("nsa_decode", "FRAGMENT")
    name = f"{op._schema.name.partition('::')[2]}_{len(_libraries)}"
    library.define(f"{name}{str(op._schema).removeprefix(op._schema.name)}")
    library.impl(name, lambda *_, cache, **__: cache, KEYS[device.type])
    _libraries.append(library)
    return getattr(torch.ops.nsa_decode, name).default


def check_step(function, case, pages, weight, place):
    """Raise unless the function writes the due windows of a place, within the tolerance of the tests, and nothing else.
    Afterwards its cache is as it was."""
    cache = function(place)
    after, slots = place.after.cpu(), place.slots.cpu()
    due = (slots >= 0).nonzero().squeeze(1)
    if cache.ndim == 4:  # `append`
        window = (after[due].long() - case.block) // case.stride
        at = place.cache_table.cpu()[due, window // PAGE].long() * PAGE + window % PAGE
    else:
        at = slots[due]
    rows = after[due].long()[:, None] - case.block + torch.arange(case.block)
    x = pages[place.table.cpu()[due[:, None], rows // PAGE].to(pages.device), (rows % PAGE).to(pages.device)].cpu()
    exact, magnitude = (
        torch.einsum("jn,bjnd->bnd", of(weight.cpu().double()), of(x.double())) for of in (torch.clone, torch.abs)
    )
    written = cache.view(-1, N, D)
    assert_close(written[at.to(cache.device)].cpu(), exact, magnitude, case.block)
    written[at.to(cache.device)] = SENTINEL
    if not (cache == SENTINEL).all():
        raise AssertionError(f"{case}: rows of the cache were written that no due window has")


def measure_prefill(case, device, rounds):
    """Seconds of each round, of all calls together. "forward" is nsa_compress over the packed rows, which are a copy
    made before: an engine with pages would have to make it for each forward."""
    places, n_pages = prefill_places(case, device)
    pages, weight = inputs(case, n_pages, device)
    cache = pages.new_full((int(max(place.cache_table.max() for place in places)) + 1, PAGE, N, D), SENTINEL)
    most = max(case.chunk, 1)
    packed = pages[places[0].table[0].long()].flatten(0, 1)

    def append():
        for place in places:
            nsa.nsa_compress_append(
                pages, weight, place.cache_table, case.block, case.stride, PAGE, block_table=place.table,
                seq_len_before=place.before, seq_len_after=place.after, cache=cache, max_new_rows=most,
            )  # fmt: skip
        return cache

    def forward():
        return torch.ops.nsa.nsa_compress(packed, weight, case.block, case.stride, actual_seq_len=[case.rows])

    exact, magnitude = (
        reference.nsa_compress(
            of(packed.cpu().double()), of(weight.cpu().double()), case.block, case.stride, actual_seq_len=[case.rows]
        )
        for of in (torch.clone, torch.abs)
    )
    written = append()[places[0].cache_table[0].long()].flatten(0, 1)[: len(exact)]
    for result in (written, forward()):
        assert_close(result.cpu(), exact, magnitude, case.block)
    times = defaultdict(list)
    for _ in range(max(3, rounds // 4)):
        for function in (append, forward):
            times[function.__name__].append(wall_seconds(function, device))
    return times


def prefill_places(case, device):
    """A `Place` for each chunk and how many pages they need. Sequence 0 is prefilled; its pages are in no order. The
    others have half as many rows and more, and as many pages of their own as their windows need, in turns."""
    generator = torch.Generator().manual_seed(0)
    width, cache_width = case.rows // PAGE, -(-case.rows // case.stride // PAGE)
    own, columns = 2, torch.arange(width)
    others = torch.arange(case.decodes)[:, None]
    table = torch.cat([torch.randperm(width, generator=generator)[None], width + others * own + columns % own])
    cache_table = torch.cat([torch.arange(cache_width)[None], cache_width + others.expand(-1, cache_width)])
    begins = case.rows // 2 + others[:, 0] % case.stride  # so that in each step 1 of `stride` fills a window
    places = []
    for i_call, begin in enumerate(range(0, case.rows, case.chunk)):
        end = min(begin + case.chunk, case.rows)
        before, after = (
            torch.cat([torch.tensor([of_first]), begins + i_call + grown]) for of_first, grown in ((begin, 0), (end, 1))
        )
        tensors = [t.int().to(device) for t in (table, before, after)]
        places.append(Place(*tensors, after.tolist(), None, cache_table.int().to(device)))
    return places, width + case.decodes * own


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(KEYS), default="cpu", help="where to run (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds: some seconds")
    parser.add_argument("--out", type=Path, help="where results go, without the ending (benchmarks/results/decode)")
    args = parser.parse_args()
    if args.device != "cpu" and not (hasattr(torch, args.device) and getattr(torch, args.device).is_available()):
        parser.error(f"expected a machine with {args.device}, got one without")
    return args


if __name__ == "__main__":
    main()
