"""The trainers' own options over both forms, in the environment of `make test-ecosystem`."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import F32, assert_close, assert_identical
from torch import nn

import consequentialism as cw

pytestmark = pytest.mark.ecosystem
EXAMPLES = Path(__file__).parent.parent / "examples"
FORMS = ("convert", "emended")
STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
}


def fit(form: str, folder: Path, resume: bool = False, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A tiny GPT-2 without dropout after some of the Trainer's steps."""
    transformers = pytest.importorskip("transformers")
    example = runpy.run_path(str(EXAMPLES / "hf_trainer.py"))
    if model is None:
        model = network()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    if form == "convert":
        cw.convert(model, filter_fn=lambda module, name: name.startswith("transformer.h."))
    else:
        optimizer = cw.optim.Emended(optimizer, model, refresh_every=2)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    data = example["Windows"](str(EXAMPLES / "hf_trainer.py"), 32)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume or None)
    return model


def network() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0, use_cache=False)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("option", OPTIONS)
def test_trainer_option(form: str, option: str, tmp_path: Path) -> None:
    """An option that changes no arithmetic changes no step; bfloat16 trains as far."""
    same = form == "emended" or option != "accumulation"  # a convert's Grams are those of each micro-batch
    own = fit(form, tmp_path, **OPTIONS[option])
    plain = fit(form, tmp_path)
    start = network()
    moved = 0.0
    for (name, parameter), expected, begin in zip(
        own.named_parameters(), plain.parameters(), start.parameters(), strict=True
    ):
        assert parameter.dtype == F32
        assert parameter.isfinite().all()
        change, other = parameter.detach() - begin, expected.detach() - begin
        moved += change.norm().item()
        if same and option != "bf16":
            assert (change - other).abs().max() < 2e-4, name
    assert moved > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_trainer_resumes_bit_for_bit(form: str, tmp_path: Path) -> None:
    whole = fit(form, tmp_path / "whole", save_strategy="steps", save_steps=3)
    resumed = fit(form, tmp_path / "whole", model=_loaded(tmp_path / "whole" / "checkpoint-3"), resume=True)
    for (name, parameter), expected in zip(resumed.named_parameters(), whole.named_parameters(), strict=True):
        assert_identical(name, parameter.detach(), expected[1].detach())


def _loaded(path: Path) -> nn.Module:
    for later in path.parent.glob("checkpoint-*"):
        if later != path:
            later.rename(later.with_name("later"))
    return network()


def test_saved_model_is_a_plain_one(tmp_path: Path) -> None:
    """`save_pretrained` writes safetensors with the plain names, whatever was converted."""
    model = fit("convert", tmp_path)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(network()).from_pretrained(tmp_path / "saved")
    for (name, parameter), own in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert_identical(name, parameter.detach(), own.detach())
    assert not any("consequentialism" in type(m).__module__ for m in loaded.modules())


def test_lora_gradients_are_those_of_its_own_layers() -> None:
    """In both orders an adapter's gradient is the emended one of its input, and merging gives the same model."""
    pytest.importorskip("peft")
    example = runpy.run_path(str(EXAMPLES / "peft_lora.py"))
    found = []
    for order in ("convert, then adapters", "adapters, then convert"):
        torch.manual_seed(0)
        model, _ = example["build"](order)
        model.eval()
        rows = torch.arange(64).view(2, 32)
        model(input_ids=rows, labels=rows).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 4
    for name, gradient in found[0].items():
        assert_close(name, gradient, found[1][name], 1e-6)
    assert any(gradient.abs().max() > 0 for gradient in found[0].values())


def test_timm_models_keep_their_names_and_outputs() -> None:
    timm = pytest.importorskip("timm")
    for name in ("resnet18", "vit_tiny_patch16_224", "convnext_atto"):
        sizes = runpy.run_path(str(EXAMPLES / "timm_models.py"))["SMALL"][name]
        model = timm.create_model(name, pretrained=False, num_classes=4, **sizes).eval()
        twin = copy.deepcopy(model)
        cw.convert(model)
        emended = [m for m in model.modules() if type(m).__module__.startswith("consequentialism")]
        plain = [m for m in twin.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        assert len(emended) == len(plain), name
        x = torch.randn(2, 3, 32, 32)
        assert_identical(name, model(x).detach(), twin(x).detach())
        assert list(model.state_dict()) == list(twin.state_dict())


def small(form: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 16), nn.ReLU())
    model.append(nn.Linear(16, 3))
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if form == "emended":
        return model, cw.optim.Emended(inner, model, refresh_every=2)
    return cw.convert(model), inner


def images() -> torch.utils.data.DataLoader[Any]:
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(32) % 3), 4)


def assert_same_weights(model: nn.Module, expected: list[torch.Tensor]) -> None:
    for i, (parameter, other) in enumerate(zip(model.parameters(), expected, strict=True)):
        assert_identical(str(i), parameter.detach(), other)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_accelerate_accumulates_clips_and_resumes(form: str, mixed_precision: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed_precision)
    model, optimizer, data = accelerator.prepare(*small(form), images())

    def epoch() -> list[torch.Tensor]:
        for x, target in data:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), target))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in model.parameters()]

    epoch()
    accelerator.save_state(str(tmp_path))
    expected = epoch()
    accelerator.load_state(str(tmp_path))
    epoch()
    assert_same_weights(model, expected)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_lightning_accumulates_clips_and_resumes(form: str, manual: bool, tmp_path: Path) -> None:
    """By its own loop, and with manual optimization."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.model, self.own = small(form)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 1.0, "norm")
                optimizer.step()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.own

    def fitted(epochs: int, checkpoint: str | None = None) -> tuple[nn.Module, Any]:
        options: dict[str, Any] = {} if manual else {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", default_root_dir=str(tmp_path), **quiet, **options
        )
        module = Module()
        trainer.fit(module, images(), ckpt_path=checkpoint, weights_only=False)
        return module, trainer

    whole, _ = fitted(4)
    _, trainer = fitted(2)
    trainer.save_checkpoint(str(tmp_path / "half.ckpt"))
    resumed, _ = fitted(4, str(tmp_path / "half.ckpt"))
    assert_same_weights(resumed, [parameter.detach() for parameter in whole.parameters()])


@pytest.mark.parametrize("reverted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_onnx_has_torchs_own_operators(form: str, reverted: bool) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(400, 10)
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 8, 8)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if form == "convert":
        cw.convert(model)
    else:
        optimizer = cw.optim.Emended(optimizer, model)
    model(x).square().mean().backward()
    optimizer.step()
    if reverted:
        cw.revert(model)
    model.eval()
    with torch.no_grad():
        program = torch.onnx.export(model, (x,), verbose=False)
        expected = model(x)
    exported = program.model_proto
    onnx.checker.check_model(exported)
    assert {node.op_type for node in exported.graph.node} == {"Conv", "Relu", "ConvTranspose", "Reshape", "Gemm"}
    (y,) = reference.ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: x.numpy()})
    assert_close("y", torch.from_numpy(y), expected, 1e-5)
