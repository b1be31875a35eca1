"""Training through transformers and peft minimises what we minimise, and merges back."""

import copy

import pytest
import torch
from PIL import Image

import cobra
from cobra.checkpoint import named_tensors
from cobra.prompt import IGNORE, Turn
from tests.tolerance import assert_close

transformers = pytest.importorskip("transformers")
import cobra.hf  # noqa: E402 (registers the classes)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "model"
    cobra.save(cobra.build("hybrid-tiny", seed=2), path)
    return path


@pytest.fixture
def theirs(path):
    return transformers.AutoModelForImageTextToText.from_pretrained(path).train()


@pytest.fixture(scope="module")
def batch(path):
    own = cobra.load(path, dtype="float32")
    red = Image.new("RGB", (30, 30), "red")
    rows = [[Turn("user", "<image>\nColour?"), Turn("assistant", "red")], [Turn("user", "x"), Turn("assistant", "yes")]]
    made = own.processor(text=rows, images=[[red], []], padding_side="right")
    labels = torch.full_like(made["input_ids"], IGNORE)
    for row, (turns, count) in enumerate(zip(rows, (1, 0), strict=True)):
        rendered = own.processor.render(turns, count)
        labels[row, : len(rendered.labels)] = torch.tensor(rendered.labels)
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
    return {name: made[name] for name in names} | {"labels": labels}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_are_ours(path, theirs, batch):
    own = cobra.load(path, dtype="float32").train()
    total, count = own.loss(batch)
    (total / count).backward()
    output = theirs(**batch)
    output.loss.backward()
    assert output.past_key_values is None  # in training there is nothing to go on from
    assert_close("loss", output.loss, total / count)
    found = gradients(theirs.model)
    assert found.keys() == gradients(own).keys()
    for name, expected in gradients(own).items():
        assert_close(name, found[name], expected, 1e-4)  # through all layers and back
    assert_close("sum", theirs(**batch, num_items_in_batch=7).loss, total / 7)


def test_checkpointing_changes_no_gradient(theirs, batch):
    theirs(**batch).loss.backward()
    expected = gradients(theirs)
    theirs.zero_grad()
    theirs.gradient_checkpointing_enable()
    assert theirs.model.lm.recompute_layers and theirs.is_gradient_checkpointing
    theirs(**batch).loss.backward()
    for name, gradient in gradients(theirs).items():
        assert torch.equal(gradient, expected[name]), name
    theirs.gradient_checkpointing_disable()
    assert not theirs.model.lm.recompute_layers


def test_a_trainer_goes_on_from_its_checkpoint(path, batch, tmp_path):
    """Weights, optimizer and learning rate: the third step is the same, stopped after the second or not."""
    pytest.importorskip("accelerate")
    weights = []
    for folder, stops in (("whole", [3]), ("parts", [2, 3])):
        for max_steps in stops:
            model = transformers.AutoModelForImageTextToText.from_pretrained(path)
            arguments = transformers.TrainingArguments(
                str(tmp_path / folder), max_steps=max_steps, save_steps=1, learning_rate=1e-3, report_to=[],
                lr_scheduler_type="constant", remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
            )  # fmt: skip
            trainer = transformers.Trainer(
                model=model, args=arguments, train_dataset=[0] * 8, data_collator=lambda rows: dict(batch)
            )
            trainer.train(resume_from_checkpoint=max_steps != stops[0])
        weights.append(named_tensors(model.model))
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name
    own = cobra.load(tmp_path / "parts" / "checkpoint-3", dtype="float32")
    assert torch.equal(own.lm.embedding.weight, weights[1]["lm.embedding.weight"])


def test_new_models_begin_as_build_makes_them():
    config = cobra.hf.CobraVLMConfig.of(cobra.PRESETS["tiny"])
    torch.manual_seed(5)
    theirs = transformers.AutoModelForImageTextToText.from_config(config)
    own = cobra.build("tiny", seed=5)
    for name, tensor in named_tensors(own).items():
        assert torch.equal(theirs.get_parameter(f"model.{name}"), tensor), name


def test_a_model_in_memory_is_shared():
    own = cobra.build("tiny")
    theirs = cobra.hf.CobraForConditionalGeneration.of(own)
    assert theirs.model is own and not theirs.training
    assert theirs.get_output_embeddings().weight is own.lm.embedding.weight
    ids = torch.tensor([own.tokenizer.encode("What?")])
    found = theirs.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(found[:, ids.shape[1] :], own.generate(ids, max_new_tokens=3))


def test_lora_learns_and_merges_back(theirs, batch, tmp_path):
    peft = pytest.importorskip("peft")
    before = copy.deepcopy(theirs.state_dict())
    prompt = {"inputs": batch["input_ids"][1:, :4], "max_new_tokens": 6, "do_sample": False}
    plain = theirs.eval().generate(**prompt)  # compiles the decoder, which knows of no adapters
    theirs.train()
    config = peft.LoraConfig(r=4, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    model = peft.get_peft_model(theirs, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    mixers = [name for name, _ in theirs.named_modules() if name.endswith(("in_proj", "out_proj"))]
    assert mixers and len(trained) == 2 * len(mixers)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    first = model(**batch).loss
    first.backward()
    # Every adapter is on the way of the gradient: no kernel goes around it.
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(**batch)
        written = model.generate(**prompt)
    assert after.loss < first
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert_close("logits", merged(**batch).logits, after.logits)
    assert torch.equal(merged.generate(**prompt), written) and not torch.equal(written, plain)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in mixers}
    merged.save_pretrained(tmp_path / "merged")
    own = cobra.load(tmp_path / "merged", dtype="float32")
    for name, tensor in named_tensors(own).items():
        assert torch.equal(tensor, merged.get_parameter(f"model.{name}")), name
