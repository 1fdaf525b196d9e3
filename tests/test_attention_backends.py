"""Attention back ends: each computes what PyTorch's own does, the fastest is found, what cannot run says why."""

import re
import sys
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import bounds
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from shared import conditions, latent_shape, policy_of, run, untimed
from tiny import SD_BETAS

from ddpo_fast import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.networks import attention_backends
from ddpo_fast.networks.attention_backends import (
    ON_CPU,
    PACKAGES,
    AttentionCall,
    attention_calls,
    check,
    choose,
    require,
    resolve,
    set_attention,
)
from ddpo_fast.pipelines.families import FAMILIES
from ddpo_fast.policy import Policy
from ddpo_fast.records.metrics import read_metrics

CPU = torch.device("cpu")
CALLS = Counter({AttentionCall(16, 16, 2, 8): 3, AttentionCall(16, 5, 2, 8): 1})


@pytest.fixture
def policy(tiny_model) -> Policy:
    return policy_of(tiny_model, targets=["attention"], rank=2, alpha=2.0)


def gradients(policy: Policy) -> list[torch.Tensor]:
    policy.network.zero_grad()
    latents = torch.randn(2, *latent_shape(policy), generator=torch.Generator().manual_seed(0))
    policy.predict(latents, torch.tensor([500, 7]), conditions(policy, ["a", "b"])).square().sum().backward()
    return [parameter.grad.clone() for parameter in policy.trainable_parameters()]


@pytest.mark.rounding
@pytest.mark.parametrize("backend", ["math", "flash"])
def test_a_back_end_is_the_same_attention(policy, backend):
    """On a CPU PyTorch itself takes its flash kernel: the same bits."""
    expected = [policy.example_call(4), *gradients(policy)]
    set_attention(policy.network, backend)
    found = [policy.example_call(4), *gradients(policy)]
    bounds.assert_same_network(found, expected, policy.network)
    assert backend == "math" or all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
def test_compiled_attention_has_it_without_a_break(policy, monkeypatch):
    """A back end that gives zeros shows which one was compiled: all that is left is the last bias."""
    attn, dispatch = policy.network.mid_block.attentions[0].transformer_blocks[0].attn1, attention_backends.dispatch_attention_fn
    set_attention(policy.network, "math")
    monkeypatch.setattr(attention_backends, "dispatch_attention_fn", lambda *args, **kwargs: 0 * dispatch(*args, **kwargs))
    torch._dynamo.reset()
    attn.compile(fullgraph=True, backend="eager")
    x = torch.randn(2, 16, attn.query_dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attn(x), attn.to_out[0].bias.expand_as(x))


def test_sdpa_is_diffusers_own(policy):
    attentions = [module for module in policy.network.modules() if isinstance(module, Attention)]
    set_attention(policy.network, "math")
    assert all(isinstance(attn.processor, AttnProcessor2_0) and type(attn.processor) is not AttnProcessor2_0 for attn in attentions)
    for _ in range(2):
        set_attention(policy.network, "sdpa")
        assert all(type(attn.processor) is AttnProcessor2_0 and vars(attn.processor) == {} for attn in attentions)


def test_calls_are_counted(policy):
    """Self-attention and cross-attention of every block, once each."""
    text = conditions(policy, ["a"]).leaves[0].shape[1]
    calls, layers = attention_calls(lambda: policy.example_call(2)), []
    for module in policy.network.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda attn, args, out: layers.append((args[0].shape[1], attn.heads)))
    policy.example_call(2)
    assert Counter((call.queries, call.heads) for call in calls.elements()) == Counter(layers) and layers
    assert sum(count for call, count in calls.items() if call.keys == text) == len(layers) // 2
    assert not any(call.masked for call in calls)


def test_the_fastest_is_chosen_and_the_choice_explained(monkeypatch):
    """Back ends with made-up times: 3 and 1 calls of the two shapes."""
    milliseconds = {"math": (1, 9), "sdpa": (2, 2), "flash": (1, 4)}

    class Timer:
        def __init__(self, stmt, globals, num_threads):
            self.median = globals["run"]

        def blocked_autorange(self, min_run_time):
            return self

    def check(backend, call, num_rows, dtype, device):
        if backend == "cudnn":
            raise RuntimeError("no such kernel")
        return milliseconds[backend][list(CALLS).index(call)] / 1000

    monkeypatch.setattr(attention_backends, "check", check)
    monkeypatch.setattr(attention_backends, "Timer", Timer)
    assert choose(["math", "cudnn", "sdpa", "flash"], CALLS, 8, torch.float32, CPU) == (
        "flash", "attention.backend: flash; forward and backward at 8 rows: flash 7 ms, sdpa 8 ms, math 12 ms; cudnn cannot: no such kernel"
    )  # fmt: skip
    with pytest.raises(ValueError, match="attention.backend=auto: no back end can run here; cudnn cannot: no such kernel"):
        choose(["cudnn"], CALLS, 8, torch.float32, CPU)


def test_times_are_measured():
    """And the smallest is chosen, whichever it is on this machine."""
    name, line = choose(["math", "sdpa"], Counter({AttentionCall(256, 256, 4, 32): 1}), 2, torch.float32, CPU)
    times = {backend: float(found) for backend, found in re.findall(r"(math|sdpa) ([\d.e+]+) ms", line)}
    assert set(times) == {"math", "sdpa"} and times[name] == min(times.values()) > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_is_kept(dtype):
    """That of the call is tried, row by row; a back end that ignored it would be found out."""
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])[:, None, None]
    mask = mask if dtype == torch.bool else mask.float().log()
    call = AttentionCall(6, 4, 2, 8, True, mask)
    assert torch.equal(call.mask_of(5), mask[[0, 1, 0, 1, 0]])
    check("math", call, 5, torch.float32, CPU)()
    with pytest.raises(RuntimeError, match="refuses 6 queries, 4 keys, 2 heads of 8 channels, with a mask, float32: .*not supported"):
        check("flash", call, 5, torch.float32, CPU)


def test_a_mask_that_is_misread_is_found_out(monkeypatch):
    """Such as xformers' in diffusers 0.42, which adds 1 where a mask is true and nothing where it is not."""
    dispatch, mask = attention_backends.dispatch_attention_fn, torch.arange(4)[None, None, None] < 2
    misread = lambda q, k, v, mask, **kwargs: dispatch(q, k, v, mask.to(q.dtype), **kwargs)  # noqa: E731
    monkeypatch.setattr(attention_backends, "dispatch_attention_fn", misread)
    with pytest.raises(RuntimeError, match=r"its result is off by 0\.\d+ with a mask"):
        check("math", AttentionCall(6, 4, 2, 8, True, mask), 2, torch.float32, CPU)


def test_a_wrong_result_is_not_used(monkeypatch):
    dispatch = attention_backends.dispatch_attention_fn
    monkeypatch.setattr(attention_backends, "dispatch_attention_fn", lambda *args, **kwargs: 1.01 * dispatch(*args, **kwargs))
    with pytest.raises(RuntimeError, match="its result is off by 0.01"):
        check("math", AttentionCall(16, 5, 2, 8), 2, torch.float32, CPU)


@pytest.mark.parametrize("backend", ["xformers", "flash_attn", "flash_attn_3", "cudnn", "efficient", "flex"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they can run")
def test_what_needs_a_gpu_is_an_error_before_the_model_is_loaded(options, backend, monkeypatch):
    """Whether its package is installed or not."""
    config = parse(options(attention__backend=backend)).replace(model__path="hub/unread")
    family = FAMILIES["StableDiffusionPipeline"]
    unread = SimpleNamespace(
        family=family, scheduler=DDIMScheduler(**SD_BETAS), check_networks=lambda asked: None, check_call=lambda *args: None
    )  # and no weights
    monkeypatch.setattr(assemble, "find", lambda config: unread)
    line = f"attention.backend={backend}: it cannot run here: it needs a GPU, and this run is on a CPU; valid is auto or sdpa"
    with pytest.raises(ValueError, match=f"^{line}$"):
        assemble.assemble(config)


def test_what_a_cpu_runs_is_not_refused():
    for backend in ON_CPU:
        require(backend, CPU)


CANNOT_LOAD = "raise ImportError('flash_attn_2_cuda.so:\\n undefined symbol: _ZN3c104cuda9SetDeviceEi')"
CPP_LIB = """
import logging
_cpp_library_load_exception = {0}
if _cpp_library_load_exception: logging.getLogger("xformers").warning("WARNING[XFORMERS]: %s", _cpp_library_load_exception)
"""


@pytest.mark.parametrize(
    "backend, files, reason",
    [
        ("xformers", {}, "the package xformers is not installed"),
        ("flash_attn", {}, "the package flash_attn is not installed"),
        ("flash_attn_3", {}, "the package flash_attn_interface is not installed"),
        ("flash_attn", {"flash_attn.py": CANNOT_LOAD}, "the package flash_attn does not load in PyTorch {}: flash_attn_2_cuda.so: undef"),
        (
            "flash_attn_3",
            {"flash_attn_interface.py": "import x_"},
            "the package flash_attn_interface does not load in PyTorch {}: No module",
        ),
        ("flash_attn", {"flash_attn.py": ""}, None),
        ("xformers", {"xformers/__init__.py": "from . import _cpp_lib", "xformers/_cpp_lib.py": CPP_LIB.format(None)}, None),
        (
            "xformers",
            {"xformers/__init__.py": "from . import _cpp_lib", "xformers/_cpp_lib.py": CPP_LIB.format("OSError('built for\\n  2.10')")},
            "the package xformers does not load in PyTorch {}: built for 2.10",
        ),
        (
            "xformers",
            {"xformers/__init__.py": "raise ImportError('Requires Flash-Attention version >=2.7.1')"},
            "the package xformers does not load in PyTorch {}: Requires Flash-Attention version >=2.7.1",
        ),
        ("flash_attn", {"flash_attn.py": "raise ImportError"}, "the package flash_attn does not load in PyTorch {}: ImportError"),
    ],
)
def test_a_package_that_cannot_be_used_is_an_error_with_the_reason(tmp_path, monkeypatch, caplog, backend, files, reason):
    """Stand-ins for packages that are missing, work, or were built for another PyTorch; their own warnings are not passed on."""
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    packages = tuple(PACKAGES.values())
    with mock.patch.dict(sys.modules):  # restores them all
        for name in [name for name in sys.modules if name.split(".")[0] in packages]:
            del sys.modules[name]
        if not files:
            sys.modules[PACKAGES[backend]] = None  # as good as not installed
        if reason is None:
            require(backend, torch.device("cuda"))
        else:
            line = f"attention.backend={backend}: it cannot run here: {reason.format(torch.__version__)}"
            with pytest.raises(ValueError, match=f"^{re.escape(line)}.*; valid is auto or sdpa$"):
                require(backend, torch.device("cuda"))
    assert caplog.records == []


def test_a_kernel_that_refuses_the_shapes_is_an_error_with_them(policy, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("No operator found\n  for `memory_efficient_attention_forward`")

    monkeypatch.setattr(attention_backends, "dispatch_attention_fn", refuse)
    reason = r"it refuses \d+ queries, \d+ keys, 2 heads of \d+ channels, float32: No operator found for"
    with pytest.raises(ValueError, match=f"attention.backend=flash: it cannot run here: {reason} .*; valid is auto or sdpa"):
        resolve("flash", policy.network, lambda: policy.example_call(2), 4, torch.float32, CPU)


def test_attention_that_calls_neither_pytorch_s_nor_the_dispatcher_s_is_refused(policy):
    policy.network.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="attention.backend=math: this model has no attention that can be replaced; valid is sdpa"):
        set_attention(policy.network, "math")
    assert resolve("auto", policy.network, lambda: policy.example_call(2), 4, torch.float32, torch.device("cuda")) == ("sdpa", "")


def test_a_run_uses_it_and_keeps_it(options):
    """auto is sdpa on a CPU; config.yaml has what was used, and resuming may not change it."""
    argv = options(run__iterations=1)
    folder = run([*argv, "--attention.backend=math"])
    assert parse(["--config", str(folder / "config.yaml"), "--run.dir=other"]).attention.backend == "math"
    assert parse(["--run.dir", str(folder), "--resume"]).attention.backend == "math"
    with pytest.raises(ValueError, match="attention.backend=sdpa: the run in .* began with math; --resume keeps it"):
        parse(["--run.dir", str(folder), "--resume", "--attention.backend=sdpa"])
    row = untimed(read_metrics(folder))[-1]
    assert row["ratio_error"] <= bounds.of_run(folder).ratio and row["grad_norm"] > 0
