"""torch.compile of the blocks: the same training, one graph for all blocks and micro-batches, the same names; clear refusals."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.checkpoint import FileSystemReader

from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.model.decoder import Decoder
from metareward.training import compiled, sharded
from metareward.training.examples import Example
from metareward.training.packing import pack
from metareward.training.sharded import load_sharded, reshard
from metareward.training.step import hidden_states

CPU = torch.device("cpu")
# Of a block: queries, keys, values, output, gate, up, down.
PRODUCTS = 7
Models = dict[str, tuple[Any, Path]]
MakeExamples = Callable[..., list[Example]]
MakeSettings = Callable[..., TrainSettings]
WITHOUT_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Every test begins without the graphs of the others."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiler() -> Iterator[None]:
    # Processes to compile in take longer to start than these models to compile.
    with inductor.patch(compile_threads=1):
        problem = compiled.compiler_problem("cpu")
        if problem is not None:
            pytest.skip(f"torch.compile does not work here: {problem}")
        yield


@dataclass
class Graphs:
    """A backend that compiles nothing: it keeps what torch.compile would hand on, after the cut into forward and backward."""

    forward: list[Counter[str]] = field(default_factory=list)
    backward: list[Counter[str]] = field(default_factory=list)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def keep(kept: list[Counter[str]]) -> Callable[..., Any]:
            def take(module: torch.fx.GraphModule, _: Any) -> Any:
                kept.append(
                    Counter(
                        str(node.target)
                        for node in module.graph.nodes
                        if node.op == "call_function" and node.target is not operator.getitem
                    )
                )
                return make_boxed_func(module.forward)

            return take

        backend = aot_autograd(
            fw_compiler=keep(self.forward),
            bw_compiler=keep(self.backward),
            inference_compiler=keep(self.forward),
            partition_fn=min_cut_rematerialization_partition,
        )
        return backend(graph, inputs)


def load(folder: Path, settings: TrainSettings, graphs: Graphs | None) -> Decoder:
    """The decoder, uncompiled or with `graphs` in the compiler's place."""
    decoder = load_sharded(folder, settings, CPU, 1, (0, 1))
    if graphs is not None:
        compiled.compile_blocks(decoder, graphs)
    return decoder


def gradients(decoder: Decoder, examples: list[Example]) -> dict[str, Tensor]:
    """Of the sum of squares of the hidden states."""
    decoder.zero_grad()
    hidden_states(decoder, pack(examples, CPU)).square().sum().backward()
    return {
        name: parameter.grad.full_tensor()
        for name, parameter in decoder.named_parameters()
        if parameter.grad is not None
    }


def check_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()), msg=name
        )


def test_one_graph_for_all_blocks_and_sizes(
    models: Models, make_settings: MakeSettings, make_examples: MakeExamples
) -> None:
    family = "llama-tied"
    graphs, settings = Graphs(), make_settings(activation_checkpointing="selective")
    ours, plain = load(models[family][1], settings, graphs), load(models[family][1], settings, None)
    examples = make_examples(7)
    # From many segments to one.
    sizes = [examples, examples[:2], examples[2:3], examples[:5], make_examples(1, completions=1)]
    for part in sizes:
        check_gradients(gradients(ours, part), gradients(plain, part))
    assert len({pack(part, CPU).tokens for part in sizes}) == len(sizes)
    assert (len(graphs.forward), len(graphs.backward)) == (1, 1)
    # A pass without gradients has a graph of its own.
    with torch.no_grad():
        for part in sizes:
            found, wanted = (hidden_states(decoder, pack(part, CPU)) for decoder in (ours, plain))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (len(graphs.forward), len(graphs.backward)) == (2, 1)
    reshard(ours)
    # The next iteration's model is another one of the same kind.
    gradients(load(models[family][1], settings, None), examples)
    again = load(models[family][1], settings, None)
    again.compiled_block = ours.compiled_block
    gradients(again, examples)
    assert (len(graphs.forward), len(graphs.backward)) == (2, 1)


def test_a_model_of_another_kind_is_compiled_anew(
    models: Models, make_settings: MakeSettings, make_examples: MakeExamples
) -> None:
    """The two have residual streams of one width; only one of them has norms of queries and keys."""
    graphs, settings, examples = Graphs(), make_settings(), make_examples(4)
    first = load(models["llama-tied"][1], settings, graphs)
    for family in ("llama-tied", "qwen3"):
        ours, plain = load(models[family][1], settings, None), load(models[family][1], settings, None)
        ours.compiled_block = first.compiled_block
        check_gradients(gradients(ours, examples), gradients(plain, examples))
    assert len(graphs.forward) == 2


@pytest.mark.parametrize(("mode", "again", "attention"), [("selective", 0, 0), ("full", PRODUCTS - 1, 1)])
def test_checkpointing_is_in_the_graph(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    mode: str,
    again: int,
    attention: int,
) -> None:
    """What the backward graph computes again is what the uncompiled block does (test_recompute.py)."""
    graphs = Graphs()
    decoder = load(models["qwen3"][1], make_settings(activation_checkpointing=mode), graphs)
    gradients(decoder, make_examples(3))
    (forward,), (backward,) = graphs.forward, graphs.backward
    assert forward["aten.mm.default"] == PRODUCTS
    assert forward["metareward.traced_segment_attention.default"] == 1
    assert backward["aten.mm.default"] == 2 * PRODUCTS + again
    assert backward["metareward.traced_segment_attention.default"] == attention
    assert backward["metareward.traced_segment_attention_backward.default"] == 1


@WITHOUT_PEFT
def test_adapters_are_compiled_too(
    models: Models, make_settings: MakeSettings, make_examples: MakeExamples
) -> None:
    graphs = Graphs()
    settings = make_settings(lora_rank=4, activation_checkpointing="selective")
    ours, plain = (load(models["qwen3"][1], settings, kept) for kept in (graphs, None))
    with torch.no_grad():
        for decoder in (ours, plain):
            for name, parameter in decoder.named_parameters():
                if ".lora_B." in name:
                    # At zero an adapter's A has no gradient.
                    parameter.to_local().copy_(
                        torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter)
                    )
    for part in (make_examples(5), make_examples(2)):
        found = gradients(ours, part)
        assert all(".lora_" in name for name in found)
        check_gradients(found, gradients(plain, part))
    # The first block's input is a frozen embedding, which has no gradient.
    assert len(graphs.forward) == 2


def test_the_path_without_the_compiled_library(
    models: Models, make_settings: MakeSettings, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention in PyTorch, as on a GPU: it differentiates inside the op."""
    monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    graphs, settings = Graphs(), make_settings()
    ours, plain = (load(models["llama-tied"][1], settings, kept) for kept in (graphs, None))
    for part in (make_examples(5), make_examples(2)):
        check_gradients(gradients(ours, part), gradients(plain, part))
    assert len(graphs.forward) == 1


@pytest.mark.parametrize(
    ("family", "mode", "backend"),
    [("qwen3", "none", "cut"), ("llama-tied", "selective", "inductor"), ("qwen3", "full", "cut")],
)
def test_three_steps_equal_the_uncompiled(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    compiler: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    mode: str,
    backend: str,
) -> None:
    """Reference log-probs, figures of every step, weights; stopped and gone on with, and under the names of the uncompiled. Once
    through the real compiler, else through its cut into forward and backward."""
    graphs = Graphs()
    if backend == "cut":
        monkeypatch.setattr(sharded, "compile_blocks", partial(compiled.compile_blocks, backend=graphs))
    settings = make_settings(
        batch_pairs=2,
        epochs=1,
        micro_batch_tokens=60,
        activation_checkpointing=mode,
        checkpoint_steps=2,
        async_checkpoints=False,
    )
    job = worker.Job(models[family][1], make_examples(6), settings, tmp_path / "plain")
    plain = worker.run(replace(job, stop_after=2))
    ours = replace(job, settings=replace(settings, compile=True), checkpoints=tmp_path / "compiled")
    stopped = worker.run(replace(ours, stop_after=2))
    assert names_in(tmp_path / "compiled") == names_in(tmp_path / "plain")
    assert [figures["step"] for figures in stopped.steps] == [1, 2]
    assert stopped.steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    worker.check_equal(vars(stopped), plain)
    for identity, values in plain.reference.items():
        assert stopped.reference[identity] == pytest.approx(values, rel=1e-5)
    plain = worker.run(replace(job, checkpoints=tmp_path / "undisturbed"))
    # The checkpoint of either goes on as the other.
    resumed = worker.run(ours)
    assert [figures["step"] for figures in resumed.steps] == [3]
    worker.check_equal(vars(resumed), plain)
    crossed = worker.run(replace(job, checkpoints=tmp_path / "compiled"))
    worker.check_equal(vars(crossed), plain)
    # Without gradients and with them, for all micro-batches of two loaded models.
    assert (len(graphs.forward), len(graphs.backward)) == ((2, 1) if backend == "cut" else (0, 0))


@pytest.mark.slow
def test_two_ranks_equal_one(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    compiler: None,
    tmp_path: Path,
) -> None:
    """Really sharded, and with unequal numbers of micro-batches."""
    settings = make_settings(batch_pairs=6, epochs=1, micro_batch_tokens=40, activation_checkpointing="full")
    job = {"model": models["qwen3"][1], "examples": make_examples(9), "settings": settings}
    wanted = worker.run(worker.Job(**job, checkpoints=tmp_path / "one"))
    job |= {"settings": replace(settings, compile=True), "checkpoints": tmp_path / "two"}
    for outcome in worker.run_ranks({"compiled": job}, tmp_path, 2)["compiled"]:
        assert not outcome["error"]
        worker.check_equal(outcome, wanted)


def names_in(checkpoints: Path) -> set[str]:
    (folder,) = (path for path in checkpoints.iterdir() if path.is_dir())
    return set(FileSystemReader(folder).read_metadata().state_dict_metadata)


def test_no_compiler_is_said_before_the_work(
    models: Models, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.cpp_builder import cpp_compiler_search
    from torch._inductor.utils import fresh_cache

    settings = make_settings(compile=True)
    compiled.compiler_problem.cache_clear()
    cpp_compiler_search.cache_clear()
    try:
        with fresh_cache(), inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
            sentence = (
                r"train\.compile = true, but torch\.compile does not work on this cpu \(InvalidCxxCompiler: .*\): install a C\+\+ "
                r"compiler \(g\+\+\), or set it to false"
            )
            with pytest.raises(UserError, match=sentence):
                compiled.check_compiler(settings, CPU)
            with pytest.raises(UserError, match=sentence):
                load_sharded(models["qwen3"][1], settings, CPU, 1)
            compiled.check_compiler(replace(settings, compile=False), CPU)
    finally:
        compiled.compiler_problem.cache_clear()
        cpp_compiler_search.cache_clear()


def test_a_block_that_cannot_be_compiled_is_a_user_error(
    models: Models, make_settings: MakeSettings, make_examples: MakeExamples
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise NotImplementedError("no such lowering")

    settings = make_settings(compile=True)
    decoder = load_sharded(models["qwen3"][1], replace(settings, compile=False), CPU, 1)
    compiled.compile_blocks(decoder, broken)
    with (
        pytest.raises(
            UserError, match=r"\(NotImplementedError: no such lowering\): set train\.compile = false"
        ),
        compiled.naming_compiler_failures(settings),
    ):
        gradients(decoder, make_examples(2))
