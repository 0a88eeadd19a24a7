"""Moving averages against the recursion, brute-force sums, the unsharded run, and Diffusers' own."""

import copy
import importlib.util
import math

import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY, SMALL, randomize
from diffusers import EDMDPMSolverMultistepScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from diffusers_hdit import HDiTModel, HDiTPipeline
from diffusers_hdit.training import ema
from diffusers_hdit.training.ema import EMAWeights


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(5, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        self.register_buffer("directions", torch.linspace(0, 1, 4, dtype=dtype) / 3)
        self.register_buffer("cache", torch.ones(2), persistent=False)


def walk(net, steps, seed=0):
    """A random walk of the parameters with a drift; yields after each step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype) + 0.01
        yield


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def history_and_averages(steps, **arguments):
    """The parameters after each step `(steps, P)`, in float64, and the stepped averages."""
    net = Net()
    averages, history = EMAWeights(net, **arguments), []
    for _ in walk(net, steps):
        averages.step()
        history.append(flat(net.parameters()))
    return net, averages, torch.stack(history)


def power_weights(step, gamma):
    """What each of the first `step` steps counts, by the integral of the profile over that step."""
    edges = (torch.arange(step + 1, dtype=torch.float64) / step) ** (gamma + 1)
    return edges.diff()


def test_warm_up_averages_against_the_recursion_and_diffusers():
    net = Net()
    averages = EMAWeights(net, decays=(0.9, 0.5))
    assert averages.names == ["0.9", "0.5"]
    theirs = EMAModel(net.parameters(), decay=0.9, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    expected = {0.9: flat(net.parameters()), 0.5: flat(net.parameters())}
    for n, _ in enumerate(walk(net, 60)):
        averages.step()
        theirs.step(net.parameters())
        for ceiling, value in expected.items():
            decay = min(ceiling, 1 - (1 + n) ** -0.75)
            expected[ceiling] = decay * value + (1 - decay) * flat(net.parameters())
    for name in averages.names:
        with averages.swapped(name):
            torch.testing.assert_close(flat(net.parameters()), expected[float(name)], rtol=1e-6, atol=1e-6)
    with averages.swapped():
        torch.testing.assert_close(flat(net.parameters()), flat(theirs.shadow_params), rtol=1e-6, atol=1e-6)
    assert averages.count == 60


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_power_function_average_against_the_sum_over_the_history(length):
    net, averages, history = history_and_averages(150, decays=(), sigma_rels=(length,))
    weights = power_weights(150, ema.gamma_of_sigma_rel(length))
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    with averages.swapped(f"power-{length}"):
        torch.testing.assert_close(flat(net.parameters()), weights @ history, rtol=1e-5, atol=1e-5)
    # The length is what its name says: the standard deviation of the profile, as a share of the run.
    times = torch.arange(150, dtype=torch.float64) + 0.5
    deviation = ((weights @ times**2) - (weights @ times) ** 2).sqrt().item() / 150
    assert deviation == pytest.approx(length, rel=2e-3)


def test_lengths_and_exponents():
    for length in (1e-3, 0.01, 0.05, 0.1, 0.2, 0.25, 0.288, 0.2886):
        assert ema.sigma_rel_of_gamma(ema.gamma_of_sigma_rel(length)) == pytest.approx(length, rel=1e-12)
    for gamma in (0.001, 0.5, 6.94, 16.97, 500.0):
        assert ema.gamma_of_sigma_rel(ema.sigma_rel_of_gamma(gamma)) == pytest.approx(gamma, rel=1e-10, abs=1e-10)
    assert ema.gamma_of_sigma_rel(0.05) == pytest.approx(16.97, abs=5e-3), "as the paper has it, section 3.1"
    assert ema.gamma_of_sigma_rel(0.10) == pytest.approx(6.94, abs=5e-3)
    for length in (0, -0.1, 0.28868, 1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 0.2887"):
            ema.gamma_of_sigma_rel(length)


def test_trained_weights_come_back_bit_for_bit():
    net = Net().to(torch.bfloat16)
    averages = EMAWeights(net, decays=(0.9,), sigma_rels=(0.1,))
    for _ in walk(net, 5):
        averages.step()
    before = copy.deepcopy(net.state_dict())
    with averages.swapped("power-0.1") as inside:
        assert inside is net and not torch.equal(net.linear.weight, before["linear.weight"])
        full = averages.full_state_dict("power-0.1")["linear.weight"]
        assert torch.equal(net.linear.weight, full.to(torch.bfloat16))
        with pytest.raises(RuntimeError, match="averaged weights"):
            averages.step()
        with pytest.raises(RuntimeError, match="already"), averages.swapped():
            pass
    with pytest.raises(KeyError), averages.swapped():
        raise KeyError
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    averages.step()


def test_averages_of_a_bfloat16_model_are_float32():
    """Steps far below what bfloat16 resolves add up."""
    net = Net(torch.bfloat16)
    master = {id(p): p.detach().float().clone() for p in net.parameters()}
    averages = EMAWeights(net, decays=(0.0,), sigma_rels=(0.2,), float32_value=lambda p: master[id(p)])
    plain = EMAWeights(net, decays=(0.0,))
    for _ in range(20):
        for value in master.values():
            value += 1e-5
        averages.step()
        plain.step()
    full = averages.full_state_dict()
    assert all(value.dtype == torch.float32 for value in full.values())
    assert torch.equal(full["linear.weight"], master[id(net.linear.weight)])
    assert torch.equal(plain.full_state_dict()["linear.weight"], net.linear.weight.float())
    assert not torch.equal(averages.full_state_dict("power-0.2")["scale"], full["scale"])


def test_full_state_dict_loads_into_the_model():
    net, averages, _ = history_and_averages(3, decays=(0.9,))
    full = averages.full_state_dict()
    assert list(full) == ["linear.weight", "linear.bias", "scale", "directions"] or set(full) == set(net.state_dict())
    fresh = Net()
    fresh.load_state_dict(full)
    with averages.swapped():
        assert torch.equal(flat(fresh.parameters()), flat(net.parameters()))
    kept = full["scale"].clone()
    averages.step()
    next(walk(net, 1))
    averages.step()
    assert torch.equal(full["scale"], kept), "later steps leave it alone"


def test_checkpoints_of_accelerate(tmp_path):
    """Saved and loaded in the middle: bit-equal to the uninterrupted run."""
    arguments = {"decays": (0.99, 0.9), "sigma_rels": (0.05, 0.1)}
    net, averages, history = history_and_averages(10, **arguments)
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(averages)
    accelerator.save_state(str(tmp_path / "checkpoint"))
    saved = copy.deepcopy(net.state_dict())
    for _ in walk(net, 7, seed=1):
        averages.step()
    expected = averages.state_dict()

    resumed_net = Net()
    resumed = EMAWeights(resumed_net, **arguments)
    again = Accelerator(cpu=True)
    again.register_for_checkpointing(resumed)
    again.load_state(str(tmp_path / "checkpoint"))
    assert resumed.count == 10
    resumed_net.load_state_dict(saved)
    for _ in walk(resumed_net, 7, seed=1):
        resumed.step()
    for name, tensors in expected["averages"].items():
        for key, value in tensors.items():
            assert torch.equal(value, resumed.state_dict()["averages"][name][key]), (name, key)
    state = torch.load(tmp_path / "checkpoint" / "custom_checkpoint_0.pkl", weights_only=True)
    with pytest.raises(ValueError, match="has the averages 0.99, 0.9, power-0.05, power-0.1; this run has 0.99"):
        EMAWeights(net, decays=(0.99,)).load_state_dict(state)
    with pytest.raises(ValueError, match="another network"):
        EMAWeights(nn.Linear(5, 4), **arguments).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decays": (1.0,)}, "below 1, got 1.0"),
        ({"decays": ()}, "no average is given"),
        ({"decays": (0.9, 0.9)}, "twice"),
        ({"sigma_rels": (0.3,)}, "got 0.3"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMAWeights(Net(), **arguments)


def test_unknown_name():
    averages = EMAWeights(Net())
    with pytest.raises(ValueError, match="no average '0.5'; there are 0.9999"), averages.swapped("0.5"):
        pass


# ----------------------------------------------------------------------------------------------------------------------
# FSDP2: two processes, parameters in shards

RUN = {"decays": (0.9, 0.5), "sigma_rels": (0.1,)}


def small_model():
    torch.manual_seed(0)
    return randomize(HDiTModel(**SMALL))


def train(model, averages, steps, first=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        sample = torch.randn(2, 3, 32, 32, generator=generator)
        loss = (model(sample, torch.zeros(2)).sample - sample.roll(1, 3)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.step()


@torch.no_grad()
def draw(model):
    return model(torch.ones(1, 3, 32, 32) / 2, torch.zeros(1)).sample


def whole(model):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in model.state_dict().items()}


def course(model, state):
    """A training with samples on the way, then another that goes on from `state`."""
    averages = EMAWeights(model, **RUN)
    train(model, averages, steps=3)
    with averages.swapped("power-0.1"):
        drawn = draw(model)
    train(model, averages, steps=2, first=3)
    results = {"drawn": drawn, "trained": whole(model), "state": averages.state_dict()}
    results["full"] = averages.full_state_dict("0.5")
    with averages.swapped("0.5"):
        results["swapped"] = whole(model)
    later = EMAWeights(model, **RUN)
    later.load_state_dict(state)
    train(model, later, steps=1, first=9)
    return {**results, "later": later.state_dict()}


def sharded_course(rank, folder):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = small_model()
    for module in [*model.modules()]:
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    fully_shard(model)
    assert all(hasattr(parameter, "to_local") for parameter in model.parameters())
    results = course(model, torch.load(folder / "state.pt"))
    averages = EMAWeights(model, **RUN)
    train(model, averages, steps=1)
    ema.save_snapshot(averages, folder / "sharded", 1)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    else:
        assert results["full"] is None and results["state"]["averages"] == {}
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_by_fsdp_equals_unsharded(tmp_path):
    other = small_model()
    averages = EMAWeights(other, **RUN)
    train(other, averages, steps=4, first=20)
    state = averages.state_dict()
    torch.save(state, tmp_path / "state.pt")
    model = small_model()
    expected = course(model, state)
    averages = EMAWeights(model, **RUN)
    torch.multiprocessing.spawn(sharded_course, args=(tmp_path,), nprocs=2)
    results = torch.load(tmp_path / "results.pt")
    # Both processes see the same images: (g + g) / 2 is g, and only the order of sums inside a kernel may differ (a
    # float64 model's averages are bit-equal).
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
    averages.load_state_dict(results["state"])
    assert averages.count == 5
    with averages.swapped("0.5"):
        assert all(torch.equal(value, results["full"][key]) for key, value in model.state_dict().items())
    assert [path.name for path in ema.find_snapshots(tmp_path / "sharded")] == ["step-00000001-power-0.1.safetensors"]


# ----------------------------------------------------------------------------------------------------------------------
# Snapshots and reconstruction


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A walk of 400 steps with a float32 and a float16 snapshot every 25."""
    folder = tmp_path_factory.mktemp("recorded")
    net = Net()
    averages, history = EMAWeights(net, sigma_rels=(0.05, 0.1)), []
    for step, _ in enumerate(walk(net, 400), 1):
        averages.step()
        history.append(flat(net.parameters()))
        if step % 25 == 0:
            ema.save_snapshot(averages, folder / "full", step, dtype=torch.float32)
            ema.save_snapshot(averages, folder / "half", step)
    return folder, torch.stack(history), net


def reconstruction_error(folder, history, net, length, step=400):
    state = ema.reconstruct(ema.find_snapshots(folder), length, step)
    value = flat(state[name] for name, _ in net.named_parameters())
    brute = power_weights(step, ema.gamma_of_sigma_rel(length)) @ history[:step]
    error = ((value - brute).norm() / (history[step - 1] - brute).norm()).item()
    print(f"length {length}, step {step}: relative error {error:.2e}")
    return error


@pytest.mark.parametrize(
    ("length", "bound"),
    [(0.04, 1.2e-2), (0.06, 3e-3), (0.075, 3e-3), (0.09, 1e-3), (0.12, 3e-3), (0.15, 8e-3), (0.2, 4e-2)],
)
def test_reconstruction_against_the_sum_over_the_history(recorded, length, bound):
    """Error relative to how far the averaging moves the weights; the bounds are some three times what was seen."""
    folder, history, net = recorded
    assert reconstruction_error(folder / "full", history, net, length) < bound
    assert reconstruction_error(folder / "full", history, net, length, step=300) < bound


def test_half_precision_snapshots(recorded):
    folder, history, net = recorded
    weights = [load_file(folder / kind / "step-00000400-power-0.1.safetensors") for kind in ("full", "half")]
    assert weights[1]["linear.weight"].dtype == torch.float16 and weights[1]["directions"].dtype == torch.float32
    torch.testing.assert_close(
        weights[1]["linear.weight"].float(), weights[0]["linear.weight"], rtol=2**-11, atol=1e-7
    )
    exact, rounded = (ema.reconstruct(ema.find_snapshots(folder / kind), 0.07) for kind in ("full", "half"))
    relative = (flat([rounded["linear.weight"]]) - flat([exact["linear.weight"]])).norm() / exact[
        "linear.weight"
    ].norm()
    assert 0 < relative < 1e-3
    assert torch.equal(rounded["directions"], net.directions) and "cache" not in rounded


def test_reconstruction_of_a_stored_profile_is_the_snapshot(recorded):
    folder, _, _ = recorded
    snapshots = ema.find_snapshots(folder / "full")
    for length, step in ((0.05, 400), (0.1, 200)):
        stored = load_file(folder / "full" / f"step-{step:08d}-power-{length}.safetensors")
        state = ema.reconstruct(snapshots, length, step)
        assert state.keys() == stored.keys() and all(torch.equal(state[key], stored[key]) for key in stored)


def test_coefficients_against_quadrature():
    """The normal equations with integrals by the midpoint rule, in float64."""
    profiles, length, step = [(50, 0.05), (50, 0.1), (80, 0.05), (80, 0.1), (100, 0.05), (100, 0.1)], 0.08, 100
    times = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 4000

    def profile(t, sigma_rel):
        gamma = ema.gamma_of_sigma_rel(sigma_rel)
        return torch.where(times < t, (gamma + 1) / t * (times / t) ** gamma, 0)

    table = torch.stack([profile(*p) for p in profiles])
    solution = torch.linalg.solve(table @ table.T, table @ profile(step, length))
    solution /= solution.sum()
    coefficients = torch.from_numpy(ema.reconstruction_coefficients(profiles, length, step))
    torch.testing.assert_close(coefficients, solution, rtol=1e-5, atol=1e-6)
    assert coefficients.sum().item() == pytest.approx(1, abs=1e-12)
    missed = coefficients @ table - profile(step, length)
    mismatch = ema.profile_mismatch(profiles, length, step)
    assert (
        mismatch == pytest.approx((missed.norm() / profile(step, length).norm()).item(), rel=1e-3) and mismatch > 1e-3
    )
    assert ema.profile_mismatch(profiles, 0.1, 100) < 1e-7


def test_snapshots_are_rewritten_identically_and_whole(tmp_path, monkeypatch):
    _, averages, _ = history_and_averages(4, sigma_rels=(0.1,))
    (path,) = ema.save_snapshot(averages, tmp_path, 4)
    first = path.read_bytes()
    assert ema.read_snapshot_metadata(path) == (4, 0.1, ["directions"])
    ema.save_snapshot(averages, tmp_path, 4)
    assert path.read_bytes() == first
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        ema.save_snapshot(averages, tmp_path, 4, dtype=torch.float32)
    assert path.read_bytes() == first and ema.find_snapshots(tmp_path) == [path]


def test_what_snapshots_refuse(tmp_path, recorded):
    net, averages, _ = history_and_averages(4, sigma_rels=(0.1,))
    with pytest.raises(ValueError, match="step 4, not of step 5"):
        ema.save_snapshot(averages, tmp_path, 5)
    with pytest.raises(ValueError, match="has none"):
        ema.save_snapshot(EMAWeights(net), tmp_path, 0)
    with torch.no_grad():
        net.scale.fill_(1e9)
    averages.step()
    with pytest.raises(ValueError, match="scale at step 5 has values that torch.float16 can't hold"):
        ema.save_snapshot(averages, tmp_path, 5)
    assert not list(tmp_path.iterdir())
    (tmp_path / "step-00000007-power-0.1.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is not a snapshot"):
        ema.reconstruct(ema.find_snapshots(tmp_path), 0.1)
    snapshots = ema.find_snapshots(recorded[0] / "full")
    with pytest.raises(ValueError, match="no snapshot of step 30; there are those of 25, 50"):
        ema.reconstruct(snapshots, 0.1, 30)
    with pytest.raises(ValueError, match="got 0.3"):
        ema.reconstruct(snapshots, 0.3)
    with pytest.raises(ValueError, match="no snapshots"):
        ema.reconstruct([], 0.1)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reconstruct_ema", REPOSITORY / "examples" / "reconstruct_ema.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_builds_the_pipeline(script, tmp_path, make_model, capsys):
    model = make_model(num_classes=2)
    averages = EMAWeights(model, sigma_rels=(0.05, 0.1))
    run = tmp_path / "run"
    for step, _ in enumerate(walk(model, 4), 1):
        averages.step()
        ema.save_snapshot(averages, run / "snapshots", step)
    pipeline = HDiTPipeline(model, EDMDPMSolverMultistepScheduler(sigma_max=70.0), id2label={0: "cat", 1: "dog"})
    pipeline.save_pretrained(run)
    script.main(["--run", str(run), "--length", "0.08", "--step", "3", "--output_dir", str(tmp_path / "new")])
    assert "sigma_rel 0.08 at step 3, from 6 snapshots; its profile differs by 0." in capsys.readouterr().out
    built = HDiTPipeline.from_pretrained(tmp_path / "new")
    assert built.id2label == {0: "cat", 1: "dog"} and built.scheduler.config.sigma_max == 70.0
    expected = ema.reconstruct(ema.find_snapshots(run / "snapshots"), 0.08, 3)
    assert all(torch.equal(value, expected[key]) for key, value in built.transformer.state_dict().items())
    with pytest.raises(ValueError, match="is not an empty folder"):
        script.main(["--run", str(run), "--length", "0.08", "--output_dir", str(tmp_path / "new")])


def test_what_the_script_refuses(script, tmp_path, make_model):
    arguments = ["--run", str(tmp_path), "--length", "0.1", "--output_dir", str(tmp_path / "new")]
    with pytest.raises(ValueError, match="no pipeline"):
        script.main(arguments)
    HDiTPipeline(make_model(), EDMDPMSolverMultistepScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no snapshots in"):
        script.main(arguments)
    averages = EMAWeights(Net(), sigma_rels=(0.1,))
    averages.step()
    ema.save_snapshot(averages, tmp_path / "snapshots", 1)
    with pytest.raises(ValueError, match="another network than"):
        script.main(arguments)
    assert not (tmp_path / "new").exists()
