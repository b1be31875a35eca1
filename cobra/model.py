"""Cobra: pixels -> vision encoder -> connector -> language model -> text."""

import math

import torch
from torch import Tensor, nn

from vision_scan.errors import UserError, choose

from . import generate as generation
from .checkpoint import resolve_dtype
from .config import PRESETS, CobraConfig
from .connector import CONNECTORS
from .lm import LanguageModel
from .processor import Processor
from .quantize import QuantizedLinear, replace_projections
from .tokenizer import Tokenizer
from .vision_encoder import VISION_ENCODERS

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
        connector: those features -> (n, tokens_per_tile, d_model).
        lm: token ids or embeddings -> logits and state.
        encodes_always: whether a batch without images sends a blank tile through tower and connector, to no effect:
            so that every process of a training run calls the same modules.
    """

    encodes_always = False

    def __init__(self, config: CobraConfig, tokenizer: Tokenizer) -> None:
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
        """Tiles to tokens: (n, 3, height, width) -> (n, tokens_per_tile, d_model)."""
        return self.connector(self.vision_encoder(pixel_values).to(self.dtype))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Embeddings of a prompt, the tokens of the tiles in order where the image tokens stand.

        Args:
            input_ids: (batch, seqlen), `tokenizer.image_id` at image tokens.
            pixel_values: (num_tiles, 3, height, width), rows one after another, or None.
        Returns:
            (batch, seqlen, d_model).
        Raises:
            UserError: if the image tokens are not as many as the tiles give.
        """
        is_image = input_ids == self.tokenizer.image_id
        places = int(is_image.sum())
        given = 0 if pixel_values is None else len(pixel_values) * self.config.tokens_per_tile
        if places != given:
            raise UserError(
                f"the prompt has {places} image tokens, the images give {given} "
                f"({self.config.tokens_per_tile} per tile): their numbers must be equal"
            )
        embeds = self.lm.embedding(input_ids)
        if pixel_values is None and self.encodes_always:
            image = self.config.image
            return embeds + 0.0 * self.encode_images(embeds.new_zeros(1, 3, image.height, image.width)).sum()
        if pixel_values is None:
            return embeds
        tokens = self.encode_images(pixel_values.to(self.device)).flatten(0, 1).to(embeds.dtype)
        return embeds.index_put(is_image.nonzero(as_tuple=True), tokens)

    def loss(self, batch: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """Sum of the token losses of a batch, and how many tokens it is over.

        Args:
            batch: `input_ids` and `labels` (batch, seqlen), rows padded on the right, labels[t] the id to
                be predicted for place t or -100; `pixel_values` or None; `seq_idx` (batch, seqlen) if rows are packed.
        Returns:
            sum of cross entropies, scalar float32; number of supervised tokens, scalar int64.
        """
        labels = batch["labels"][:, 1:]
        embeds = self.embed(batch["input_ids"], batch.get("pixel_values"))
        hidden, _ = self.lm.read(inputs_embeds=embeds, seq_idx=batch.get("seq_idx"))
        supervised = labels != -100
        return self.lm.loss(hidden[:, :-1][supervised], labels[supervised]), supervised.sum()

    generate = generation.generate
    answer = generation.answer
    answer_batch = generation.answer_batch
    prefill = generation.prefill


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
    connector = CONNECTORS[config.connector.kind]
    return encoder, connector(config.connector, encoder.d_model, config.lm.d_model)


def build(
    preset: str | CobraConfig,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Cobra:
    """A model with random weights.

    Args:
        preset: a name of `PRESETS`, or a configuration.
        seed: of the weights; the global random state is left as it was.
        tokenizer: None: bytes and special tokens.
    Returns:
        the model, in evaluation mode.
    Raises:
        UserError: on an unknown preset or dtype.
    """
    config = choose("preset", preset, PRESETS) if isinstance(preset, str) else preset
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Cobra(config, tokenizer or Tokenizer.bytes())
    return model.to(device=device, dtype=resolve_dtype(dtype, device)).eval()
