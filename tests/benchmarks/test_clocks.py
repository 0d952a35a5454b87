"""What a GPU's run tells of time: the device's without the host's, the host's without the device's, in all reports."""

import dataclasses
import importlib
import json
import statistics
import types
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
READ_S = 250e-6


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


class Gpu:
    """A host and a device with a clock each: work starts once it is launched and what is before it has ended."""

    def __init__(self):
        self.host = self.device = 0.0

    def launch(self, host_s, device_s):
        self.host += host_s
        self.device = max(self.device, self.host) + device_s

    def synchronize(self, _):
        self.host = max(self.host, self.device)

    def event(self, **_):
        event = types.SimpleNamespace()
        event.record = lambda: setattr(event, "at", max(self.host, self.device))
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event


@pytest.fixture
def gpu(load, monkeypatch):
    """A device clock that believes in such a GPU, and that GPU."""
    clocks, gpu = load("clocks"), Gpu()
    monkeypatch.setattr(clocks, "COLD_BYTES", 4)
    monkeypatch.setattr(clocks, "synchronize", gpu.synchronize)
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: gpu.host)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(clocks.DeviceClock, "read", lambda _: gpu.launch(5e-6, READ_S))
    gpu.clock = clocks.DeviceClock(torch.device("cpu"))
    return gpu


@pytest.mark.parametrize(("launches", "host_s", "device_s"), [(1, 8e-6, 3e-6), (60, 8e-6, 3e-6), (3, 8e-6, 5e-3)])
def test_the_times_of_device_and_host_are_apart(gpu, launches, host_s, device_s):
    def call():
        for _ in range(launches):
            gpu.launch(host_s, device_s)

    host = gpu.clock.host_seconds(lambda: call, limit=1.0)
    assert host == pytest.approx([launches * host_s] * len(host))
    assert len(host) >= 10
    assert gpu.clock.seconds(call, statistics.median(host)) == pytest.approx(launches * device_s)


def test_a_call_that_waits_for_the_device_shows_it_in_both_times(gpu):
    def call():
        gpu.launch(8e-6, 1e-3)
        gpu.synchronize(None)
        gpu.launch(8e-6, 1e-3)

    (first, *_) = gpu.clock.host_seconds(lambda: call, limit=1.0)
    assert first == pytest.approx(16e-6 + 1e-3)
    assert gpu.clock.seconds(call, first) == pytest.approx(2e-3 + 8e-6)


def test_long_calls_end_at_the_limit(gpu):
    assert len(gpu.clock.host_seconds(lambda: lambda: gpu.launch(2.0, 2.0), limit=1.0)) == 1


@pytest.fixture
def measured(load, monkeypatch):
    """A case measured by a clock of a device, and how often its implementation ran before it was timed."""
    cases, measure, clocks, bounds = map(load, ("cases", "measure", "clocks", "bounds"))
    runs = {"in all": 0}

    def double(x):
        runs["in all"] += 1
        return 2 * x

    class Clock(clocks.Clock):
        warm_ups = 2

        def host_seconds(self, prepare, limit):
            runs.setdefault("before", runs["in all"])
            prepare()()
            return [3e-6, 5e-6, 4e-6]

        def seconds(self, call, host_s=0.0):
            assert host_s == 4e-6
            return super().seconds(call)

    monkeypatch.setattr(clocks, "of", lambda _: Clock())
    case = cases.Case(
        "op", "N=8", lambda generator, dtype: {"x": torch.ones(8, dtype=dtype)}, ("x",), lambda x: 2 * x,
        (cases.Implementation(cases.OURS, lambda: double),), lambda inputs, step: bounds.Work(inputs["x"].nbytes),
    )  # fmt: skip
    groups = []
    rates = bounds.Rates(torch.device("cpu"), read=1e9, copy=1e9)
    task = measure.Task("family", case, torch.float32, cases.FORWARD, measure.QUICK)
    measure.measure(task, rates, groups.append, load("console").Console())
    return groups, rates, runs["before"]


def test_the_host_time_is_in_the_table_and_the_file_and_is_read_again(load, measured, tmp_path):
    report, (groups, rates, _) = load("report"), measured
    head, row = report.table(groups).splitlines()[1:3]
    assert head.split()[:3] == ["median", "quartiles", "host"]
    assert " 4 µs " in row
    assert "host: median" in report.table(groups)

    machine = dict.fromkeys(("commit", "cpu", "gpu", "threads", "torch"), "this")
    file = tmp_path / "results.json"
    report.write_json(file, report.as_dict(groups, [], machine, rates, complete=True))
    (entry,) = json.loads(file.read_text())["groups"]
    assert entry["rows"][0]["host_times_s"] == [3e-6, 5e-6, 4e-6]
    assert entry["rows"][0]["host_median_s"] == 4e-6
    assert entry["rows"][0]["share_of_bound"] == entry["bound_s"] / statistics.median(groups[0].rows[0].times_s)
    again, _, _ = report.read_json(file, machine, rates.device)
    assert [dataclasses.asdict(group) for group in again] == [dataclasses.asdict(group) for group in groups]


def test_an_implementation_is_warm_before_it_is_timed(measured):
    assert measured[2] == 3  # compiles, records a graph, replays it


def test_a_cpu_has_one_time(load):
    clocks, report, measure = map(load, ("clocks", "report", "measure"))
    assert clocks.of(torch.device("cpu")).host_seconds(pytest.fail, 1.0) == []
    row = measure.Row("rlhf_kernels", times_s=[1e-3])
    group = measure.Group("family", "op", "N=8", "float32", "forward", 1e-4, [row])
    assert "host" not in report.table([group])
    entry = report.as_dict([group], [], {}, load("bounds").Rates(torch.device("cpu")), complete=True)
    assert entry["groups"][0]["rows"][0]["host_median_s"] is None


def test_masks_are_float32_and_every_implementation_takes_inputs_that_are_there(load):
    families = load("run").FAMILIES.values()
    masks = 0
    for family in families:
        for case in family.cases("quick"):
            inputs = case.inputs(torch.Generator().manual_seed(0), torch.bfloat16)
            for implementation in case.implementations:
                assert set(implementation.takes or case.takes) <= inputs.keys()
                assert implementation.overwrites in (None, *inputs)
            if "mask" in inputs:
                assert inputs["mask"].dtype == torch.float32
                masks += 1
    assert masks > 5


def test_a_gpu_measures_the_sizes_of_training(load):
    cases = {name: family.cases("cuda") for name, family in load("run").FAMILIES.items()}
    in_place = {
        case.op for case in cases["log_prob"] for each in case.implementations if each.name == "rlhf_kernels in place"
    }
    assert in_place == {"selective_log_softmax", "selective_log_softmax_and_entropy"}
    sizes = {(case.op, case.size): case.steps for family in cases.values() for case in family}
    both = ("forward", "forward+backward")
    assert sizes["selective_log_softmax", "N=8192 V=128256"] == both
    assert sizes["linear_selective_log_softmax", "N=8192 D=4096 V=128256"] == both
    assert "forward+backward" in sizes["linear_ppo_policy_loss", "N=8192 D=4096 V=128256"]
    for size in ("B=512 T=4096", "B=8 T=32768"):
        assert ("masked_gae", size) in sizes
    for rows in (32, 512):
        assert ("sample_tokens", f"N={rows} V=151936") in sizes
    for name, needed in (("log_prob", torch.bfloat16), ("linear_log_prob", torch.bfloat16), ("gae", torch.float32)):
        assert load(name).DTYPES["cuda"] == (needed,)
