"""`Cobra` as a model of transformers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.hub import cached_file
from typing_extensions import Unpack

from cobra.checkpoint import INDEX, PARTS, TOKENIZER, WEIGHTS, named_tensors, tokenizer_files
from cobra.lm import State
from cobra.model import Cobra, ImageSizes
from cobra.tokenizer import Tokenizer
from vision_scan.errors import UserError

from .cache import StateCache
from .configuration import CobraVLMConfig

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
IMAGE_INPUTS = ("pixel_values", "image_sizes", "num_frames")


class Others(TypedDict, total=False):
    """What trainers hand to any model.

    Attributes:
        position_ids: where each token stands in its text; of packed rows, which have no mask, a 0 begins another text.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: the same for kernels of attention, looked at by none.
        output_attentions, output_hidden_states: False or None, as there are none to be had.
    """

    position_ids: Tensor | None
    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int
    output_attentions: bool | None
    output_hidden_states: bool | None


class CobraForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Images and a prompt in, text out.

    Attributes:
        model: the `Cobra` that does everything; below it, parameters have the names that a model directory gives them.
    """

    config_class = CobraVLMConfig
    base_model_prefix = "model"  # has the names in a model directory, which lack it, found
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    # Has peft load adapters that `train.lora` wrote for the model itself.
    _checkpoint_conversion_mapping = {rf"^({'|'.join(PARTS)})\.": r"model.\1."}  # noqa: RUF012 (peft asks for a dict)
    _is_stateful = True  # refuses what would take read tokens back, such as an assistant model's

    def __init__(self, config: CobraVLMConfig, tokenizer: Tokenizer | None = None) -> None:
        """A model with random weights; without a tokenizer, of bytes and special tokens, as `cobra.build` makes it."""
        super().__init__(config)
        dtype = torch.get_default_dtype()  # `from_pretrained` sets the one that was asked for
        torch.set_default_dtype(torch.float32)
        try:
            self.model = Cobra(config.cobra, tokenizer or Tokenizer.bytes()).to(dtype)  # but for what stays float32
        finally:
            torch.set_default_dtype(dtype)
        self._tied_weights_keys = _ties(self)
        self.config.image_token_id = self.model.tokenizer.image_id
        self._complete_configs()
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.post_init()

    @classmethod
    def of(cls, model: Cobra) -> "CobraForConditionalGeneration":
        """A model that is in memory already; its parameters are shared."""
        with torch.device("meta"):
            wrapper = cls(CobraVLMConfig.of(model.config), model.tokenizer)
        wrapper.model = model
        wrapper.train(model.training)
        return wrapper

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, tokenizer: Tokenizer | None = None, **options: Any
    ) -> Any:
        """Reads a model directory, or a repository of the Hub that holds one; see `PreTrainedModel.from_pretrained`.

        Raises:
            UserError: if tensors are missing or unexpected; it names them.
        """
        if tokenizer is None:
            tokenizer = Tokenizer.from_file(find_file(pretrained_model_name_or_path, TOKENIZER, options))
        wants_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, tokenizer=tokenizer, output_loading_info=True, **options
        )
        for kind in ("missing_keys", "unexpected_keys"):
            if info[kind]:
                name = sorted(info[kind])[0].removeprefix("model.")
                told = f"{kind.partition('_')[0]} {name}, {len(info[kind])} in all"
                raise UserError(f"{pretrained_model_name_or_path}: does not fit the model's configuration: {told}")
        model._complete_configs()  # transformers makes a bare one where there is no file of it
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Writes a model directory, which `cobra.load` reads too; see `PreTrainedModel.save_pretrained`."""
        is_adapter = getattr(self, "_hf_peft_config_loaded", False)
        if not is_adapter:
            own = named_tensors(self.model)
            if state_dict is not None:  # of an engine that gathers it, under this object's names
                own = {name: state_dict[f"model.{name}"] for name in own}
            state_dict = {name: tensor.detach() for name, tensor in own.items()}
            Path(save_directory, INDEX).unlink(missing_ok=True)
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **options)
        if is_main_process and not is_adapter:
            for name, write in tokenizer_files(self.model.tokenizer, self.model.processor.template.end).items():
                write(Path(save_directory, name))
            if Path(save_directory, INDEX).exists():  # a whole file from before would be read instead of the parts
                Path(save_directory, WEIGHTS).unlink(missing_ok=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: ImageSizes | None = None,
        num_frames: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        seq_idx: Tensor | None = None,
        **others: Unpack[Others],
    ) -> CausalLMOutputWithPast | tuple:
        """Reads tokens.

        Args:
            input_ids: (batch, seqlen), the new ones; or
            inputs_embeds: (batch, seqlen, d_model).
            attention_mask: (batch, seqlen), or as many as have been read in all; 0 at padding, on any side.
            pixel_values, image_sizes, num_frames: see `Cobra.embed`.
            past_key_values: what was read before; it moves on.
            labels: (batch, seqlen), the ids themselves where they are to be learned, else -100.
            use_cache: whether to return what was read; None: outside of training.
            logits_to_keep: of the last so many places, of all (0), or of these.
            num_items_in_batch: what the sum of losses is divided by; None: the number of labels.
            seq_idx: (batch, seqlen), of packed rows which text each token is of; below 0 is padding.
            others: see `Others`.
        Returns:
            loss, logits (batch, kept, vocab_size) in float32, past_key_values.
        """
        reading = self._reading(
            input_ids, past_key_values, attention_mask=attention_mask, pixel_values=pixel_values,
            image_sizes=image_sizes, num_frames=num_frames, inputs_embeds=inputs_embeds, seq_idx=seq_idx, **others,
        )  # fmt: skip
        if isinstance(logits_to_keep, int):
            logits, state = self.model.lm(**reading, logits_to_keep=logits_to_keep)
        else:
            hidden, state = self.model.lm.read(**reading)
            logits = self.model.lm.logits(hidden[:, logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
            )
        cache = self._go_on(past_key_values, state, reading, use_cache)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def read(
        self,
        input_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """As `forward`, but what the head gets, (batch, seqlen, d_model), instead of logits."""
        reading = self._reading(input_ids, past_key_values, **inputs)
        hidden, state = self.model.lm.read(**reading)
        cache = self._go_on(past_key_values, state, reading, use_cache)
        output = BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    @property
    def base_model(self) -> Callable[..., BaseModelOutputWithPast | tuple]:
        """What others call when they apply the head themselves, to a part of what it gets at a time."""
        return self.read

    def _reading(
        self,
        input_ids: Tensor | None,
        cache: StateCache | None,
        *,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: ImageSizes | None = None,
        num_frames: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **others: Unpack[Others],
    ) -> dict[str, Any]:
        """What the language model takes."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds")
        if cache is not None and not isinstance(cache, StateCache):
            raise UserError(f"past_key_values is a {type(cache).__name__}: give a cobra.hf.StateCache, or nothing")
        state = None if cache is None else cache.state
        if inputs_embeds is None and (pixel_values is not None or state is None):
            inputs_embeds = self.model.embed(input_ids, pixel_values, image_sizes, num_frames)
            input_ids = None
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        return {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "state": state,
            "attention_mask": None if attention_mask is None else _mask_of(attention_mask, *given.shape[:2]),
            "seq_idx": _texts_of(seq_idx, attention_mask, state, others),
            "overwrite_state": cache is not None and cache.may_overwrite and not torch.is_grad_enabled(),
        }

    def _go_on(
        self, cache: StateCache | None, state: State, reading: dict[str, Any], use_cache: bool | None
    ) -> StateCache | None:
        """The cache behind what was read, if one is asked for."""
        if not (not self.training if use_cache is None else use_cache):
            return None
        cache = StateCache() if cache is None else cache
        given = reading["input_ids"] if reading["inputs_embeds"] is None else reading["inputs_embeds"]
        cache.advance(state, given.shape[1])
        return cache

    @property
    def dtype(self) -> torch.dtype:
        """That of the projections; the first parameter may be one that stays float32."""
        return self.model.dtype

    def _complete_configs(self) -> None:
        tokenizer, template = self.model.tokenizer, self.model.processor.template
        for name, index in (("eos_token_id", template.end_id(tokenizer)), ("pad_token_id", tokenizer.pad_id)):
            setattr(self.config, name, index)
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, index)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.lm.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.lm.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.lm.lm_head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Embedding:
        """
        Raises:
            UserError: always: rows for new tokens are made where training begins.
        """
        raise UserError("the vocabulary is lm.vocab_size of config.json; python -m train enlarges it for a tokenizer")

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules have begun as they should, and transformers' own way would spoil the steps' biases."""

    def _set_gradient_checkpointing(self, enable: bool = True, *_args: Any, **_options: Any) -> None:
        """Has the language model compute what is within its layers again, in its own way (lm/recompute.py)."""
        self.gradient_checkpointing = self.model.lm.recompute_layers = enable

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward makes a StateCache

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats rows for beams or samples. Images are of rows, any number of each, so they are repeated by row."""
        images = {name: inputs.pop(name) for name in IMAGE_INPUTS if inputs.get(name) is not None}
        if expand_size > 1 and "pixel_values" in images and input_ids is not None:
            images = self._repeat_images(input_ids, images, expand_size)
        cache = inputs.get("past_key_values")
        num_rows = None if input_ids is None else len(input_ids)
        if expand_size > 1 and cache is not None and cache.batch_size == num_rows:  # or it was repeated by the caller
            cache.batch_repeat_interleave(expand_size)
        input_ids, inputs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **inputs
        )
        return input_ids, {**inputs, **images}

    def _repeat_images(self, input_ids: Tensor, images: dict[str, Tensor], times: int) -> dict[str, Tensor]:
        layouts = self.model.layouts(*(images.get(name) for name in IMAGE_INPUTS))
        counts = [layout.num_tokens for layout in layouts]
        ends = (input_ids.cpu() == self.model.tokenizer.image_id).sum(1).cumsum(0)
        starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
        rows = torch.bucketize(starts, ends, right=True)  # that each mark stands in
        num_images = [len(layout.images) for layout in layouts]
        sizes = {
            "pixel_values": [layout.num_entries for layout in layouts],
            "image_sizes": num_images,
            "num_frames": [1] * len(layouts),
        }
        repeated = {}
        for name, value in images.items():
            per_row = torch.zeros(len(ends), dtype=torch.int64).index_add_(0, rows, torch.tensor(sizes[name]))
            pieces = value.split(per_row.tolist())
            repeated[name] = torch.cat([piece for piece in pieces for _ in range(times)])
        return repeated


def find_file(path: str | Path, name: str, options: Mapping[str, Any]) -> Path:
    """A file of a directory, or of a repository of the Hub.

    Args:
        options: of the call, those of `HUB_OPTIONS` among them are looked at.
    """
    if Path(path).is_dir():
        return Path(path, options.get("subfolder") or "", name)
    found = cached_file(str(path), name, **{key: options[key] for key in HUB_OPTIONS if key in options})
    return Path(str(found))


def _mask_of(attention_mask: Tensor, batch: int, seqlen: int) -> Tensor:
    """The mask of the new tokens."""
    if attention_mask.ndim != 2 or len(attention_mask) != batch or attention_mask.shape[1] < seqlen:
        raise UserError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give ({batch}, {seqlen}), or a longer one of all "
            "that was read"
        )
    return attention_mask[:, -seqlen:]


def _texts_of(
    seq_idx: Tensor | None, attention_mask: Tensor | None, state: State | None, others: Others
) -> Tensor | None:
    """Which text of a packed row each token is of; None: rows are not packed."""
    unknown = others.keys() - Others.__annotations__.keys()
    if unknown:
        raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
    for name in ("output_attentions", "output_hidden_states"):
        if others.get(name):
            raise UserError(f"{name}=True: layers hand out a state, which past_key_values has, and nothing else")
    position_ids = others.get("position_ids")
    is_packed = seq_idx is None and attention_mask is None and state is None and position_ids is not None
    return (position_ids == 0).cumsum(1) if is_packed and position_ids is not None else seq_idx


def _add_prefix(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Has `load_state_dict` take a model directory's names, which a resuming Trainer would leave out unnoticed."""
    starts = tuple(f"{prefix}{part}." for part in PARTS)
    for name in list(state_dict):
        if name.startswith(starts):
            state_dict[f"{prefix}model.{name.removeprefix(prefix)}"] = state_dict.pop(name)


def _ties(module: nn.Module) -> dict[str, str] | None:
    """Names of tensors that are another one, with that one's."""
    first: dict[int, str] = {}
    ties = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        source = first.setdefault(id(tensor), name)
        if source != name:
            ties[name] = source
    return ties or None
