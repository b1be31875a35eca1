"""Cobra: pixels -> vision encoder -> connector -> language model -> text."""

import contextlib
import math
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import vision_scan
from vision_scan.errors import UserError, choose

from . import generate as generation
from .checkpoint import resolve_dtype
from .config import PRESETS, CobraConfig
from .connector import CONNECTORS
from .lm import LanguageModel
from .lm.sequence_parallel import SequenceShard
from .processor import Processor
from .prompt import IGNORE
from .quantize import QuantizedLinear, replace_projections
from .tiles import Layout
from .tokenizer import Tokenizer
from .vision_encoder import VISION_ENCODERS, PatchAttention

if TYPE_CHECKING:
    import torch.distributed as dist

ImageSizes = Tensor | Sequence[tuple[int, int]]

FIXED_SENTENCE = (
    "Early in the morning the old fisherman walked down to the harbour, untied his small wooden boat, and "
    "rowed past the lighthouse to the place where the water was calm and the first fish of the day could be "
    "caught."
)


class Cobra(nn.Module):
    """A vision-language model.

    Attributes:
        config, tokenizer, processor: what it is made of, and what turns texts and images into its inputs.
        vision_encoder: (n, 3, height, width) in [0, 1] -> (n, grid_height, grid_width, d_vision).
        connector: those features -> (n, tokens_per_tile, d_model); with `image.tiles` it has what joins those of an
            image's tiles.
        lm: token ids or embeddings -> logits and state.
        encodes_always: whether a batch without images sends a blank tile through tower and connector, to no effect:
            so that every process of a training run calls the same modules.
    """

    encodes_always = False
    # What names of tensors in other files are here; peft looks for it. In `cobra.hf`, this model is the `model` of one.
    _checkpoint_conversion_mapping = {r"^model\.": ""}  # noqa: RUF012 (peft asks for a dict)

    def __init__(
        self, config: CobraConfig, tokenizer: Tokenizer, lm_device: str | torch.device | None = None
    ) -> None:
        """A model with random weights; `lm_device` "meta" saves those of a language model that is read anyway."""
        super().__init__()
        if tokenizer.vocab_size > config.lm.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the language model only "
                f"{config.lm.vocab_size}: raise lm.vocab_size or take a smaller tokenizer"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.processor = Processor(config, tokenizer)
        self.vision_encoder, self.connector = make_vision_parts(config)
        with torch.device(lm_device) if lm_device is not None else contextlib.nullcontext():
            self.lm = LanguageModel(config.lm)
        if config.weights != "plain":
            replace_projections(self, config.weights, QuantizedLinear.like)

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.dtype

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Tiles of one size to tokens: (n, 3, height, width) -> (n, tokens_per_tile, d_model), or as many as the
        connector makes of tiles of another size."""
        reduction = self.config.token_reduction
        if reduction is None:
            features = self.vision_encoder(pixel_values).to(self.dtype)
            tokens = self.connector(features)
            if self.config.reading_order == "raster":
                return tokens
            (cells,) = vision_scan.order(self.config.reading_order, *features.shape[1:3])
            return tokens[:, cells[cells >= 0].to(tokens.device)]  # windows that stick out of the grid have pads
        features, (attention,) = self.vision_encoder(pixel_values, attention_of=(-1,))
        features = features.to(self.dtype)
        if reduction.behind == "connector":
            return reduction.reduce(self.connector(features), attention)
        return self.connector(reduction.reduce(features.flatten(1, 2), attention)[:, None])

    def layouts(
        self, pixel_values: Tensor, image_sizes: ImageSizes | None = None, num_frames: Tensor | None = None
    ) -> list[Layout]:
        """How each image or video of a batch became its tiles.

        Args:
            pixel_values: (num_tiles, 3, height, width), those of an image one after another; see `Processor` for those
                of tiles of their own sizes.
            image_sizes: (num_images, 2), height and width of the images; needed with `image.tiles` only.
            num_frames: how many of the images are a video together, 1 of one alone; looked at with `config.video` only.
                None: no videos.
        Raises:
            UserError: if sizes are missing, or these are of other numbers of tiles, or entries have another size.
        """
        layouts = self._image_layouts(pixel_values, image_sizes)
        video = self.config.video
        if video is None or num_frames is None:
            return layouts
        counts = num_frames.tolist()
        if sum(counts) != len(layouts):
            raise UserError(f"num_frames says {sum(counts)} images, pixel_values have {len(layouts)}: make them equal")
        images = iter(layouts)
        groups = (list(islice(images, count)) for count in counts)
        return [video.layout(group) if len(group) > 1 else group[0] for group in groups]

    def _image_layouts(self, pixel_values: Tensor, image_sizes: ImageSizes | None) -> list[Layout]:
        if self.config.image.tiles is None:
            return [self.config.layout(0, 0)] * len(pixel_values)
        if image_sizes is None:
            raise UserError("image_sizes is missing: with image.tiles an image's tiles depend on its height and width")
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        layouts = [self.config.layout(height, width) for height, width in sizes]
        expected = sum(layout.num_entries for layout in layouts)
        what = "cells" if self.config.image.tiles.varies else "tiles"
        if expected != len(pixel_values):
            raise UserError(f"{len(pixel_values)} {what} in pixel_values, but images of image_sizes have {expected}")
        if pixel_values.shape[-2:] != self.config.entry_size:
            given, own = (" x ".join(map(str, size)) for size in (pixel_values.shape[-2:], self.config.entry_size))
            raise UserError(f"pixel_values have {what} of {given} pixels, the model's are {own}: use its processor")
        return layouts

    def _encode(self, pixel_values: Tensor, layouts: Sequence[Layout]) -> Tensor:
        """The tokens of images and videos one behind another: (tokens, d_model)."""
        pixel_values = pixel_values.to(self.device, non_blocking=True)
        tiles, video = self.config.image.tiles, self.config.video
        if tiles is None:
            tokens = self.encode_images(pixel_values).flatten(0, 1)
        else:
            images = [image for layout in layouts for image in layout.images]
            encode = self._encode_attending if tiles.attention_of else self.encode_images
            tokens = tiles.encode(pixel_values, images, encode, self.connector, self.config.tile_frame)
        return tokens if video is None else video.prune(tokens, layouts)

    def _encode_attending(self, pixel_values: Tensor) -> tuple[Tensor, list[PatchAttention]]:
        """`encode_images`, and the attention that tiles go by."""
        features, attention = self.vision_encoder(pixel_values, attention_of=self.config.image.tiles.attention_of)
        return self.connector(features.to(self.dtype)), attention

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: ImageSizes | None = None,
        num_frames: Tensor | None = None,
    ) -> Tensor:
        """Embeddings of a prompt, the tokens of the images in order where the image tokens stand.

        Args:
            input_ids: (batch, seqlen), `tokenizer.image_id` at image tokens.
            pixel_values: (num_tiles, 3, height, width), rows one after another, or None.
            image_sizes, num_frames: see `layouts`.
        Returns:
            (batch, seqlen, d_model).
        Raises:
            UserError: if the image tokens are not as many as the images give.
        """
        layouts = [] if pixel_values is None else self.layouts(pixel_values, image_sizes, num_frames)
        is_image = self._image_places(input_ids, layouts)
        embeds = self.lm.embedding(input_ids)
        if pixel_values is None:
            return embeds + self._blank() if self.encodes_always else embeds
        tokens = self._encode(pixel_values, layouts).to(embeds.dtype)
        return embeds.index_put(is_image.nonzero(as_tuple=True), tokens)

    def embed_shard(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        shard: SequenceShard,
        image_sizes: ImageSizes | None = None,
        num_frames: Tensor | None = None,
    ) -> Tensor:
        """`embed` for one process's piece of the rows: (batch, tokens of the piece, d_model).

        Only the images with a token in it are encoded, and nothing is exchanged: an image that is cut is encoded
        on both sides, and each side's gradient is that of its own tokens.

        Args:
            input_ids, pixel_values, image_sizes, num_frames: of the whole rows, as `embed`; pixels may stay on the CPU.
        """
        layouts = [] if pixel_values is None else self.layouts(pixel_values, image_sizes, num_frames)
        is_image = self._image_places(input_ids, layouts)
        numbers = shard.take(is_image.flatten().cumsum(0).view_as(is_image) - 1)
        is_image = shard.take(is_image)
        embeds = self.lm.embedding(shard.take(input_ids))
        if pixel_values is None or not is_image.any():
            return embeds + self._blank() if self.encodes_always else embeds
        numbers = numbers[is_image]
        ends = torch.tensor([layout.num_tokens for layout in layouts], device=numbers.device).cumsum(0)
        images, place = torch.bucketize(numbers, ends, right=True).unique(return_inverse=True)
        taken = [layouts[image] for image in images.tolist()]
        entries = pixel_values.split([layout.num_entries for layout in layouts])
        tokens = self._encode(torch.cat([entries[image] for image in images.tolist()]), taken).to(embeds.dtype)
        before = ends[images] - torch.tensor([layout.num_tokens for layout in taken], device=ends.device).cumsum(0)
        return embeds.index_put(is_image.nonzero(as_tuple=True), tokens[numbers - before[place]])

    def _blank(self) -> Tensor:
        """A zero that comes of a blank tile."""
        layout = self.config.one_tile
        pixels = torch.zeros(layout.num_entries, 3, *self.config.entry_size, device=self.device)
        return 0.0 * self._encode(pixels, [layout]).sum()

    def _image_places(self, input_ids: Tensor, layouts: Sequence[Layout]) -> Tensor:
        """Where image tokens stand; as many as the images give."""
        is_image = input_ids == self.tokenizer.image_id
        places = int(is_image.sum())
        given = sum(layout.num_tokens for layout in layouts)
        if places != given:
            each = f" ({self.config.tokens_per_tile} per tile)" if self.config.image.tiles is None else ""
            raise UserError(
                f"the prompt has {places} image tokens, the images give {given}{each}: their numbers must be equal"
            )
        return is_image

    def loss(
        self, batch: dict[str, Any], group: "dist.ProcessGroup | None" = None
    ) -> tuple[Tensor, Tensor]:
        """Sum of the token losses of a batch, and how many tokens it is over.

        Args:
            batch: `input_ids` and `labels` (batch, seqlen), rows padded on the right, labels[t] the id to
                be predicted for place t or -100; `pixel_values` or None; `image_sizes` and `num_frames`, see
                `layouts`, or None; `seq_idx` (batch, seqlen), if
                several texts are packed into a row (the first token of each has no label), or None.
            group: processes that share each row, all given the same batch. Each returns the sum and the
                number of its own piece: loss, number and gradients are to be summed over the group. If one
                of them goes backward, all must. See lm/sequence_parallel.py.
        Returns:
            sum of cross entropies, scalar float32; number of supervised tokens, scalar int64.
        Raises:
            UserError: if image tokens and tiles do not fit, or rows or layers cannot be shared by the group.
        """
        ids, pixels, seq_idx = batch["input_ids"], batch.get("pixel_values"), batch.get("seq_idx")
        labels, sizes, frames = batch["labels"], batch.get("image_sizes"), batch.get("num_frames")
        is_nested = self.training and pixels is not None and getattr(self.config.connector, "nested", False)
        if group is None:
            embeds = self.embed(ids, pixels, sizes, frames)
            if is_nested:
                embeds, labels, seq_idx = self._first_tokens(ids, embeds, labels, seq_idx)
            hidden, _ = self.lm.read(inputs_embeds=embeds, seq_idx=seq_idx)
            targets = next_labels(labels)
        else:
            if is_nested:
                raise UserError(
                    "connector.nested draws a number of tokens on each process, and here several share a row: set "
                    "connector.nested=false, or give each process rows of its own"
                )
            batch_size, seqlen = ids.shape
            shard = SequenceShard.cut(batch_size, seqlen, group, seq_idx)
            targets = shard.take(next_labels(labels))
            embeds = self.embed_shard(ids, pixels, shard, sizes, frames)
            hidden, _ = self.lm.read(inputs_embeds=embeds, shard=shard)
        supervised = targets != IGNORE
        return self.lm.loss(hidden[supervised], targets[supervised]), supervised.sum()

    def _first_tokens(
        self, ids: Tensor, embeds: Tensor, labels: Tensor, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embeddings, labels and segments of rows with as many tokens of each tile as the connector draws, the first.

        The others are taken out. Where a row loses more than another, some stand behind its end, as padding does.
        """
        is_image = ids == self.tokenizer.image_id
        numbers = (is_image.flatten().cumsum(0).view_as(ids) - 1) % self.config.tokens_per_tile
        is_left_out = is_image & (numbers >= self.connector.draw())
        longest = int((~is_left_out).sum(1).max())
        order = is_left_out.long().argsort(dim=1, stable=True)[:, :longest]
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        return embeds[rows, order], labels[rows, order], None if seq_idx is None else seq_idx[rows, order]

    generate = generation.generate
    answer = generation.answer
    answer_batch = generation.answer_batch
    stream = generation.stream
    prefill = generation.prefill


def next_labels(labels: Tensor) -> Tensor:
    """What each place predicts: the label of the next, which may stand in another process's piece."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


@torch.no_grad()
def fixed_sentence_loss(model: Cobra) -> tuple[float, int]:
    """How well the language model foretells `FIXED_SENTENCE`, to be held against `chance_loss`: one whose
    pretrained weights were lost or mixed up does no better than chance.

    Returns:
        the mean cross entropy of a token, in nats; the number of tokens that it is over.
    """
    ids = torch.tensor([model.tokenizer.encode(FIXED_SENTENCE)], device=model.device)
    hidden, _ = model.lm.read(ids[:, :-1])
    num_tokens = ids.shape[1] - 1
    return model.lm.loss(hidden, ids[:, 1:]).item() / num_tokens, num_tokens


def chance_loss(model: Cobra) -> float:
    """The loss of a token where all of the vocabulary are equally likely, in nats."""
    return math.log(model.config.lm.vocab_size)


def make_vision_parts(config: CobraConfig) -> tuple[nn.Module, nn.Module]:
    """The vision encoder and the connector of a configuration, with random weights."""
    encoder = VISION_ENCODERS[config.vision_encoder.kind](config.vision_encoder, config.image)
    if config.token_reduction is not None:
        encoder.check_attention("token_reduction", (-1,))
    connector = CONNECTORS[config.connector.kind](config.connector, encoder.d_model, config.lm.d_model)
    if config.image.tiles is not None:
        if config.image.tiles.attention_of:
            encoder.check_attention(f"image.tiles={config.image.tiles.kind}", config.image.tiles.attention_of)
        config.image.tiles.extend(connector, config.lm.d_model)
    return encoder, connector


def build(
    preset: str | CobraConfig,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    lm_device: str | torch.device | None = None,
) -> Cobra:
    """A model with random weights.

    Args:
        preset: a name of `PRESETS`, or a configuration.
        seed: of the weights; the global random state is left as it was.
        tokenizer: None: bytes and special tokens.
        lm_device: "meta": leave the language model without values, for weights that are assigned later; the other
            parts have the values that they have anyway.
    Returns:
        the model, in evaluation mode.
    Raises:
        UserError: on an unknown preset or dtype.
    """
    config = choose("preset", preset, PRESETS) if isinstance(preset, str) else preset
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Cobra(config, tokenizer or Tokenizer.bytes(), lm_device)
    for part, own in ((model.vision_encoder, device), (model.connector, device), (model.lm, lm_device or device)):
        part.to(own)
    return model.to(dtype=resolve_dtype(dtype, device)).eval()
