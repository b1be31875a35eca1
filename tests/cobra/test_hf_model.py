"""A model directory as a model of transformers: loading, reading, generating, saving."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image

import cobra
from cobra.checkpoint import named_tensors
from cobra.image import ImageConfig
from cobra.prompt import Turn
from tests.cobra import test_tiles, test_video
from tests.cobra.test_generate import lively
from tests.tolerance import assert_close
from vision_scan.errors import UserError
from vision_scan.precision import Float32Parameters

transformers = pytest.importorskip("transformers")
import cobra.hf  # noqa: E402 (registers the classes)

pytestmark = pytest.mark.usefixtures("one_thread")

MAMBA2 = cobra.PRESETS["tiny"].lm.layers[0]
ATTENTION, MLP = cobra.PRESETS["transformer-tiny"].lm.layers[:2]
STACKS = {
    "mamba2": (MAMBA2,) * 3,
    "hybrid": (MAMBA2, ATTENTION, MLP),
    "window": (replace(ATTENTION, window=7), MAMBA2),
}


def load(path, **options):
    return transformers.AutoModelForImageTextToText.from_pretrained(path, **options)


@pytest.fixture(scope="module", params=STACKS)
def pair(request, tmp_path_factory, one_thread):
    """Our model, and the one that transformers reads from its directory."""
    own = lively(STACKS[request.param])
    path = tmp_path_factory.mktemp(request.param) / "model"
    cobra.save(own, path)
    return own, load(path)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    """The directory of a model whose embeddings are tied."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    cobra.save(cobra.build("tiny", seed=3), path)
    return path


def picture(seed, height=40, width=60):
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def prompts(own, with_images):
    texts = ["What is it?", "x", "How many digits are there?"]
    images = None
    if with_images:
        texts = [f"<image>\n{texts[0]}", texts[1], f"Compare <image> and <image>. {texts[2]}"]
        images = [[picture(0)], [], [picture(1), picture(2, 20, 20)]]
    batch = own.processor(text=[[Turn("user", text)] for text in texts], images=images)
    return {name: value for name, value in batch.items() if value is not None and name != "tiles_per_image"}


def new_tokens(output, batch):
    return output[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
def test_auto_classes_read_the_directory(pair):
    own, theirs = pair
    config = transformers.AutoConfig.from_pretrained(theirs.config.name_or_path)
    assert config.cobra == own.config == theirs.config.cobra
    assert (config.vocab_size, config.hidden_size) == (own.config.lm.vocab_size, own.config.lm.d_model)
    assert not theirs.training
    for known in (theirs.config, theirs.generation_config):
        assert (known.eos_token_id, known.pad_token_id) == (own.tokenizer.end_id, own.tokenizer.pad_id)
    assert type(transformers.AutoModelForCausalLM.from_pretrained(config.name_or_path)) is type(theirs)
    batch = prompts(own, with_images=True)
    embeds = own.embed(batch["input_ids"], batch["pixel_values"], batch["image_sizes"])
    expected, _ = own.lm(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    assert torch.equal(theirs(**batch).logits, expected)


def test_weights_are_equal_and_tied(tiny_path):
    own, theirs = cobra.load(tiny_path, dtype="float32"), load(tiny_path)
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    for name, tensor in named_tensors(own).items():
        assert torch.equal(theirs.get_parameter(f"model.{name}"), tensor), name


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float64])
def test_what_stays_float32_is_float32(tiny_path, dtype):
    theirs = load(tiny_path, dtype=dtype)
    expected = dict(cobra.load(tiny_path, dtype=dtype).named_parameters())
    assert {name: p.dtype for name, p in theirs.model.named_parameters()} == {n: p.dtype for n, p in expected.items()}
    for module in theirs.modules():
        if isinstance(module, Float32Parameters):
            assert all(getattr(module, name).dtype.itemsize >= 4 for name in module.float32_parameters)
    assert theirs.dtype == getattr(torch, str(dtype).removeprefix("torch."))
    for name, parameter in theirs.model.named_parameters():  # not by way of a half precision
        assert torch.equal(parameter, expected[name]), name
    state = theirs(torch.tensor([[1, 2, 3]])).past_key_values.state
    assert all(layer["ssm"].dtype.itemsize >= 4 for layer in state.layers)


def test_a_directory_in_bfloat16_says_so(tmp_path):
    cobra.save(cobra.build("tiny", dtype="bfloat16"), tmp_path / "half")
    assert load(tmp_path / "half").dtype == torch.bfloat16


def test_directories_from_before_stay_readable(tiny_path, tmp_path):
    own = cobra.load(tiny_path, dtype="float32")
    cobra.save(own, tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    data = json.loads(file.read_text())
    for key in ("model_type", "architectures", "dtype"):
        del data[key]
    file.write_text(json.dumps(data))
    assert cobra.load(tmp_path / "old").config == own.config
    theirs = cobra.hf.CobraForConditionalGeneration.from_pretrained(tmp_path / "old")  # by its class, as unnamed
    assert theirs.config.cobra == own.config
    file.write_text(json.dumps({**data, "use_cash": True}))
    with pytest.raises(UserError, match="unknown setting 'use_cash'"):
        cobra.load(tmp_path / "old")


@pytest.mark.parametrize("with_images", [False, True])
def test_greedy_generation_is_ours(pair, with_images):
    own, theirs = pair
    batch = prompts(own, with_images)
    expected = own.generate(**batch, max_new_tokens=10)
    assert torch.equal(new_tokens(theirs.generate(**batch, max_new_tokens=10, do_sample=False), batch), expected)
    without = theirs.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(new_tokens(without, batch), expected[:, :4])


def test_generation_stops_at_the_templates_end(tmp_path):
    own = lively(STACKS["mamba2"])
    batch = prompts(own, with_images=False)
    rows = own.generate(**batch, max_new_tokens=8).tolist()
    later = next(token for token in rows[0][2:] if token not in rows[0][:2])
    head = own.lm.lm_head.weight.data
    head[[own.tokenizer.end_id, later]] = head[[later, own.tokenizer.end_id]]
    cobra.save(own, tmp_path / "ends")
    found = new_tokens(load(tmp_path / "ends").generate(**batch, max_new_tokens=8, do_sample=False), batch)
    assert torch.equal(found, own.generate(**batch, max_new_tokens=8))
    ended = found[0].tolist().index(own.tokenizer.end_id)
    assert 0 < ended < 7 and set(found[0, ended + 1 :].tolist()) <= {own.tokenizer.pad_id}


def test_sampling_repeats_with_its_seed(pair):
    own, theirs = pair
    batch = prompts(own, with_images=True)
    options = {"max_new_tokens": 5, "do_sample": True, "temperature": 1.5, "num_return_sequences": 2}
    drawn = []
    for seed in (1, 1, 2):
        transformers.set_seed(seed)
        drawn.append(theirs.generate(**batch, **options))
    assert len(drawn[0]) == 6 and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@torch.no_grad()
def test_beam_search_finds_the_best_of_all(pair):
    """As many beams as tokens, two tokens long: nothing can be missed."""
    own, theirs = pair
    vocab, end = own.config.lm.vocab_size, own.tokenizer.end_id
    batch = own.processor(text=[[Turn("user", "What?")]])
    ids = batch["input_ids"]
    found = theirs.generate(
        ids, max_new_tokens=2, min_new_tokens=2, num_beams=vocab - 1, num_return_sequences=3, do_sample=False,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    pairs = torch.cat([ids.expand(vocab, -1), torch.arange(vocab)[:, None]], 1)
    scores = own.lm(pairs)[0].log_softmax(-1)
    total = scores[0, -2][:, None] + scores[:, -1]
    total[end] = total[:, end] = -torch.inf
    best = total.flatten().topk(3)
    expected = torch.stack([best.indices // vocab, best.indices % vocab], 1)
    assert torch.equal(found.sequences[:, ids.shape[1] :], expected)
    assert_close("scores", found.sequences_scores, best.values / 2)  # of each token, as length_penalty is 1


def test_beams_of_rows_with_images_are_those_of_the_rows_alone(pair):
    own, theirs = pair
    batch = prompts(own, with_images=True)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    found = new_tokens(theirs.generate(**batch, **options), batch)
    fresh = new_tokens(theirs.generate(**batch, **options, use_cache=False), batch)
    assert torch.equal(found, fresh)  # the cache follows the beams
    start = 0
    for row, num_images in enumerate([1, 0, 2]):
        keep = batch["attention_mask"][row].bool()
        alone = {"input_ids": batch["input_ids"][row, keep][None]}
        if num_images:
            alone["pixel_values"] = batch["pixel_values"][start : start + num_images]
        start += num_images
        expected = new_tokens(theirs.generate(**alone, **options), alone)[0]
        assert torch.equal(found[row, : len(expected)], expected)


@pytest.mark.parametrize("kind", ["fixed", "tiles", "video", "native video"])
def test_images_videos_and_tiles_are_repeated_with_their_rows(kind):
    config = {"tiles": test_tiles.config, "fixed": lambda: test_tiles.config(image=ImageConfig(height=16, width=16))}
    for name, tiles in (("video", "fixed"), ("native video", "native")):
        image = ImageConfig(height=16, width=20, tiles=test_video.TILES[tiles])
        config[name] = lambda image=image: test_video.config(image=image)
    own = cobra.build(config[kind]())
    last = {"type": "image", "image": picture(3, 70, 30)}
    if "video" in kind:
        last = {"type": "video", "video": test_video.video(3).frames}
    processor = cobra.hf.CobraProcessor(own.processor)
    messages = [
        [{"type": "text", "text": "a"}, {"type": "image", "image": picture(4)}, {"type": "text", "text": "b"}, last],
        [{"type": "text", "text": "x"}],
        [{"type": "image", "image": picture(5, 20, 50)}],
    ]
    batch = processor.apply_chat_template(
        [[{"role": "user", "content": content}] for content in messages],
        tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert ("num_frames" in batch) == ("video" in kind)
    theirs = cobra.hf.CobraForConditionalGeneration.of(own)
    ids, more = theirs._expand_inputs_for_generation(expand_size=2, **batch)
    images = {name: value for name, value in batch.items() if name in ("pixel_values", "image_sizes", "num_frames")}
    expected = own.embed(batch["input_ids"], **images).repeat_interleave(2, 0)
    more.pop("attention_mask")
    assert_close("embeddings", own.embed(ids, **more), expected)


def test_streamers_get_the_text(pair):
    own, theirs = pair
    tokenizer = cobra.hf.CobraProcessor(own.processor).tokenizer
    ids = own.processor(text=[[Turn("user", "What?")]])["input_ids"]
    expected = tokenizer.decode(own.generate(ids, max_new_tokens=8)[0], skip_special_tokens=True)
    options = {"skip_prompt": True, "skip_special_tokens": True}
    streamer = transformers.TextIteratorStreamer(tokenizer, timeout=60, **options)
    call = {"inputs": ids, "max_new_tokens": 8, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=theirs.generate, kwargs=call)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()
    pieces = []
    streamer = transformers.TextStreamer(tokenizer, **options)
    streamer.on_finalized_text = lambda text, stream_end=False: pieces.append(text)
    theirs.generate(ids, max_new_tokens=8, do_sample=False, streamer=streamer)
    assert "".join(pieces) == expected


def test_a_state_of_ours_is_read_on_from_and_left_as_it_is(pair):
    own, theirs = pair
    state = own.prefill("<image> Look.", images=[picture(5)])
    kept = state.clone()
    question = torch.tensor([[*own.tokenizer.encode("What?"), *own.processor.template.encode(
        own.processor.template.user_close, own.tokenizer)]])  # fmt: skip
    cache = cobra.hf.StateCache(state)
    found = theirs.generate(question, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(found[:, question.shape[1] :], own.generate(question, state=kept, max_new_tokens=6))
    for before, after in zip(kept.layers, state.layers, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    # Then as transformers continues a conversation: all ids so far and more, the cache having read all but one.
    more = torch.cat([found, question], 1)
    again = theirs.generate(more, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(again[:, more.shape[1] :], own.generate(more, state=kept, max_new_tokens=4))


def test_a_cache_selects_rows_and_cannot_go_back(pair):
    own, theirs = pair
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    cache = theirs(ids).past_key_values
    assert (cache.get_seq_length(), cache.batch_size) == (3, 2)
    cache.reorder_cache(torch.tensor([1, 1]))
    found = theirs(ids[:, :1], past_key_values=cache).logits
    expected = own.lm(torch.tensor([[4, 5, 6, 1], [4, 5, 6, 4]]), logits_to_keep=1)[0]
    assert_close("logits", found, expected)
    with pytest.raises(UserError, match="cannot forget its last tokens"):
        cache.crop(1)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        theirs.generate(ids[:1], assistant_model=theirs, max_new_tokens=2)


@torch.no_grad()
def test_what_the_head_gets_is_read_alone(pair):
    """As trainers ask for it that apply the head themselves."""
    _, theirs = pair
    batch = prompts(pair[0], with_images=True)
    output = theirs.base_model(**batch, use_cache=True)
    logits = theirs.get_output_embeddings()(output.last_hidden_state)
    assert torch.equal(logits, theirs(**batch).logits)
    assert output.past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    assert theirs.base_model(**batch, use_cache=False).past_key_values is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'pixels'"):
        theirs.base_model(torch.tensor([[1]]), pixels=1)


@torch.no_grad()
def test_packed_texts_are_read_apart(pair):
    """However trainers say where one ends."""
    _, theirs = pair
    texts = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    expected = torch.cat([theirs(torch.tensor([text])).logits for text in texts], 1)
    ids = torch.tensor([[token for text in texts for token in text]])
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2]], dtype=torch.int32)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    ends = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
    kernels = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    for said in ({"seq_idx": seq_idx}, {"position_ids": places, **kernels}, {"seq_idx": seq_idx, **kernels}):
        assert_close("logits", theirs(ids, **said).logits, expected)
        assert theirs.base_model(ids, **said).last_hidden_state.shape[:2] == ids.shape
    # With a mask, positions begin behind the padding and no text ends.
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5, 6]])
    found = theirs(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(found, theirs(ids, attention_mask=mask).logits)


def test_wrong_inputs_are_told_in_a_line(pair):
    _, theirs = pair
    ids = torch.tensor([[1, 2, 3]])
    for call, told in (
        (lambda: theirs(), "give either input_ids or inputs_embeds"),
        (lambda: theirs(ids, past_key_values=transformers.DynamicCache()), "is a DynamicCache: give a cobra.hf"),
        (lambda: theirs(ids, attention_mask=torch.ones(1, 2)), r"attention_mask has shape \(1, 2\): give \(1, 3\)"),
        (lambda: theirs(torch.tensor([[257]])), "1 image tokens, the images give 0"),
        (lambda: theirs(ids, output_attentions=True), "output_attentions=True: layers hand out a state"),
        (lambda: theirs.resize_token_embeddings(300), "python -m train enlarges it"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("max_shard_size", ["5GB", "300KB"])
def test_saved_models_are_read_by_both(tiny_path, tmp_path, max_shard_size):
    theirs, out = load(tiny_path), tmp_path / "out"
    theirs.config.use_cache = False  # as trainers do; nothing of a model directory
    theirs.save_pretrained(out)  # what another way of saving leaves is not read in place of this one's
    torch.nn.init.normal_(theirs.get_input_embeddings().weight)
    theirs.save_pretrained(out, max_shard_size=max_shard_size)
    assert (out / "model.safetensors").exists() == (max_shard_size == "5GB")
    own, again = cobra.load(out, dtype="float32"), load(out)
    for name, tensor in named_tensors(theirs.model).items():
        assert torch.equal(own.get_parameter(name), tensor), name
        assert torch.equal(again.get_parameter(f"model.{name}"), tensor), name
    assert own.tokenizer.to_json() == theirs.model.tokenizer.to_json()
    for path in (tiny_path, out):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (own.tokenizer.pad_id, own.tokenizer.end_id)


def test_quantised_directories_answer_alike(tiny_path, tmp_path):
    small = cobra.load(tiny_path, dtype="float32", weights="int8")
    cobra.save(small, tmp_path / "int8")
    ids = torch.tensor([small.tokenizer.encode("What?")])
    found = load(tmp_path / "int8").generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(found[:, ids.shape[1] :], small.generate(ids, max_new_tokens=5))


def test_a_directory_that_lacks_something_is_refused(tiny_path, tmp_path):
    from safetensors.torch import load_file, save_file

    cobra.save(cobra.load(tiny_path, dtype="float32"), tmp_path / "spoilt")
    file = tmp_path / "spoilt" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm.norm_f.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"missing lm\.norm_f\.weight, 1 in all"):
        load(tmp_path / "spoilt")
    (tmp_path / "spoilt" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load(tmp_path / "spoilt")
