"""ModelNew between the tools around it: several processes, replicas, hooks, graphs, other tensors.

A scene that takes processes of its own gets as many Pythons, which meet in a file; on a GPU they
share it.
"""

import concurrent.futures
import copy
import functools
import os

import pytest
import torch
import torch.nn as nn
from cases import BF16, F32
from scenes import in_new_python
from test_tools import NUMBERS, make, modes, rand, same_state, step

import check


def load() -> check.Target:
    """In a Python of its own."""
    text = check.TEXT_PATH.read_text()
    if torch.cuda.is_available():
        return check.load_on_gpu(text)
    torch.set_num_threads(1)
    emulator = check.load_emulator()
    return check.Target(emulator.load(text), "cpu", emulator)


def at_once(scene, count: int, **environment: str) -> list[str]:
    """The scene in so many Pythons at the same time, with their RANK and WORLD_SIZE."""

    def one(rank: int) -> str:
        return in_new_python(scene, RANK=str(rank), WORLD_SIZE=str(count), **environment)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


# ---- Autograd's tools


def test_saved_tensor_hooks(target):
    """All that backward needs goes through them: here, as a copy."""
    ours, theirs = make(target)
    x, packed = rand(target, 2, 4, 5, 7), []

    def pack(t):
        packed.append(t.shape)
        return t.clone()

    def hooked(module):
        def forward(x):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                return module(x)

        return forward

    NUMBERS(step(ours, x, hooked(ours)), step(theirs, x))
    assert x.shape in packed and ours.gamma.shape in packed and len(packed) == 3


@pytest.mark.parametrize("policy", ["MUST_SAVE", "PREFER_RECOMPUTE"])
def test_selective_checkpointing(target, policy):
    """What is saved is not launched again; what is, updates the running buffers once more."""
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    ours, theirs = make(target)
    operator = target.names["_fused_batch_norm"].train.default

    def choose(context, called, *args, **kwargs):
        return CheckpointPolicy[policy if called is operator else "PREFER_RECOMPUTE"]

    def checkpointed(x):
        return checkpoint(
            lambda x: ours(x).square(),
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(choose),
        )

    x = rand(target, 2, 4, 5, 7)
    NUMBERS(step(ours, x, checkpointed), step(theirs, x, lambda x: theirs(x).square()))
    assert ours.num_batches_tracked.item() == (1 if policy == "MUST_SAVE" else 2)


GRADIENTS = {
    "NCHW": lambda dy: dy,
    "channels-last": lambda dy: dy.contiguous(memory_format=torch.channels_last),
    "transposed": lambda dy: dy.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda dy: dy[:1, :1, :1, :1].expand(dy.shape),
    "every other column": lambda dy: torch.stack([dy, dy], -1).flatten(3)[..., ::2],
    "unaligned": lambda dy: torch.cat([dy.new_zeros(1), dy.flatten()])[1:].view(dy.shape),
}


@pytest.mark.parametrize("of_x", ["NCHW", "channels-last", "transposed"])
@pytest.mark.parametrize("layout", GRADIENTS)
@modes
def test_gradient_of_another_layout(target, layout, of_x, training):
    ours, theirs = make(target, training=training)
    x, dy = GRADIENTS[of_x](rand(target, 3, 4, 5, 7)), rand(target, 3, 4, 5, 7)
    grads = []
    for module, dtype in ((ours, F32), (theirs.double(), torch.float64)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = module(leaf if module is ours else leaf.contiguous())
        of = [leaf, *module.parameters()]
        grads.append(torch.autograd.grad(y, of, GRADIENTS[layout](dy.to(dtype))))
    for found, expected in zip(*grads):
        NUMBERS(found.double(), expected)


def test_changed_buffers_have_a_new_version(target):
    """What autograd refuses a backward by: each of the three, once a training forward."""
    ours, _ = make(target)
    versions = lambda: [buffer._version for buffer in ours.buffers()]
    before = versions()
    ours(rand(target, 2, 4, 5, 7))
    assert all(new > old for old, new in zip(before, versions()))
    before = versions()
    ours.eval()(rand(target, 2, 4, 5, 7))
    assert versions() == before


def test_vmap_refused(target):
    ours, _ = make(target)
    with pytest.raises(NotImplementedError, match="x must be .*got vmap"):
        torch.func.vmap(ours)(rand(target, 3, 2, 4, 5, 7))


def test_jit_script_refused(target):
    for module in (make(target)[0], nn.Sequential(make(target)[0])):
        with pytest.raises(NotImplementedError, match="must be traced.*got torch.jit.script"):
            torch.jit.script(module)


def test_compiled_autograd_over_an_eager_forward_refused(target):
    ours, _ = make(target)
    y = ours(rand(target, 2, 4, 5, 7))
    compiler = torch.compile(backend="eager")
    refused = pytest.raises(NotImplementedError, match="forward must be compiled.*got compiled")
    with torch._dynamo.compiled_autograd._enable(compiler), refused:
        y.sum().backward()
    torch._dynamo.reset()


def test_compiled_autograd_over_a_compiled_forward(target):
    torch._dynamo.reset()
    ours, theirs = make(target)
    x = rand(target, 2, 4, 5, 7)
    expected = step(theirs, x)
    y = torch.compile(ours, backend="aot_eager")(x)
    weights = torch.linspace(0, 1, y.numel(), device=y.device).view(y.shape)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        (y * weights).sum().backward()
    NUMBERS((ours.gamma.grad, ours.beta.grad), expected[2:])
    torch._dynamo.reset()


# ---- Tensors and modules of other kinds


class Labelled(torch.Tensor):
    """A subclass as data sets make them: it keeps what PyTorch's functions return in its kind."""


@modes
def test_subclass_of_tensor(target, training):
    ours, theirs = make(target, training=training)
    x = rand(target, 2, 4, 5, 7)
    labelled = x.as_subclass(Labelled)
    y, expected = ours(labelled), theirs(labelled)
    assert type(y) is type(expected)
    NUMBERS(y.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    same_state(ours, theirs)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model(target, use_buffers):
    from torch.optim.swa_utils import AveragedModel

    averaged = []
    for module in make(target):
        # By a function of our own: PyTorch's does not take a counter on a GPU.
        mean = lambda old, new, count: old + (new - old) / (count + 1)
        average = AveragedModel(module, avg_fn=mean, use_buffers=use_buffers)
        for seed in range(3):
            torch.manual_seed(seed)
            module(rand(target, 2, 4, 5, 7))
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(0.5)
            average.update_parameters(module)
        averaged.append([*average.module.parameters(), *average.module.buffers()])
    NUMBERS(*averaged)


@modes
def test_deterministic_mode(target, training):
    """Neither refused nor slowed down: nothing fills y before the launch that writes it."""
    ours, theirs = make(target, training=training)
    x, another = rand(target, 2, 4, 5, 7), copy.deepcopy(ours)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            another(x)
        found = step(ours, x)
    finally:
        torch.use_deterministic_algorithms(False)
    NUMBERS(found, step(theirs, x))
    assert not [event.name for event in profile.events() if "fill" in event.name]


# ---- Graphs


def test_compiled_step_of_a_net(target):
    """ModelNew within other modules, where its text's globals are another file's."""
    torch._dynamo.reset()
    nets = []
    for module in make(target):
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, 4, 3, bias=False).to(target.device)  # its gradient would be 0
        nets.append(nn.Sequential(convolution, module, nn.ReLU()))
    ours, theirs = nets
    x = rand(target, 2, 3, 7, 7)
    backend = "inductor" if target.cuda else "aot_eager"
    NUMBERS(step(ours, x, torch.compile(ours, fullgraph=True, backend=backend)), step(theirs, x))
    same_state(ours[1], theirs[1])
    torch._dynamo.reset()


@pytest.mark.cuda
def test_parallel_branches_of_a_graph(target):
    """Forwards that may run at once: forked and joined within one captured graph."""
    shapes = ((16, 64, 64, 64), (2, 3, 512, 512), (8, 256, 28, 28))
    models = [make(target, shape[1])[0] for shape in shapes]
    xs = [rand(target, *shape) for shape in shapes]
    streams = [torch.cuda.Stream() for _ in shapes]
    ys, graph = [], torch.cuda.CUDAGraph()
    with torch.no_grad():
        wants = [copy.deepcopy(model)(x) for model, x in zip(models, xs)]
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for stream, model, x in zip(streams, models, xs):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    ys.append(model(x))
            for stream in streams:
                torch.cuda.current_stream().wait_stream(stream)
        for _ in range(200):
            graph.replay()
    for y, want, model in zip(ys, wants, models):
        torch.testing.assert_close(y, want, rtol=0, atol=0)
        assert model.num_batches_tracked.item() == 200


# ---- Several processes


def meet(rank: int, count: int, backend: str = "gloo"):
    """(NCCL refuses two processes on one GPU.)"""
    torch.distributed.init_process_group(
        backend, init_method=f"file://{os.environ['MEETING']}", rank=rank, world_size=count
    )


def my_rank() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def replicas():
    """DistributedDataParallel, two forwards for one backward, buffers broadcast before each."""
    meet(*my_rank())
    rank, count = my_rank()
    target, found = load(), []
    torch.manual_seed(0)
    first, second = (rand(target, count, 2, 4, 5, 7)[rank] for _ in range(2))
    for module in make(target):
        replica = nn.parallel.DistributedDataParallel(module)
        (replica(first).square().sum() + replica(second).sum()).backward()
        found.append([*(p.grad for p in module.parameters()), *module.buffers()])
    NUMBERS(*found)
    print(found[0][0].sum().item())
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    """Two processes: statistics of their own, gradients in common."""
    first, second = at_once(replicas, 2, MEETING=str(tmp_path / "meeting"))
    assert first.splitlines()[-1] == second.splitlines()[-1]


def sharded():
    """FSDP2 with x and parameters in bfloat16; the running buffers stay in float32.

    Beside PyTorch's in float32: on a CPU it takes no such mixture.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    meet(0, 1, "nccl" if torch.cuda.is_available() else "gloo")
    target = load()
    mesh = torch.distributed.init_device_mesh(target.device, (1,))
    ours, theirs = make(target)
    x = rand(target, 2, 4, 5, 7)
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32)
    fully_shard(ours, mesh=mesh, mp_policy=policy)
    y, expected = ours(x), theirs(x)
    assert y.dtype == BF16
    y.float().square().sum().backward()
    expected.square().sum().backward()
    close = functools.partial(torch.testing.assert_close, rtol=2e-2, atol=2e-2)
    close(y.float(), expected)
    close([p.grad.full_tensor() for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    close([*ours.buffers()], [*theirs.buffers()])
    torch.distributed.destroy_process_group()


def test_fsdp2_in_mixed_precision(tmp_path):
    in_new_python(sharded, MEETING=str(tmp_path / "meeting"))


def worker(module, x, queue):
    with torch.no_grad():
        queue.put(module(x).sum().item())


def sharing():
    """A forked worker trains on the parent's buffers. None may on a GPU; a data loader's do not."""
    target = load()
    ours, theirs = make(target)
    x = rand(target, 2, 4, 5, 7)
    if not target.cuda:
        ours.share_memory()
        context = torch.multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=worker, args=(ours, x, queue))
        child.start()
        NUMBERS(torch.tensor(queue.get(timeout=60)), theirs(x).sum())
        child.join()
        same_state(ours, theirs)
    loader = torch.utils.data.DataLoader(torch.rand(6, 4, 5, 7), batch_size=2, num_workers=2)
    for batch in loader:
        NUMBERS(ours(batch.to(target.device)), theirs(batch.to(target.device)))
    same_state(ours, theirs)


def test_sharing_with_workers():
    in_new_python(sharing)


def compiled():
    target = load()
    ours, theirs = make(target)
    x = rand(target, 2, 4, 5, 7)
    with torch.no_grad():
        NUMBERS(torch.compile(ours, fullgraph=True)(x), theirs(x))
    same_state(ours, theirs)
    print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])


def test_warm_caches_of_inductor(tmp_path):
    """What the first process compiled serves a second one, which loads the text anew."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    hits = [in_new_python(compiled, **environment).splitlines()[-1] for _ in range(2)]
    assert hits[0] == "0" and int(hits[1]) > 0


def imported():
    target = load()
    ours, theirs = make(target)
    x = rand(target, 2, 4, 5, 7)
    NUMBERS(step(ours, x), step(theirs, x))


@pytest.mark.cuda
def test_four_ranks_import_at_once(tmp_path):
    """One builds, the others wait for it."""
    settings = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "TORCH_CUDA_ARCH_LIST": ""}
    at_once(imported, 4, **settings)
    assert len([*tmp_path.rglob("*.so")]) == 1
