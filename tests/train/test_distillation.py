"""What a student learns from its teacher."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cobra
from cobra.lm.attention import AttentionConfig
from cobra.lm.mixer import Segments
from cobra.model import next_labels
from tests.train.small_run import COURSE, call, load, losses, small_config
from train.data.dataset import Dataset
from train.init import build_model, build_objective
from train.objectives import Objective
from train.recipes import RECIPES
from train.run import run
from train.settings import ModelSettings, RunConfig, change
from vision_scan.errors import UserError

OBJECTIVES = ("distill_mixer", "distill_hidden", "distill_logits")
TRANSFORMER = (
    'model.lm.layers=[{"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "headdim": 8}, '
    '{"kind": "mlp", "d_ff": 32}, {"kind": "attention", "num_heads": 4, "num_kv_heads": 1, "headdim": 8}]'
)
PLAIN = ("train.engine=plain",)


@pytest.fixture
def teacher(data: Path, tmp_path: Path) -> Path:
    """A transformer that has been trained for some steps."""
    assert run(small_config(data, *PLAIN, TRANSFORMER, "optim.lr=5e-3"), tmp_path / "teacher")
    return tmp_path / "teacher"


def config_of(data: Path, teacher: Path, objective: str, *changes: str) -> RunConfig:
    """A stage whose model is the teacher's, or of init.path."""
    settings = (*COURSE, *PLAIN, f"data.path={data}", f"distill.teacher={teacher}")
    return change(RECIPES[objective.replace("_", "-")](), [*settings, *changes])


def build(config: RunConfig) -> tuple[Objective, Dataset]:
    rows = load(config)
    return build_objective(config, build_model(config, rows), rows, torch.device("cpu")), rows


def loss_of(objective: Objective, rows: list) -> Tensor:
    """The loss of rows as one batch, the same random values whenever it is called."""
    torch.manual_seed(0)
    batch = objective.collate([objective.sample(row) for row in rows])
    return objective(batch.inputs)[0] / batch.weight


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(data: Path, teacher: Path, objective: str) -> None:
    # A window wider than every row: other layers by their configuration, the same ones by what they do.
    model = cobra.load(teacher, dtype="float32")
    layers = tuple(
        replace(layer, window=10_000) if isinstance(layer, AttentionConfig) else layer
        for layer in model.config.lm.layers
    )
    twin = cobra.build(replace(model.config, lm=replace(model.config.lm, layers=layers)), tokenizer=model.tokenizer)
    twin.load_state_dict(model.state_dict())
    cobra.save(twin, teacher.parent / "twin")
    found, rows = build(config_of(data, teacher, objective, f"init.path={teacher.parent / 'twin'}"))
    assert loss_of(found, list(rows)).item() < 1e-6
    found, rows = build(config_of(data, teacher, objective))
    assert loss_of(found, list(rows)).item() > 1e-3


def test_hidden_states_are_compared_layer_by_layer(data: Path, teacher: Path) -> None:
    """Against the definition, one row at a time, the teacher's layers called by hand."""
    objective, rows = build(config_of(data, teacher, "distill_hidden"))
    given, own = objective.teacher.model, objective.model
    total, count = 0.0, 0
    for row in rows:
        inputs = objective.collate([objective.sample(row)]).inputs
        names = "input_ids", "pixel_values", "image_sizes", "num_frames"
        with torch.no_grad():
            x = given.embed(*(inputs[name] for name in names))
            seqlen, errors = x.shape[1], []
            for index, block in enumerate(given.lm.layers):
                starts = Segments(torch.zeros(1, dtype=torch.int64))
                y = block.mixer(block.norm(x), None, starts)[0]
                if index in (0, 2):
                    student = own.lm.layers[index]
                    difference = student.mixer(student.norm(x), None, starts)[0] - y
                    errors.append(difference.square().sum() / y.square().sum())
                x = x + y
        total += seqlen * sum(errors).item() / 2
        count += seqlen
    assert loss_of(objective, list(rows)).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_answers_are_compared_where_a_token_is_learned(data: Path, teacher: Path, share: float) -> None:
    objective, rows = build(config_of(data, teacher, "distill_logits", f"distill.label_share={share}"))
    total, count = 0.0, 0
    for row in rows:
        inputs = objective.collate([objective.sample(row)]).inputs
        logits = []
        for model in (objective.teacher.model, objective.model):
            embeds = model.embed(*(inputs[name] for name in ("input_ids", "pixel_values", "image_sizes", "num_frames")))
            logits.append(model.lm(inputs_embeds=embeds)[0].detach())
        labels = next_labels(inputs["labels"])
        places = labels >= 0
        taught, own = (each[places].softmax(-1) for each in logits)
        taught = (1 - share) * taught + share * F.one_hot(labels[places], taught.shape[-1])
        total += F.kl_div(own.log(), taught, reduction="sum").item()
        count += int(places.sum())
    assert loss_of(objective, list(rows)).item() == pytest.approx(total / count, rel=1e-5)


def test_the_states_that_the_head_reads_are_compared_too(data: Path, teacher: Path) -> None:
    plain, rows = build(config_of(data, teacher, "distill_logits"))
    objective, _ = build(config_of(data, teacher, "distill_logits", "distill.hidden_weight=0.5"))
    total, count = 0.0, 0
    for row in rows:
        inputs = objective.collate([objective.sample(row)]).inputs
        hidden = []
        for model in (objective.teacher.model, objective.model):
            embeds = model.embed(*(inputs[name] for name in ("input_ids", "pixel_values", "image_sizes", "num_frames")))
            hidden.append(model.lm.read(inputs_embeds=embeds)[0].detach()[0])
        given, own = hidden
        supervised = int((next_labels(inputs["labels"]) >= 0).sum())
        distances = [float((x - y).square().sum() / x.square().sum()) for x, y in zip(given, own, strict=True)]
        total += supervised * sum(distances) / len(distances)
        count += supervised
    difference = loss_of(objective, list(rows)).item() - loss_of(plain, list(rows)).item()
    assert difference == pytest.approx(0.5 * total / count, rel=1e-4)
    batch = objective.collate([objective.sample(row) for row in rows])
    error, weight = objective(batch.inputs)[1]["hidden_error"].tolist()
    assert error / weight == pytest.approx(total / count, rel=1e-5)


def test_a_teacher_that_is_sure_leaves_no_holes(data: Path, teacher: Path) -> None:
    """Probabilities that are 0 in float32 have logarithms all the same."""
    objective, rows = build(config_of(data, teacher, "distill_logits", "distill.label_share=0.2"))
    with torch.no_grad():
        objective.teacher.model.lm.norm_f.weight.mul_(1e3)
    loss = loss_of(objective, list(rows))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in objective.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("objective", ["distill_hidden", "distill_logits"])
def test_rows_in_a_batch_count_as_alone_and_in_a_pack(data: Path, teacher: Path, objective: str) -> None:
    found, rows = build(config_of(data, teacher, objective))
    batches = [found.collate([found.sample(row)]) for row in rows]
    alone = sum(found(batch.inputs)[0].item() for batch in batches) / sum(batch.weight for batch in batches)
    assert loss_of(found, list(rows)).item() == pytest.approx(alone, rel=1e-5)
    packed, rows = build(config_of(data, teacher, objective, "data.packing=true"))
    pack = packed.collate([packed.sample(row) for row in rows])
    assert pack.weight == sum(batch.weight for batch in batches)
    if objective == "distill_logits":  # by layer, a pack is one row: its tokens are held against its own size
        assert packed(pack.inputs)[0].item() / pack.weight == pytest.approx(alone, rel=1e-5)


def test_padding_does_not_count_by_layer(data: Path, teacher: Path) -> None:
    objective, rows = build(config_of(data, teacher, "distill_hidden"))
    longest = max(rows, key=objective.num_tokens)
    shortest = min(rows, key=objective.num_tokens)
    batch = objective.collate([objective.sample(row) for row in (longest, shortest)])
    assert batch.num_padding > 0
    loss = objective(batch.inputs)[0].item()
    batch.inputs["input_ids"][1, batch.lengths[1] :] = 7  # whatever stands there
    assert objective(batch.inputs)[0].item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_learns(data: Path, teacher: Path, objective: str) -> None:
    found, rows = build(config_of(data, teacher, objective))
    loss_of(found, list(rows)).backward()
    learning = {name for name, parameter in found.model.named_parameters() if parameter.grad is not None}
    everything = {name for name, _ in found.model.named_parameters()}
    mixers = {name for name in everything if name.startswith(("lm.layers.0.mixer.", "lm.layers.2.mixer."))}
    if objective == "distill_logits":
        assert learning == {name for name in everything if name.startswith("lm.")}
    elif objective == "distill_hidden":
        assert learning == mixers
    else:  # neither gate, norm nor projection out has a part in the matrix
        assert {name.rpartition("mixer.")[2] for name in mixers - learning} == {
            "norm.weight", "out_proj.weight", "out_proj.bias"
        }  # fmt: skip
    assert all(parameter.grad is None for parameter in found.teacher.model.parameters())
    assert not any("teacher" in name for name, _ in found.named_parameters())


@pytest.mark.parametrize("student", ["mamba2", "gated_deltanet"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bfloat16_comes_close(data: Path, teacher: Path, objective: str, student: str) -> None:
    changes = (f"distill.student={student}", "distill.hidden_weight=1")
    exact, rows = build(config_of(data, teacher, objective, *changes))
    half, _ = build(config_of(data, teacher, objective, *changes, "train.dtype=bfloat16"))
    assert half.teacher.model.dtype == torch.bfloat16
    loss = loss_of(half, list(rows))
    loss.backward()
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for p in half.model.parameters() if p.grad is not None} == {torch.float32}
    assert loss.item() == pytest.approx(loss_of(exact, list(rows)).item(), rel=0.05)


PICTURES = {
    "wide": ("model.image.height=16", "model.image.width=40"),
    "tiles": ('model.image.tiles={"kind": "anyres"}',),
}


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_images_of_any_form(data: Path, tmp_path: Path, objective: str, pictures: str) -> None:
    """Several images in a row, none in another, grids that are no squares: each row counts as alone."""
    rows = json.loads(data.read_text())
    rows[0]["image"] = [rows[0]["image"], rows[1]["image"]]
    rows[0]["conversations"][0]["value"] = "<image>\n<image>\ncolour?"
    data.write_text(json.dumps(rows))
    config = small_config(data, *PLAIN, TRANSFORMER, "train.steps=2", *PICTURES[pictures])
    assert run(config, tmp_path / "teacher")
    found, loaded = build(config_of(data, tmp_path / "teacher", objective))
    assert {len(row.images) for row in loaded} == {0, 1, 2}
    three = [loaded[0], loaded[4], loaded[1]]
    batches = [found.collate([found.sample(row)]) for row in three]
    if objective == "distill_mixer":  # random values are drawn for a batch: that it is a number has to do
        assert loss_of(found, three).isfinite()
        return
    alone = sum(found(batch.inputs)[0].item() for batch in batches) / sum(batch.weight for batch in batches)
    assert loss_of(found, three).item() == pytest.approx(alone, rel=1e-5)


def test_each_layer_learns_by_itself(data: Path, teacher: Path) -> None:
    """The teacher's stream is what every layer reads: one layer's weights do not change another's error."""
    objective, rows = build(config_of(data, teacher, "distill_hidden"))
    inputs = objective.collate([objective.sample(row) for row in rows]).inputs
    before = objective(inputs)[1]
    with torch.no_grad():
        objective.model.lm.layers[0].mixer.out_proj.weight.mul_(2)
    after = objective(inputs)[1]
    assert torch.equal(before["layer2_error"], after["layer2_error"])
    assert not torch.equal(before["layer0_error"], after["layer0_error"])


@pytest.mark.parametrize("student", ["mamba2", "gated_deltanet"])
def test_three_stages_bring_a_student_to_its_teacher(data: Path, teacher: Path, tmp_path: Path, student: str) -> None:
    held_out = (f"val.path={data}", "val.every=100", "optim.lr=5e-3", "train.steps=30")
    measured, begun = [], [f"distill.student={student}", "distill.keep=1"]
    for objective in OBJECTIVES:
        output = tmp_path / objective
        assert run(config_of(data, teacher, objective, *held_out, *begun), output)
        found = losses(output)
        assert sum(found[-3:]) < 0.8 * sum(found[:3]), objective
        begun = [f"init.path={output}"]
        answers, rows = build(config_of(data, teacher, "distill_logits", *begun))
        measured.append(loss_of(answers, list(rows)).item())
    assert measured[2] < measured[1]
    kinds = [layer.kind for layer in cobra.load(tmp_path / "distill_logits").config.lm.layers]
    assert kinds == [student, "mlp", "attention"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_interrupted_stage_goes_on_as_it_was(data: Path, teacher: Path, tmp_path: Path, objective: str) -> None:
    config = config_of(data, teacher, objective, "train.save_every=3")
    assert run(config, tmp_path / "whole")
    run_directory = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", run_directory)
    shutil.rmtree(run_directory / "checkpoints" / "step-000006")
    assert run(config, run_directory, resume=True)
    assert losses(run_directory) == losses(tmp_path / "whole")


def test_a_student_may_learn_from_the_rows_alone(data: Path, teacher: Path, tmp_path: Path) -> None:
    config = small_config(data, *PLAIN, f"distill.teacher={teacher}")
    config = replace(config, model=ModelSettings(preset="tiny"))
    assert run(config, tmp_path / "student")
    assert cobra.load(tmp_path / "student").config.lm.layers[0].kind == "mamba2"


def test_the_plan_tells_of_the_student(data: Path, teacher: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    assert run(config_of(data, teacher, "distill_hidden"), tmp_path / "student", report=lines.append)
    assert lines[0] == f"recipe distill-hidden: a student of {teacher}, objective distill_hidden"
    lm = next(line for line in lines if line.startswith("  lm"))
    student = cobra.load(tmp_path / "student").lm
    learning = sum(p.numel() for index in (0, 2) for p in student.layers[index].mixer.parameters())
    assert f"{learning:,} of them trained" in lm


def test_what_cannot_be_learned_is_said(data: Path, teacher: Path, tmp_path: Path) -> None:
    def refused(match: str, *changes: str, objective: str = "distill_mixer") -> None:
        with pytest.raises(UserError, match=match):
            build(config_of(data, teacher, objective, *changes))

    refused("needs a teacher: set distill.teacher", "distill.teacher=none")
    refused("init.towers and init.fresh .* leave them out", "init.fresh=lm.embedding")
    refused("distill.teacher=.*: no such model directory", f"distill.teacher={tmp_path / 'nowhere'}")
    assert run(small_config(data, *PLAIN, "tokenizer.kind=train", "tokenizer.vocab_size=300"), tmp_path / "other")
    refused("another tokenizer", f"init.path={tmp_path / 'other'}")
    layers = (
        'model.lm.layers=[{"kind": "mamba1", "d_state": 4}, {"kind": "mlp", "d_ff": 32}, '
        '{"kind": "mamba2", "headdim": 32}]'
    )
    assert run(small_config(data, *PLAIN, layers), tmp_path / "mamba1")
    refused("layer 0 of the student, mamba1, has no matrix", f"init.path={tmp_path / 'mamba1'}")
    build(config_of(data, teacher, "distill_hidden", f"init.path={tmp_path / 'mamba1'}"))
    layers = layers.replace('"mamba1", "d_state": 4', '"mamba2", "headdim": 32')
    assert run(small_config(data, *PLAIN, layers), tmp_path / "mamba2")
    objective, rows = build(config_of(data, teacher, "distill_mixer", f"init.path={tmp_path / 'mamba2'}"))
    with pytest.raises(UserError, match=r"student's layers have \d+ heads, the teacher's 4"):
        loss_of(objective, list(rows))


def test_the_command_line(data: Path, teacher: Path, tmp_path: Path) -> None:
    """DeepSpeed, as by default; a mistake is one line and status 2."""
    arguments = [sys.executable, "-m", "train", "--recipe", "distill-logits", "--output", str(tmp_path / "student")]
    settings = [*COURSE, f"data.path={data}", "train.steps=2"]
    arguments += [word for setting in settings for word in ("--set", setting)]
    done = call(arguments)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("needs a teacher: set distill.teacher to a model directory")
    assert not (tmp_path / "student").exists()
    done = call([*arguments, "--set", f"distill.teacher={teacher}"])
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "student")) == 2
