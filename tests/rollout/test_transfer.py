"""Weights from the trainer's memory to engines: what is compared, and in which order things happen."""

from __future__ import annotations

from contextlib import contextmanager
from math import prod
from types import SimpleNamespace

import pytest
import torch
from running import forked, free_port

from openrlhf_sgpo.config import Config


@pytest.fixture(scope="module")
def checksums():
    from openrlhf_sgpo.openrlhf import checksums

    return checksums


def sums_of(checksums, tensors):
    return checksums.as_integers({name: checksums.checksum(tensor) for name, tensor in tensors.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_checksums_of_slices_add_up(checksums, dtype):
    torch.manual_seed(0)
    for shape, axis in (((7,), 0), ((6, 10), 0), ((6, 10), 1), ((2, 4, 6), 2)):
        whole = torch.randn(shape).to(dtype)
        place = torch.empty(shape, device="meta")
        parts = zip(whole.split(2, axis), place.split(2, axis), strict=True)
        sums = sum(checksums.checksum(part, view.storage_offset(), view.stride()) for part, view in parts)
        assert torch.equal(sums, checksums.checksum(whole))
        turned = whole.mT if whole.dim() > 1 else whole
        assert torch.equal(checksums.checksum(turned, 0, turned.stride()), checksums.checksum(whole))


def test_a_checksum_tells_values_and_their_places(checksums):
    torch.manual_seed(0)
    weight = torch.randn(5, 8, dtype=torch.bfloat16)
    for changed in (
        weight.flip(0),
        weight.flip(1),
        weight.roll(1),
        -weight,
        weight + (torch.arange(40).view(5, 8) == 17),
    ):
        assert not torch.equal(checksums.checksum(changed), checksums.checksum(weight))
    assert checksums.checksum(torch.tensor(3.0)).tolist() == [torch.tensor(3.0).view(torch.int32).item(), 0]


def worker_model(config, tensors, rank, size):
    """A Llama of vLLM as the worker ``rank`` of ``size`` holds it, with these weights."""
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.utils.torch_utils import set_default_torch_dtype

    settings = VllmConfig(
        model_config=ModelConfig(config, dtype="float32", max_model_len=64, skip_tokenizer_init=True),
        cache_config=CacheConfig(),
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
    )
    group = SimpleNamespace(world_size=size, rank_in_group=rank)
    alone = SimpleNamespace(world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)
    with (
        pytest.MonkeyPatch.context() as patch,
        set_current_vllm_config(settings),
        set_default_torch_dtype(torch.float32),
    ):
        patch.setattr(parallel_state, "_TP", group)
        patch.setattr(parallel_state, "_PP", alone)
        model = LlamaForCausalLM(vllm_config=settings)
        model.load_weights(tensors.items())
        yield model


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_weights_are_compared_at_every_tensor_parallelism(size, tied, checksums, tiny_model, tmp_path):
    """Heads of keys and values that are fewer than the workers are held twice, and the vocabulary is padded."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    source = LlamaForCausalLM(config)
    source.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    tensors = {name: parameter.detach() for name, parameter in source.named_parameters()}
    shapes = [checksums.Shape(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    sent = sums_of(checksums, tensors)
    held, damaged, models = (
        [],
        [],
        [contextmanager(worker_model)(str(tmp_path), tensors, rank, size) for rank in range(size)],
    )
    for worker in models:
        with worker as model:
            before = {name: parameter.clone() for name, parameter in model.named_parameters()}
            held.append(checksums.held_slices(model, shapes))
            assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight[3, 5] += 1
            damaged.append(checksums.held_slices(model, shapes))
            with pytest.raises(RuntimeError, match="the engine has weights that were not sent: .*gate_up_proj"):
                checksums.held_slices(
                    model, [shape for shape in shapes if "gate_proj" not in shape.name and "up_proj" not in shape.name]
                )
    assert checksums.compared_share(shapes, sent, held) == 1
    for worker in range(size):
        with pytest.raises(RuntimeError, match="holds other weights than were sent: .*layers.1.mlp.down_proj"):
            checksums.compared_share(shapes, sent, [*held[:worker], damaged[worker], *held[worker + 1 :]])
    if size > 1:
        assert checksums.compared_share(shapes, sent, held[1:]) < 0.8


class RecordingEngine:
    """Stands for an actor with an engine: records what it is asked in ``events``, and holds what it is given."""

    def __init__(self, checksums, events):
        self.checksums = checksums
        self.events = events
        self.tensors = {}

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return SimpleNamespace(remote=lambda *arguments: self.asked(name, *arguments))

    def asked(self, name, *arguments):
        if name != "ask_workers":
            self.events.append(f"{name} {arguments[0]}" if name in ("sleep", "wake_up") else name)
            return [([3, 4], [])] if name == "sample" else None
        method, *given = arguments
        self.events.append(method)
        if method == "take_packed":
            shapes, packed = given
            parts = torch.from_numpy(packed.copy()).split([prod(shape) * dtype.itemsize for _, dtype, shape in shapes])
            for (tensor, dtype, shape), part in zip(shapes, parts, strict=True):
                self.tensors[tensor] = part.view(dtype).view(shape)
            return [None]
        sums = sums_of(self.checksums, self.tensors)
        slices = [
            self.checksums.Slice(name, (0, tuple(self.tensors[name].shape), ()), sums[name]) for name in self.tensors
        ]
        return [slices if method == "held" else (given, sums, slices)]


@pytest.fixture
def recorded(checksums, tiny_model, monkeypatch):
    """A rollout of two recording engines that share a GPU with the trainer, the weights of an actor, and all that happens."""
    import ray

    from openrlhf_sgpo.data.tokens import load_chat
    from openrlhf_sgpo.openrlhf import PolicyWeights, build_strategy, load_actor
    from openrlhf_sgpo.rollout import transfer, vllm

    config = Config()
    config.ds.param_dtype, config.data.max_len, config.vllm.num_engines = "fp32", 64, 2
    config.train.batch_size = config.train.micro_batch_size = 1
    strategy = build_strategy(config)
    chat, _ = load_chat(str(tiny_model), False, "model", 64)
    actor = strategy.prepare(load_actor(str(tiny_model), config, strategy, trainable=False))
    events = []

    def start(self):
        self.engines = [RecordingEngine(checksums, events) for _ in range(2)]
        self.sleeps, self._awake, self.starting = True, [], []

    monkeypatch.setattr(vllm.VllmRollout, "_start", start)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(transfer, "PACKED", 100_000)
    return vllm.VllmRollout(config, chat, str(tiny_model)), actor, lambda: PolicyWeights(actor), events


def test_the_order_of_a_sync(recorded, monkeypatch):
    """Sleep, wake weights, transfer, compare, forget the cache, wake it; and the trainer's states are off the GPU meanwhile."""
    from openrlhf_sgpo.openrlhf import weights
    from openrlhf_sgpo.rollout import Sampling

    rollout, actor, policy, events = recorded
    moved = lambda name: lambda *_: events.append(name)  # noqa: E731
    monkeypatch.setattr(weights, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))
    for name in ("offload_deepspeed_states", "reload_deepspeed_states"):
        monkeypatch.setattr(weights, name, moved(name))
    monkeypatch.setattr(weights, "release_memory", moved("empty_cache"))
    actor.model.optimizer = SimpleNamespace(offload_states=None)
    for _ in range(2):
        events.clear()
        with weights.aside(actor), rollout.awake():
            rollout.load(policy())
            rollout.generate([(1, 2)], Sampling(1.0, 1.0, 4, seed=1), "")
            rollout.generate([(1, 2)], Sampling(1.0, 1.0, 4, seed=2), "")
        packed = [event for event in events if event == "take_packed"]
        assert len(packed) >= 2 * 2, "in more than one transfer"
        assert list(dict.fromkeys(events)) == [
            "offload_deepspeed_states", "empty_cache", "wake_up ['weights']", "take_packed", "held", "reset_prefix_cache",
            "wake_up ['kv_cache']", "sample", "sleep 2", "reload_deepspeed_states",
        ]  # fmt: skip
    assert rollout.compared == 1 and rollout.sent == sum(tensor.nbytes for _, tensor in policy())


def test_a_reference_stays_in_memory_asleep(recorded):
    """It would not come again. The engines are told once which share it has."""
    from openrlhf_sgpo.rollout import Sampling

    rollout, _, policy, events = recorded
    rollout.reference = "reference"
    rollout.load(policy())
    events.clear()
    for share in (0.5, 0.5, 0.0):
        rollout.generate([(1, 2)], Sampling(1.0, 1.0, 4, seed=1, share=share), "")
    assert "take_packed" not in events and events[-1] == "sleep 1"
    assert events.count("mix") == 2 * len(rollout.engines)


def test_weights_lost_in_sleep_are_sent_again(recorded):
    """Not those of a folder, which the engines keep aside."""
    from openrlhf_sgpo.rollout import Sampling

    rollout, _, policy, events = recorded
    rollout.load(policy())
    events.clear()
    rollout.generate([(1, 2)], Sampling(1.0, 1.0, 4, seed=1), "")
    assert "take_packed" in events and events[-1] == "sleep 2"


def test_engines_keep_their_weights_while_they_sample_in_the_background(recorded, monkeypatch):
    from openrlhf_sgpo.rollout import Sampling
    from openrlhf_sgpo.rollout.vllm import EngineDied

    rollout, _, policy, events = recorded
    rollout.load(policy())
    events.clear()
    wait = rollout.begin(lambda ask: ask([(1, 2), (3, 4)], Sampling(1.0, 1.0, 4, seed=1)))
    with pytest.raises(AssertionError, match="still answer"):
        rollout.load(policy())
    assert [[answer.token_ids for answer in answers] for answers in wait()] == [[(3, 4)], [(3, 4)]]
    assert events.count("sample") == 2
    rollout.load(policy())

    def die(*_):
        raise EngineDied([1], "killed")

    monkeypatch.setattr(rollout, "_sample", die)
    wait = rollout.begin(lambda ask: ask([(1, 2)], Sampling(1.0, 1.0, 4, seed=1)))
    with pytest.raises(RuntimeError, match="vLLM engine 1 died while the policy trained .killed.*--resume goes on"):
        wait()


def test_other_weights_than_were_sent_end_the_run(recorded):
    rollout, _, policy, _ = recorded
    rollout.load(policy())
    engine = rollout.engines[1]
    taken = engine.asked

    def dropping(name, *arguments):
        if arguments[:1] == ("held",):
            engine.tensors["model.norm.weight"] = engine.tensors["model.norm.weight"] + 1
        return taken(name, *arguments)

    engine.asked = dropping
    with pytest.raises(RuntimeError, match="the engine holds other weights than were sent: .'model.norm.weight'."):
        rollout.load(policy())


def test_the_policy_is_not_kept_in_memory(recorded, tiny_model):
    rollout, actor, policy, _ = recorded
    weights = policy()
    rollout.load(weights)
    assert weights._engine() is actor.model
    weights._engine = lambda: None
    with pytest.raises(RuntimeError, match="no longer in memory"):
        rollout._fill()


@pytest.mark.parametrize(("backend", "offsets"), [("nccl", [1, 5]), ("ipc", [None, None])])
def test_engines_join_after_the_trainer_and_after_each_other(backend, offsets):
    from openrlhf_sgpo.rollout.transfer import EngineClient

    asked = []
    client = EngineClient(
        backend, lambda method, arguments: asked.append((method, arguments)) or [], engines=2, workers=4
    )
    client.init_weight_transfer_engine({"packed": True})
    client.start_weight_update()
    client.update_weights({"names": []})
    client.finish_weight_update()
    (opened, settings), (taken, _), *rest = asked
    assert (opened, taken) == ("open_transfer", "take_transferred")
    assert [given.get("rank_offset") for _, given in settings] == offsets
    assert [method for method, _ in rest] == (["let_go"] if backend == "ipc" else [])


# Two ranks and vLLM's own sender, of which only the calls of CUDA are replaced.
RANKS = """
import os, signal
from dataclasses import make_dataclass
from types import SimpleNamespace
import torch
from torch import distributed
from vllm.distributed.weight_transfer import ipc_engine
from openrlhf_sgpo import ranks
from openrlhf_sgpo.rollout import transfer, vllm

def buffers(iterator, **_):
    for name, weight in iterator:
        yield SimpleNamespace(ipc_handle={}, names=[name], dtype_names=[""], shapes=[], tensor_sizes=[])

def ask(method, arguments):
    if method == deadly:
        raise vllm.EngineDied([0], method)
    return [["a gpu"]]

os.environ |= {"RANK": str(int(os.fork() == 0)), "WORLD_SIZE": "2"}
signal.alarm(120)
torch.cuda.synchronize = torch.cuda.ipc_collect = torch.cuda.current_device = lambda: 0
torch.cuda.is_available = lambda: True
torch.accelerator.current_device_index = lambda: 0
torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid="a gpu")
ipc_engine.packed_ipc_producer = buffers
fields = ["names", "dtype_names", "shapes", "ipc_handles", "tensor_sizes"]
ipc_engine.IPCWeightTransferUpdateInfo = make_dataclass("Update", fields)
distributed.init_process_group("gloo")
weights = {"first": torch.ones(2), "second": torch.ones(3)}
for deadly in ("open_transfer", "take_transferred", "let_go"):
    try:
        transfer.open_transfer(ask, 1, 1).send(weights.items())
    except vllm.EngineDied as death:
        assert ranks.gather(death.numbers) == [[0], [0]]
        print(f"{distributed.get_rank()} {death.reason}", flush=True)
if os.environ["RANK"] == "0":
    os.wait()
"""


def test_an_engine_that_dies_while_weights_arrive_is_known_to_all_ranks(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    process = forked(tmp_path / "ranks.py", **meeting)
    assert process.returncode == 0, process.stderr[-3000:]
    for rank in "01":
        said = [line[2:] for line in process.stdout.splitlines() if line.startswith(f"{rank} ")]
        assert said == ["open_transfer", "take_transferred", "let_go"]
