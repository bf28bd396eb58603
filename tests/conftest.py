"""Settings of every test, fixtures that several files share, and how far a long run of tests is.

    NANORLHF_TEST_GPU=1 pytest      the tests marked `gpu`, on the GPU; without it no test sees a GPU
"""

import os

TEST_GPU = os.environ.get("NANORLHF_TEST_GPU") == "1"
if not TEST_GPU:  # set before torch is imported; processes that a test starts inherit it
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # somebody may be training there, and the numbers are the CPU's

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from nanorlhf.look import plots  # noqa: E402

if not TEST_GPU:
    torch.backends.mps.is_available = lambda: False  # a Mac's GPU; no variable of the environment hides it
    os.environ["TRITON_INTERPRET"] = "1"  # the very kernels that run on a GPU, in Python; read when imported
hypothesis.settings.register_profile("course", derandomize=True)  # in class, every run is the same run
hypothesis.settings.load_profile("course")
torch.set_num_threads(1)  # the models are tiny: a second thread only waits


def pytest_collection_modifyitems(config, items):
    """With NANORLHF_TEST_GPU=1 only the tests marked `gpu` run: the others hold numbers of the CPU."""
    if not TEST_GPU:
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("NANORLHF_TEST_GPU=1, but this torch sees no GPU")
    others = [item for item in items if item.get_closest_marker("gpu") is None]
    items[:] = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=others)


@pytest.fixture
def no_curves(monkeypatch):
    """curves.png is not drawn: it takes longer than a tiny run."""
    monkeypatch.setattr(plots, "pyplot", lambda: None)


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """Data files, and an SFT and a reward model made of them; stages.config gives runs of 50 ms."""
    from stages import Stages

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plots, "pyplot", lambda: None)
        return Stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def at_step(monkeypatch):
    """at_step(k, action): call action once in step k, between gradients and update; returns an undo."""
    from nanorlhf.run.checkpoint import (
        Run,  # only now: the environment above is read when kernels are imported
    )

    def install(k, action):
        check, todo = Run.check, [action]

        def check_and_act(run, step, *args):
            if step == k and todo:
                todo.pop()()
            return check(run, step, *args)

        monkeypatch.setattr(Run, "check", check_and_act)
        return lambda: monkeypatch.setattr(Run, "check", check)

    return install


@pytest.fixture
def gradients(monkeypatch):
    """What reaches the optimizer before it is clipped: one list of gradients a step."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def record(parameters, max_norm):
        parameters = list(parameters)
        seen.append([p.grad.clone() for p in parameters])
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    return seen


@pytest.fixture
def spy(monkeypatch):
    """spy(module, name): from now on its calls are recorded in the list returned, as (arguments, result)."""

    def watch(where, name):
        calls, real = [], getattr(where, name)

        def wrapper(*args, **kw):
            out = real(*args, **kw)
            calls.append((args, out))
            return out

        monkeypatch.setattr(where, name, wrapper)
        return calls

    return watch
