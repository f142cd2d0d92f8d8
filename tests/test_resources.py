"""What a run costs and a machine has: counts are exact, estimates are checked, refusals name what fits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ancestral.apps import doctor
from ancestral.data import load
from ancestral.data.machine import cgroup_room
from ancestral.errors import OptionError
from ancestral.training import loop, recipes, resources
from ancestral.training.resources import Cost, refuse_if_too_large

MEASURE = """
import json, re, sys
from pathlib import Path

import numpy as np
from ancestral.data.dataset import Examples, divide
from ancestral.training import loop, recipes, resources

preset, side, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
x = np.random.default_rng(0).integers(0, 256, (300, 3, side, side), dtype=np.uint8)
data = divide(Examples(x, 256), name="noise", source="noise")
setup = recipes.change(recipes.choose(data.facts, "images", preset), [f"training.batch={batch}"])
model = recipes.build(setup, data.facts)
estimate = resources.cost(model, setup, data).memory(batch)
for _ in loop.steps(loop.State(model, setup.training), data, 3, seed=0):
    pass
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps([estimate, int(peak[1]) * 1024]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize(("preset", "side", "batch"), [("small", 32, 128), ("tiny", 64, 64), ("dit-tiny", 32, 256)])
def test_the_memory_estimate_is_near_the_peak_of_a_real_training(preset, side, batch):
    """Of a fresh process: from a tenth below it to a third above."""
    command = [sys.executable, "-c", MEASURE, preset, str(side), str(batch)]
    estimate, peak = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 * peak < estimate < 1.35 * peak


def test_what_is_counted_is_what_is_there():
    data = load("digits")
    setup = recipes.choose(data.facts)
    model = recipes.build(setup, data.facts)
    cost = resources.cost(model, setup, data)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.data_bytes == len(data.train) * 64 + len(data.held_out) * 64
    state = loop.State(model, setup.training)
    for _ in loop.steps(state, data, 1, seed=0):
        pass
    kept = sum(tensor.numel() for name, tensor in state.tensors().items() if not name.endswith("/step"))
    assert kept == cost.parameters * (1 + 2 + cost.averages)


def test_activations_of_a_layer_are_counted_once_and_exactly():
    """Of relu(x W) with a weight to learn: the input of the product and the output of the relu."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(6, 6))

        def forward(self, x, level):
            return torch.relu(x @ self.weight)

    data = load("gaussian")
    setup = recipes.choose(data.facts)
    with_two, with_one = (recipes.build(setup, data.facts) for _ in range(2))
    shape = data.facts.shape[0]
    for model, layers in ((with_two, 2), (with_one, 1)):
        net = [Net() for _ in range(layers)]
        for layer in net:
            layer.weight = torch.nn.Parameter(torch.zeros(shape, shape))
        model.network.net = Chain(net)
    more, less = (resources.cost(model, setup, data).activation_bytes for model in (with_two, with_one))
    assert more - less == 4 * shape  # the relu of one layer is the input of the next


class Chain(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x, level):
        for layer in self.layers:
            x = layer(x, level)
        return x


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does():
    cost = Cost(parameters=10**6, flops=0, activation_bytes=2**20, data_bytes=10**6, averages=2)
    available = cost.memory(0) + 100 * 2**20
    fits = cost.largest_batch(available)
    assert cost.memory(fits) <= available < cost.memory(fits + 1)
    refuse_if_too_large(cost, fits, available)
    with pytest.raises(OptionError, match=rf"training\.batch={fits}$"):
        refuse_if_too_large(cost, fits + 1, available)
    with pytest.raises(OptionError, match="not even one fits: try a smaller preset"):
        refuse_if_too_large(cost, 64, cost.memory(0) // 2)


def test_limits_of_control_groups_are_found(tmp_path):
    """Version 2: the tightest of a group and its parents. Version 1: under memory/. "max" is no limit."""
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    inner = root / "user" / "job"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("500\n")
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("700\n")
    membership.write_text("0::/user/job\n")
    assert cgroup_room(root, membership) == [300]
    (inner / "memory.max").write_text("600\n")
    assert sorted(cgroup_room(root, membership)) == [100, 300]
    old = root / "memory" / "docker"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("5000\n")
    (old / "memory.usage_in_bytes").write_text("5500\n")
    membership.write_text("4:cpu,cpuacct:/docker\n9:memory:/docker\n")
    assert cgroup_room(root, membership) == [0]
    assert cgroup_room(root, tmp_path / "nowhere") == []


def test_the_doctor_says_what_to_mend():
    found = doctor.doctor()
    assert found["usable_cores"] >= 1
    assert found["available_memory_gib"] <= found["memory_gib"]
    assert found["convolution_gflop_per_second"]["float32"] > 0
    well = {
        **found,
        "threads": 4,
        "usable_cores": 4,
        "cores": 4,
        "bfloat16": True,
        "free_disk_gib": 9,
        "available_memory_gib": 9,
    }
    assert doctor.warnings(well) == []
    assert doctor.warnings({**well, "usable_cores": 8}) == []  # two threads a core
    for change, said in [
        ({"threads": 8}, "wait for each other: set OMP_NUM_THREADS=4"),
        ({"threads": 1}, "idle: set OMP_NUM_THREADS=4"),
        ({"bfloat16": False}, "no bfloat16 in hardware"),
        ({"free_disk_gib": 0.3}, "another place with --to"),
        ({"available_memory_gib": 1.0}, "--preset tiny"),
    ]:
        (warning,) = doctor.warnings({**well, **change})
        assert said in warning


def test_a_run_is_no_larger_on_the_disk_than_was_said(tmp_path):
    import ancestral

    data = load("ring-8")
    changes = ["mlp.width=128", "training.checkpoint_every=3", "training.pictures=0"]
    run = ancestral.train("ring-8", to=tmp_path / "run", steps=30, changes=changes)
    size = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    said = resources.cost(run.model, run.setup, data).disk(run.setup)
    assert 0.4 * said < size + 2**20 < said + 2**20
