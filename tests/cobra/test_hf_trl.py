"""trl's trainers minimise what we minimise, on images, with adapters or without."""

import math
from pathlib import Path

import pytest
import torch

import cobra
from cobra.image import ImageConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from cobra.lm.stack import LMConfig
from cobra.processor import pad
from cobra.prompt import IGNORE, Turn
from tests.cobra import test_tiles
from tests.cobra.test_tiles import picture
from tests.tolerance import assert_close
from vision_scan.errors import UserError

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
import cobra.hf  # noqa: E402 (registers the classes)

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURES = [picture(20, 44, 1), picture(30, 18, 2), picture(16, 16, 3), picture(40, 30, 4)]
# Rows in LLaVA's form: images of several sizes, none, two between words; one exchange and two.
ROWS = [
    {"image": "0.png", "said": ["<image>\nColour?", "red", "And now?", "still red"]},
    {"image": [], "said": ["Hello, who is there?", "a"]},
    {"image": ["1.png", "2.png"], "said": ["Is <image> like <image>?", "no, it is not"]},
    {"image": "3.png", "said": ["<image>\nWhat?", "x"]},
]
ADAPTERS = {"r": 4, "target_modules": ["in_proj", "out_proj", "q_proj", "proj"]}
HYBRID = (
    Mamba2Config(d_state=4, headdim=4, chunk_size=8),
    AttentionConfig(num_heads=2, num_kv_heads=1, headdim=4),
    MLPConfig(d_ff=16),
)
CONFIGS = {
    "tiles": test_tiles.config(),  # of an image as many as its size asks for
    "hybrid": test_tiles.config(
        image=ImageConfig(height=16, width=16), lm=LMConfig(d_model=8, vocab_size=300, layers=HYBRID)
    ),
}


def llava(row):
    """A row as it stands in a file."""
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(row["said"])]
    return {"image": row["image"], "conversations": turns}


def rivals(row):
    """A row of preferences: the last answer, and another."""
    whole = llava(row)
    last = whole["conversations"].pop()
    return {**whole, "chosen": last, "rejected": f"{last['value'][::-1]}, or not at all"}


@pytest.fixture(scope="module", params=CONFIGS)
def path(request, tmp_path_factory, one_thread):
    """A model directory, beside pictures."""
    folder = tmp_path_factory.mktemp(request.param)
    cobra.save(cobra.build(CONFIGS[request.param], seed=2), folder / "model")
    for number, image in enumerate(PICTURES):
        image.save(folder / f"{number}.png")
    return folder / "model"


def load(path, **options):
    return transformers.AutoModelForImageTextToText.from_pretrained(path, dtype="float32", **options)


def table(path, rows):
    return datasets.Dataset.from_list([cobra.hf.to_trl(row, path.parent) for row in rows])


def arguments(kind, folder, **options):
    settings = {
        "per_device_train_batch_size": len(ROWS), "max_steps": 4, "learning_rate": 3e-3, "bf16": False,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True,
    }  # fmt: skip
    return kind(str(folder), **{**settings, **options})


def train(trainer):
    """What was logged of each step."""
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


def turns_of(row):
    return [Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(row["said"])]


def batch_of(own, rows, folder, learns_all=False):
    """Rows as our own training makes a batch of them."""
    names = [[row["image"]] if isinstance(row["image"], str) else row["image"] for row in rows]
    rendered, tiles = own.processor.rows([turns_of(row) for row in rows], [[folder / n for n in one] for one in names])
    ids, _ = pad([row.input_ids for row in rendered], own.tokenizer.pad_id, "right")
    labels, _ = pad([row.input_ids if learns_all else row.labels for row in rendered], IGNORE, "right")
    return {"input_ids": ids, "labels": labels, **own.processor.stack(tiles)}


ON_IMAGES = pytest.mark.skipif(
    tuple(map(int, trl.__version__.split(".")[:2])) < (1, 16), reason="learns answers alone without images only"
)


@pytest.mark.parametrize("learns", ["all", pytest.param("answers", marks=ON_IMAGES)])
@pytest.mark.parametrize("adapters", [None, {}, {"task_type": "CAUSAL_LM"}], ids=["whole", "lora", "lora of a task"])
def test_sft_minimises_our_loss(path, tmp_path, learns, adapters):
    trainer = trl.SFTTrainer(
        model=load(path),
        args=arguments(trl.SFTConfig, tmp_path, assistant_only_loss=learns == "answers"),
        train_dataset=table(path, map(llava, ROWS)),
        processing_class=transformers.AutoProcessor.from_pretrained(path),
        peft_config=None if adapters is None else peft.LoraConfig(**ADAPTERS, **adapters),
    )
    own = cobra.load(path, dtype="float32").train()
    batch = batch_of(own, ROWS, path.parent, learns == "all")
    total, count = own.loss(batch)
    records = train(trainer)
    assert math.isclose(records[0]["loss"], (total / count).item(), rel_tol=1e-4)
    assert records[-1]["loss"] < records[0]["loss"]

    out = tmp_path / "out"
    trainer.save_model(out)
    learned = trainer.model if adapters is None else trainer.model.get_base_model()
    after, _ = learned.model.train().loss(batch)
    assert after < total
    if adapters is None:
        again = [cobra.load(out, dtype="float32")]
    else:
        again = [peft.PeftModel.from_pretrained(load(path), out).get_base_model().model]
    if adapters == {}:  # one of a task is for models of transformers alone
        again.append(peft.PeftModel.from_pretrained(own, out).get_base_model())
    for model in again:
        assert_close("loss", model.train().loss(batch)[0], after)


def log_probability(own, row, answer, folder):
    """Of an answer to the last question of a row, alone."""
    asked = {**row, "said": [*row["said"][:-1], answer]}
    batch = batch_of(own, [asked], folder)
    end = len(own.tokenizer.encode(answer)) + 1
    batch["labels"][:, :-end] = IGNORE  # earlier answers
    return -own.loss(batch)[0].item()


@pytest.mark.parametrize("reference", ["adapters off", "another model", "the directory"])
def test_dpo_prefers_what_was_chosen(path, tmp_path, reference):
    pairs = [rivals(row) for row in ROWS]
    trainer = trl.DPOTrainer(
        model=load(path),
        ref_model=load(path) if reference == "another model" else None,
        args=arguments(trl.DPOConfig, tmp_path, beta=0.1),
        train_dataset=table(path, pairs),
        processing_class=transformers.AutoProcessor.from_pretrained(path),
        peft_config=peft.LoraConfig(**ADAPTERS) if reference == "adapters off" else None,
    )
    assert (trainer.ref_model is None) == (reference == "adapters off")
    own = cobra.load(path, dtype="float32")
    answers = {"chosen": [pair["chosen"]["value"] for pair in pairs], "rejected": [pair["rejected"] for pair in pairs]}
    with torch.no_grad():
        inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])
        found = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs))
        expected = [
            log_probability(own, row, answer, path.parent)
            for name in ("chosen", "rejected")
            for row, answer in zip(ROWS, answers[name], strict=True)
        ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    records = train(trainer)
    assert math.isclose(records[0]["loss"], math.log(2), rel_tol=1e-5)
    assert math.isclose(records[0]["logps/chosen"], sum(expected[: len(ROWS)]) / len(ROWS), rel_tol=1e-4)
    assert math.isclose(records[0]["logps/rejected"], sum(expected[len(ROWS) :]) / len(ROWS), rel_tol=1e-4)
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[0]["rewards/accuracies"] == 0 and records[-1]["rewards/accuracies"] == 1


def test_packed_texts_have_the_loss_of_texts_apart(path, tmp_path):
    """Without images, which trl packs with no model."""
    said = [["Hello?", "yes"], ["And?", "no, it is not"], ["a", "b"]]
    messages = [cobra.hf.to_trl(llava({"image": [], "said": one}))["messages"] for one in said]
    trainer = trl.SFTTrainer(
        model=load(path),
        args=arguments(trl.SFTConfig, tmp_path, max_steps=1, packing=True, max_length=64, assistant_only_loss=True),
        train_dataset=datasets.Dataset.from_list([{"messages": one} for one in messages]),
        processing_class=transformers.AutoProcessor.from_pretrained(path),
    )
    assert len(trainer.train_dataset) == 1
    own = cobra.load(path, dtype="float32").train()
    total, count = own.loss(batch_of(own, [{"image": [], "said": one} for one in said], path.parent))
    (record,) = train(trainer)
    assert math.isclose(record["loss"], (total / count).item(), rel_tol=1e-4)


def test_bfloat16_on_demand(path, tmp_path):
    """trl's default: products in it, parameters not."""
    losses = []
    for bf16 in (False, True):
        trainer = trl.SFTTrainer(
            model=str(path),
            args=arguments(trl.SFTConfig, tmp_path, max_steps=1, bf16=bf16),
            train_dataset=table(path, map(llava, ROWS)),
        )
        losses.append(train(trainer)[0]["loss"])
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        assert trainer.model.model.lm.recompute_layers  # trl's default too
    assert losses[0] != losses[1] and math.isclose(*losses, rel_tol=1e-2)


@pytest.mark.parametrize("text", ["<image>\nWhat?", "<image>\n<image>\nWhat?", "Is <image> or <image> darker?",
                                  "<image>\n", "What?", "<image>\n<image>\nWhat is <image>?"])  # fmt: skip
def test_rows_in_llavas_form_are_read_as_they_are(path, text):
    processor = transformers.AutoProcessor.from_pretrained(path)
    names = [f"{number}.png" for number in range(text.count("<image>"))]
    row = cobra.hf.to_trl({"images": names, "conversations": [{"from": "human", "value": text}]}, path.parent)
    own = cobra.load(path).processor
    found = processor.apply_chat_template(row["messages"], images=row["images"] or None, tokenize=True)
    assert found == own([[Turn("user", text)]], [[Path(path.parent, name) for name in names]])["input_ids"].tolist()


def test_rows_that_are_no_conversation_are_told_in_a_line():
    human, gpt = {"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}
    asked = {"image": "a.png", "conversations": [human]}
    for row, told in (
        ({"conversations": [human]}, "1 <image> marks in the human turns for 0 images"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "a turn must be"),
        ({**asked, "conversations": [human, gpt], "chosen": "a", "rejected": "b"}, "must be a human turn"),
        ({**asked, "chosen": "a"}, "a turn must be"),
        ({**asked, "chosen": "a", "rejected": human}, "rejected is no answer of gpt"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            cobra.hf.to_trl(row)
        assert "\n" not in str(caught.value)
